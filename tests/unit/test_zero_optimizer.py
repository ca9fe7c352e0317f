"""`ZeroOptimizer` on one process, with a stand-in for the engine of DeepSpeed."""

from types import SimpleNamespace

import torch
from torch import nn

from faccel.backends.deepspeed.optimizer import ZeroOptimizer
from faccel.backends.deepspeed.partition import ParamShard
from faccel.testing import fake_context


def test_a_state_from_before_the_first_step_loads_without_states_of_parameters():
    links = []
    zero = SimpleNamespace(
        _grad_acc_post_hooks=[],
        _hp_optimizer_states_linked=False,
        _lazy_init_hp_params_optimizer_state=lambda: links.append(True),
    )
    engine = SimpleNamespace(optimizer=zero, gradient_clipping=lambda: 0.0)
    param = nn.Parameter(torch.zeros(2))
    base = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    flat = base.param_groups[0]["params"][0]
    shard = ParamShard(param.shape, flat, 0, 0, 2, param)
    groups = [{**base.param_groups[0], "params": [param]}]
    opt = ZeroOptimizer(groups, base, engine, {id(param): shard}, fake_context(0, 1))
    opt.load_state_dict(opt.state_dict())
    # DeepSpeed links the states of parameters once: it must not do so before they exist.
    assert not base.state
    assert not links
