"""Models of Megatron-core that change between `wrap` and a step, and what watches the steps."""

import os
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import faccel
from faccel.backends.table import BACKENDS
from tests.megatron_cpu import install
from tests.procs.test_megatron import (
    BF16,
    adamw,
    built,
    full_state,
    groups_of,
    loss_fn,
    loss_of,
    message_of,
    on,
    prepared,
    rows,
    train,
)
from tests.ranks import outcomes

REASON = BACKENDS["megatron"].probe(os.environ)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"Megatron-core cannot run here: {REASON}"),
]


def wraps_under_tensor_parallel(ctx):
    from megatron.core import parallel_state

    net = built(ctx)
    # As after `torch.manual_seed(ctx.rank)`.
    torch.nn.init.constant_(net.embedding.position_embeddings.weight, 1.0 + ctx.rank)
    model = faccel.wrap(net, ctx)
    value = model.state_dict()["embedding.position_embeddings.weight"].to_local().unique().item()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    return value, message_of(lambda: faccel.wrap(built(ctx), ctx))


def test_ranks_of_tp_get_the_same_replicated_parameters_and_must_have_the_groups_of_the_mesh():
    results = on(2, wraps_under_tensor_parallel, mesh="tp=2")
    assert [value for value, _ in results] == [1.0, 1.0]
    for _, message in results:
        assert "not those of the mesh. Got groups of tp=1, pp=1" in message


def steps_under_watch(ctx):
    model, opt = prepared(ctx)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    scaler = faccel.scaled_backward(loss_of(model, rows(0, 2)), faccel.init_scaler(ctx), ctx)
    with warnings.catch_warnings():
        # PyTorch warns about a schedule that steps before its optimizer.
        warnings.simplefilter("error")
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0, scheduler=schedule)
    faccel.scaled_backward(loss_of(model, rows(0, 2)), scaler, ctx)
    opt.step()
    return calls, info.skipped, message_of(lambda: opt.add_param_group({"params": []}))


def test_hooks_and_schedules_of_pytorch_see_each_step():
    ((calls, skipped, message),) = on(1, steps_under_watch)
    assert calls == ["before", "after"] * 2
    assert not skipped
    assert "`add_param_group` is unsupported" in message


def fails_in_a_hook(ctx):
    model, opt = prepared(ctx)

    def fail(*_):
        raise LookupError

    hook = opt.register_step_pre_hook(fail)
    scaler = faccel.scaled_backward(loss_of(model, rows(0, 2)), faccel.init_scaler(ctx), ctx)
    with pytest.raises(LookupError):
        faccel.optimizer_step(opt, scaler, ctx)
    hook.remove()
    return message_of(lambda: faccel.optimizer_step(opt, scaler, ctx))


def test_gradients_that_were_summed_before_an_error_are_not_summed_again():
    assert "no backward since the last step" in on(1, fails_in_a_hook)[0]


def freezes(ctx, *, at_first, after_wrap, later):
    net = built(ctx)
    layer = net.decoder.layers[0].requires_grad_(at_first)
    model = faccel.wrap(net, ctx)
    layer.requires_grad_(after_wrap)

    def run():
        params = [param for param in model.parameters() if param.requires_grad]
        opt = faccel.wrap_optimizer(adamw([{"params": params}]), model, ctx)
        train(ctx, model, opt, stop=1)
        before = full_state(model)
        layer.requires_grad_(later)
        message = message_of(lambda: train(ctx, model, opt, start=1, stop=2))
        after = full_state(model)
        return message, [name for name in before if not torch.equal(before[name], after[name])]

    try:
        return run()
    except faccel.errors.FaccelError as error:
        return str(error), []


def freezes_at_any_time(ctx):
    return [
        freezes(ctx, at_first=True, after_wrap=False, later=False),
        freezes(ctx, at_first=False, after_wrap=True, later=True),
        freezes(ctx, at_first=True, after_wrap=True, later=False),
        freezes(ctx, at_first=False, after_wrap=False, later=True),
    ]


@pytest.mark.parametrize("zero", [0, 1])
def test_a_parameter_that_is_frozen_or_trained_after_wrap_raises_before_anything_moves(zero):
    (results,) = on(1, freezes_at_any_time, zero=zero)
    for message, moved in results:
        assert "`requires_grad` changed after `wrap`" in message
        assert "`decoder.layers.0." in message
        assert moved == []


def freezes_one_layer(ctx):
    net = built(ctx)
    net.decoder.layers[0].requires_grad_(requires_grad=False)
    model = faccel.wrap(net, ctx)
    before = full_state(model)
    train(ctx, model, faccel.wrap_optimizer(adamw(groups_of(model)), model, ctx))
    after = full_state(model)
    return {name for name in before if torch.equal(before[name], after[name])}


def test_a_parameter_that_is_frozen_before_wrap_stays():
    first, second = on(2, freezes_one_layer, zero=1)
    assert first == second
    assert len(first) == 12
    assert all(name.startswith("decoder.layers.0.") for name in first)


def saves_without_a_layer_of_each_stage(ctx, folder):
    net = built(ctx)
    net.decoder.layers[0].requires_grad_(requires_grad=False)
    model = faccel.wrap(net, ctx)
    faccel.save({"net": model}, folder, ctx, step=1, trained_only=True)
    return list(full_state(model))


def test_frozen_layers_of_each_stage_are_left_out_of_a_checkpoint(tmp_path):
    results = on(2, saves_without_a_layer_of_each_stage, tmp_path, mesh="pp=2")
    names = set().union(*results)
    saved = set().union(*[load_file(path).keys() for path in tmp_path.rglob("*.safetensors")])
    # The first layers of the stages; the other names are those of four layers.
    missing = {name for name in names if f"net/{name}" not in saved}
    assert len(missing) == 2 * 12
    assert {name.split(".")[2] for name in missing} == {"0", "2"}


def fails_inside_of_a_window(ctx):
    model, _ = prepared(ctx)
    loader = faccel.shard(DataLoader(rows(0, 8), batch_size=2), ctx)
    window, scaler, numbers = next(faccel.windows(loader, ctx, size=4)), faccel.init_scaler(ctx), []

    def run(fn):
        return faccel.forward_backward(fn, model, window, scaler, ctx)

    def fails_at_the_third(model, batch):
        numbers.append(batch)
        if len(numbers) == 3:
            raise LookupError("row 5 is empty")
        return loss_fn(model, batch)

    # One call finds the shapes, so this is micro-batch 1 on each rank.
    with pytest.raises(LookupError, match="row 5"):
        run(fails_at_the_third)
    with torch.no_grad():
        evaluation = message_of(lambda: loss_of(model, rows(0, 2)))
    return message_of(lambda: run(loss_fn)), evaluation


def test_a_pipeline_does_not_continue_with_messages_of_a_window_that_failed():
    options = {"strategy": "megatron", "device": "cpu", "before": install, "mesh": "pp=2"}
    (succeeded, messages), (other_succeeded, _) = outcomes(fails_inside_of_a_window, 2, **options)
    assert succeeded
    for message in messages:
        assert "cannot continue after an error inside of a window" in message
    # It has received one micro-batch, and waits for the next one until the first rank ends.
    assert not other_succeeded


def wraps_what_is_wrapped_or_frozen(ctx):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    net = built(ctx, **BF16)
    in_ddp = DistributedDataParallel(net.config, DistributedDataParallelConfig(), net)
    in_bf16 = Float16Module(net.config, built(ctx, **BF16))
    frozen = faccel.wrap(built(ctx, **BF16).requires_grad_(requires_grad=False), ctx)
    with torch.no_grad():
        loss = loss_of(frozen, rows(0, 2)).item()
    return loss, [
        message_of(lambda: faccel.wrap(in_ddp, ctx)),
        message_of(lambda: faccel.wrap(in_bf16, ctx)),
        message_of(lambda: faccel.wrap_optimizer(adamw(groups_of(frozen)), frozen, ctx)),
    ]


def test_a_frozen_model_evaluates_only_and_wrappers_of_megatron_are_refused():
    ((loss, messages),) = on(1, wraps_what_is_wrapped_or_frozen, mixed_precision="bf16")
    # ln(64), of a model that predicts all 64 tokens equally.
    assert loss == pytest.approx(torch.tensor(64.0).log().item(), rel=0.05)
    assert "Got a DistributedDataParallel around a GPTModel" in messages[0]
    assert "Got a Float16Module around a GPTModel" in messages[1]
    assert "no parameter of this rank requires gradients" in messages[2]


def loads_an_untied_checkpoint(ctx, folder):
    untied, tied = faccel.wrap(built(ctx, tied=False), ctx), faccel.wrap(built(ctx), ctx)
    with torch.no_grad():
        for name, param in untied.named_parameters():
            param.fill_(5.0 if name == "output_layer.weight" else 3.0)
    faccel.save({"net": untied}, folder, ctx, step=1)
    message = message_of(lambda: faccel.load({"net": tied}, folder, ctx))
    _, report = faccel.load({"net": tied}, folder, ctx, strict=False)
    values = set()
    for name, param in tied.named_parameters():
        if name == "embedding.word_embeddings.weight":
            values.update(param.unique().tolist())
    return message, report.unexpected, values


@pytest.mark.parametrize("mesh", [None, "pp=2"])
def test_an_untied_checkpoint_leaves_the_copies_of_a_tied_embedding_equal(tmp_path, mesh):
    size = 1 if mesh is None else 2
    # Both stages have the embedding under one name, so both read one tensor of the file.
    for message, unexpected, values in on(size, loads_an_untied_checkpoint, tmp_path, mesh=mesh):
        assert "output_layer.weight` only in the checkpoint" in message
        assert unexpected == ("net.output_layer.weight",)
        assert values == {3.0}
