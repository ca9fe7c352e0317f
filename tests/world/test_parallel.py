"""Every parallelism equals one process: losses, gradients, clipped norm, parameters after AdamW."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, FaccelError, ModelError
from faccel.testing import simulate
from tests.models import TENSOR, CharModel, loss_of, model, tokens
from tests.training import CHAIN, differences, full, plan_of, train

# Each axis and each pair of axes that meet in code; the other meshes are slow tests.
MESHES = ("dp_shard=4", "dp_replicate=2,dp_shard=2", "dp_shard=2,tp=2", "pp=4", "pp=2,dp_shard=2",
          "pp=2,tp=2", "dp_shard=2,cp=2", "cp=2,tp=2", "pp=2,cp=2")  # fmt: skip
SLOW_MESHES = (
    "dp_replicate=4", "tp=4", "dp_replicate=2,tp=2", "pp=2,dp_replicate=2", "cp=4",
    "dp_replicate=2,cp=2", "dp_shard=8", "dp_replicate=2,dp_shard=2,tp=2", "pp=2,dp_shard=2,tp=2",
    "pp=2,dp_replicate=2,dp_shard=2", "dp_shard=2,tp=4", "pp=4,dp_shard=2", "dp_shard=2,cp=2,tp=2",
    "pp=2,cp=2,tp=2",
)  # fmt: skip
SLOW = pytest.mark.slow
PLAN = faccel.Plan
PIPELINE = faccel.parallel.PipelineConfig
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


def size_of(mesh):
    return faccel.MeshSpec.of(mesh).size


@pytest.fixture(scope="module")
def one():
    """What one process computes, by the options of `train`."""
    results = {}

    def reference(**options):
        key = str(sorted(options.items(), key=str))
        if key not in results:
            (results[key],) = simulate(lambda ctx: train(ctx, **options), 1)
        return results[key]

    return reference


@pytest.mark.parametrize(
    "mesh", [*MESHES, *(pytest.param(mesh, marks=SLOW) for mesh in SLOW_MESHES)]
)
def test_in_fp64_with_accumulation_and_tied_weights(mesh, one):
    options = {"rows": 32} if faccel.MeshSpec.of(mesh).data_world_size == 8 else {}
    for got in simulate(lambda ctx: train(ctx, plan_of(mesh), **options), size_of(mesh), mesh=mesh):
        far = differences(got, one(**options))
        assert max(far.values()) < 1e-10, far


@pytest.mark.parametrize("mesh", ["dp_replicate=2,dp_shard=2", "tp=2", "cp=2", "pp=2"])
def test_in_fp32_with_checkpointing_and_foreach(mesh, one):
    accum = 2 if "pp" in mesh else 1  # a pipeline has at least as many micro-batches as ranks
    options = {"dtype": torch.float32, "accum": accum, "tied": False, "foreach": True, "lr": 1e-3}
    plan = plan_of(mesh, activation_checkpoint="full")
    for got in simulate(lambda ctx: train(ctx, plan, **options), size_of(mesh), mesh=mesh):
        far = differences(got, one(**options))
        assert far["losses"] < 1e-6
        assert far["grads"] < 1e-6
        assert far["params"] < 1e-4


@pytest.mark.parametrize(("mesh", "stages"), [("pp=2", 1), ("pp=3", 1), ("pp=4", 1), ("pp=2", 2)])
def test_a_pipeline_infers_batches_of_any_size(mesh, stages):
    schedule = "interleaved" if stages > 1 else "1f1b"
    pipeline = faccel.parallel.PipelineConfig(
        chain=CHAIN, schedule=schedule, stages_per_rank=stages
    )

    def infer(ctx):
        wrapped = faccel.wrap(model(), ctx, plan=PLAN(pipeline=pipeline))
        with torch.no_grad():
            return [wrapped(tokens(rows)[:, :-1]) for rows in range(1, 14)]

    reference_model = model()
    for outs in simulate(infer, size_of(mesh), mesh=mesh):
        for rows, out in enumerate(outs, start=1):
            expected = reference_model(tokens(rows)[:, :-1])
            assert out.shape == expected.shape
            assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("reshard", "offload"), [
    (False, False), (2, True), pytest.param(True, False, marks=SLOW),
    pytest.param(False, True, marks=SLOW), pytest.param(2, False, marks=SLOW),
    pytest.param(True, True, marks=SLOW),
])  # fmt: skip
def test_the_options_of_fsdp_do_not_change_the_result(reshard, offload, one):
    mesh = "dp_shard=4"
    fsdp = faccel.parallel.FsdpConfig(reshard_after_forward=reshard, prefetch=1)
    plan = plan_of(mesh, fsdp=fsdp, offload=offload, activation_checkpoint=2)
    for got in simulate(lambda ctx: train(ctx, plan), 4, mesh=mesh):
        assert max(differences(got, one()).values()) < 1e-10


@pytest.mark.parametrize(
    "units", [None, "Block", ("blocks.0", "blocks.1"), ("Attention", "blocks.*.up"), 500]
)
def test_units_can_be_the_default_class_names_patterns_or_a_size(units, one):
    for got in simulate(
        lambda ctx: train(ctx, PLAN(units=units), tied=False), 2, mesh="dp_shard=2"
    ):
        assert max(differences(got, one(tied=False)).values()) < 1e-10


def test_selective_activation_checkpointing_does_not_change_the_result(one):
    plan = PLAN(
        units="Block",
        activation_checkpoint=faccel.parallel.ActivationCheckpointing(
            save_ops=("aten.mm.default", "aten.addmm.default")
        ),
    )
    for got in simulate(lambda ctx: train(ctx, plan), 2, mesh="dp_shard=2"):
        assert max(differences(got, one()).values()) < 1e-10


@pytest.mark.parametrize(("mesh", "where"), [
    ("dp_shard=2,tp=2", "others"), ("dp_shard=2,tp=2", "all"),
    pytest.param("dp_shard=2", "others", marks=SLOW), pytest.param("dp_shard=2", "all", marks=SLOW),
    pytest.param("tp=2", "others", marks=SLOW), pytest.param("tp=2", "all", marks=SLOW),
])  # fmt: skip
def test_a_model_on_meta_gets_the_values_of_rank_0(mesh, where):
    def build(ctx):
        torch.manual_seed(5)
        with torch.device("meta" if where == "all" or ctx.rank else "cpu"):
            net = CharModel()
        wrapped = faccel.wrap(net, ctx, plan=plan_of(mesh))
        tie = net.head.weight is net.embed.token.weight
        return (
            {name: full(p) for name, p in wrapped.named_parameters()},
            tie,
            wrapped(tokens(2)[:, :-1]).detach(),
        )

    results = simulate(build, size_of(mesh), mesh=mesh)
    for params, tie, out in results:
        assert tie
        assert torch.equal(out, results[0][2])
        assert all(torch.equal(p, results[0][0][name]) for name, p in params.items())
        assert all(p.isfinite().all() for p in params.values())
    if where == "others":
        torch.manual_seed(5)
        net = CharModel()
        assert all(torch.equal(results[1][0][name], p) for name, p in net.named_parameters())


def test_fp16_skips_on_all_ranks_if_one_rank_has_an_infinite_gradient():
    def step(ctx):
        wrapped = faccel.wrap(nn.Linear(4, 4, bias=False), ctx)
        opt = torch.optim.SGD(wrapped.parameters(), lr=1.0)
        scaler = faccel.scaled_backward(
            wrapped(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx
        )
        grad = next(wrapped.parameters()).grad.to_local()
        if ctx.rank == 1:
            grad[0, 0] = float("inf")
        info, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return info.skipped, scaler.scale

    assert set(simulate(step, 2, mesh="dp_shard=2", config={"mixed_precision": "fp16"})) == {
        (True, 32768.0)
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_gathers_and_keeps_fp32_parameters(precision):
    def step(ctx):
        wrapped = faccel.wrap(model(torch.float32), ctx, plan=plan_of("dp_shard=2"))
        dtypes = {p.dtype for p in wrapped.parameters()}
        return wrapped(tokens(2)[:, :-1]).dtype, dtypes

    for out, params in simulate(step, 2, mesh="dp_shard=2", config={"mixed_precision": precision}):
        assert out == torch.float32
        assert params == {torch.float32}


BAD = {
    "a mesh that does not fit": ("dp_shard=3", 2, PLAN(), ConfigError, "dp_shard=2"),
    "ep that does not divide": ("dp_shard=2,ep=3", 2, PLAN(), ConfigError, "ep=1"),
    "units that match nothing": ("dp_shard=2", 2, PLAN(units="Blok"), ConfigError,
                                 "matches no module"),
    "units that match one module twice": ("dp_shard=2", 2, PLAN(units=("Block", "blocks.0")),
                                          ConfigError, "blocks.0"),
    "a tied parameter in two units": ("dp_shard=2", 2, PLAN(units=("embed.token", "head")),
                                      ModelError, "head"),
    "no plan for tensor parallel": ("tp=2", 2, PLAN(), ConfigError, "tensor="),
    "a style of no module": ("tp=2", 2, PLAN(tensor={"blocks.*.upp": "colwise"}), ConfigError,
                             "upp"),
    "two styles of one module": (
        "tp=2", 2, PLAN(tensor={"blocks.*.up": "colwise", "blocks.0.up": "rowwise"}), ConfigError,
        "blocks.0.up"),
    "heads that tp does not divide": ("tp=8", 8, PLAN(tensor=TENSOR), ModelError, "num_heads=4"),
    "a width that tp does not divide": ("tp=3", 3, PLAN(tensor={"head": "colwise"}), ModelError,
                                        "does not divide"),
    "a style that a module does not support": ("tp=2", 2, PLAN(tensor={"norm": "colwise"}),
                                               ModelError, "LayerNorm"),
    "no plan for a pipeline": ("pp=2", 2, PLAN(), ConfigError, "pipeline="),
    "a chain without some parameters": ("pp=2", 2, PLAN(pipeline=PIPELINE(chain=("embed", "head"))),
                                        ModelError, "blocks.0"),
    "an unknown split": ("pp=2", 2, PLAN(pipeline=PIPELINE(chain=CHAIN, split="nothing")),
                         ConfigError, "split"),
    "more stages than modules": ("pp=6", 6, PLAN(pipeline=PIPELINE(chain=CHAIN)), ConfigError,
                                 "at most 5"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_an_impossible_combination_raises_before_any_parameter_moves(what):
    mesh, world_size, plan, kind, words = BAD[what]
    unchanged = []

    def step(ctx):
        net = model(torch.float32)
        before = {name: (id(p), p.detach().clone()) for name, p in net.named_parameters()}
        try:
            faccel.wrap(net, ctx, plan=plan)
        finally:
            after = dict(net.named_parameters())
            for name, (identity, value) in before.items():
                param = after[name]
                unchanged.append(id(param) == identity and torch.equal(param, value))

    with pytest.raises(FaccelError) as caught:
        simulate(step, world_size, mesh=mesh)
    assert isinstance(caught.value, kind)
    assert caught.value.fix
    assert words in str(caught.value)
    assert all(unchanged)


def test_too_few_micro_batches_and_a_call_with_gradients_are_errors():
    plan = plan_of("pp=2")
    with pytest.raises(ConfigError, match="as many micro-batches"):
        simulate(lambda ctx: train(ctx, plan, accum=1), 2, mesh="pp=2")

    def call(ctx):
        faccel.wrap(model(), ctx, plan=plan)(tokens(2)[:, :-1])

    with pytest.raises(ModelError, match="forward_backward"):
        simulate(call, 2, mesh="pp=2")


SEQUENCE = {
    "blocks.*.norm1": "sequence", "blocks.*.norm2": "sequence", "norm": "sequence",
    "embed.token": "sequence_embedding",
    "blocks.*.attention.q": "sequence_colwise", "blocks.*.attention.k": "sequence_colwise",
    "blocks.*.attention.v": "sequence_colwise", "blocks.*.attention.o": "sequence_rowwise",
    "blocks.*.up": "sequence_colwise", "blocks.*.down": "sequence_rowwise",
    "head": "sequence_colwise_gather",
}  # fmt: skip


def test_ignored_parameters_stay_replicated_and_fp32_units_compute_in_fp32():
    class RecordsDtypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.exact = nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.dtypes = []

        def forward(self, x):
            x = self.low(x)
            self.dtypes.append(x.dtype)
            x = self.exact(x)
            self.dtypes.append(x.dtype)
            return self.frozen(x)

    fsdp = faccel.parallel.FsdpConfig(ignored=("frozen.*",), fp32_units=("exact",))

    def step(ctx):
        net = RecordsDtypes()
        wrapped = faccel.wrap(net, ctx, plan=PLAN(units=("low", "exact"), fsdp=fsdp))
        shapes = {
            name: (full(p).shape, hasattr(p, "to_local")) for name, p in wrapped.named_parameters()
        }
        with faccel.autocast(ctx):
            wrapped(torch.ones(2, 4))
        return net.dtypes, shapes["frozen.weight"][1], shapes["low.weight"][1]

    for dtypes, ignored, sharded in simulate(
        step, 2, mesh="dp_shard=2", config={"mixed_precision": "bf16"}
    ):
        assert dtypes[0] == torch.bfloat16
        assert (ignored, sharded) == (False, True)


@pytest.mark.parametrize("ignored", ["0.*", "2.*"])
def test_parameters_of_one_pipeline_stage_can_be_ignored_by_fsdp(ignored):
    fsdp = faccel.parallel.FsdpConfig(ignored=(ignored,))
    pipeline = faccel.parallel.PipelineConfig(chain=("0", "1", "2", "3"))

    def is_sharded(ctx):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        model = faccel.wrap(net, ctx, plan=PLAN(fsdp=fsdp, pipeline=pipeline))
        return {name: hasattr(p, "to_local") for name, p in model.named_parameters()}

    names = {}
    for of_rank in simulate(is_sharded, 4, mesh="pp=2,dp_shard=2"):
        names |= of_rank
    assert {name for name, sharded in names.items() if not sharded} == {
        f"{ignored[0]}.weight", f"{ignored[0]}.bias",
    }  # fmt: skip


def test_the_tp_plan_of_a_transformers_model_is_used():
    class HasTpPlan(nn.Module):
        _no_split_modules = ("Block",)

        def __init__(self):
            super().__init__()
            self.net = model(tied=False)
            self.tp_plan = {f"net.{name}": style for name, style in TENSOR.items()} | {
                "net.head": "colwise_rep"
            }

        def forward(self, x):
            return self.net(x)

    def step(ctx):
        net = HasTpPlan()
        plan = faccel.parallel.plan_for(net, ctx)
        wrapped = faccel.wrap(net, ctx, plan=plan)
        loss_of(wrapped(tokens(4)[:, :-1]), tokens(4)[:, 1:]).backward()
        return plan.tensor.get("net.head"), {
            name: full(p.grad) for name, p in wrapped.named_parameters()
        }

    (one,) = simulate(step, 1)
    for head, grads in simulate(step, 2, mesh="tp=2"):
        assert head == "colwise_gather"
        assert all((grads[name] - grad).abs().max() < 1e-10 for name, grad in one[1].items())


class NoPositions(CharModel):
    """Without a position table, of which each chunk of the sequence would need other rows."""

    def forward(self, tokens):
        x = self.embed.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) + 0 * self.embed.position.sum()


@pytest.mark.parametrize("mesh", ["tp=2", "dp_shard=2,tp=2"])
def test_sequence_parallel_equals_one_process(mesh):
    def build():
        torch.manual_seed(3)
        return NoPositions(tied=False).double()

    def step(ctx):
        wrapped = faccel.wrap(build(), ctx, plan=PLAN(tensor=SEQUENCE))
        batch = tokens(4).chunk(ctx.data_world_size)[ctx.data_rank]
        loss = loss_of(wrapped(batch[:, :-1]), batch[:, 1:])
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        return {name: full(p.grad) for name, p in wrapped.named_parameters()}

    net = build()
    loss_of(net(tokens(4)[:, :-1]), tokens(4)[:, 1:]).backward()
    for grads in simulate(step, size_of(mesh), mesh=mesh):
        assert all((grads[name] - p.grad).abs().max() < 1e-12 for name, p in net.named_parameters())


def test_a_proposed_plan_can_be_printed_and_trained_with():
    def step(ctx):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        plan = faccel.parallel.plan_for(net, ctx)
        wrapped = faccel.wrap(net, ctx, plan=plan)
        wrapped(torch.ones(2, 3, 8)).square().mean().backward()
        return str(plan), {name: full(p.grad) for name, p in wrapped.named_parameters()}

    one = simulate(step, 1)[0][1]
    for text, grads in simulate(step, 4, mesh="dp_shard=2,tp=2"):
        assert "layers.*.linear1" in text
        assert all((grads[name] - grad).abs().max() < 1e-6 for name, grad in one.items())

    def chain(ctx):
        return faccel.parallel.plan_for(model(), ctx).pipeline.chain

    assert simulate(chain, 2, mesh="pp=2")[0] == CHAIN
    with pytest.raises(ModelError, match="finds no module of this model"):
        simulate(lambda ctx: faccel.parallel.plan_for(nn.Linear(2, 2), ctx), 2, mesh="tp=2")
    assert simulate(
        lambda ctx: (
            faccel.parallel.plan_for(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ctx).units
        ),
        1,
    ) == (5,)
