"""A mixture of experts with sharded experts trains as one process does."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel.errors import ConfigError, ModelError
from faccel.mesh import MeshSpec
from faccel.parallel.moe import MoE
from faccel.plan import FsdpConfig
from faccel.testing import assert_replicated, fake_context, simulate
from tests.models import WIDTH, Attention, CharModel, loss_of, tokens

MESHES = ["dp_shard=2,ep=2", "dp_shard=4,ep=2", "dp_shard=4,ep=4", "dp_replicate=2,dp_shard=2,ep=2"]
ROOMY = 4.0  # of 8 experts and 2 choices: room for every token at each expert
NUM_EXPERTS = 8
SLOW = pytest.mark.slow
TENSOR_MESHES = [
    "tp=2,ep=2",
    "dp_shard=2,tp=2,ep=4",
    pytest.param("dp_shard=2,tp=2,ep=2", marks=SLOW),
    pytest.param("dp_replicate=2,tp=2,ep=2", marks=SLOW),
    pytest.param("dp_shard=4,tp=2,ep=4", marks=SLOW),
    pytest.param("dp_shard=2,tp=4,ep=2", marks=SLOW),
]
TENSOR = {f"blocks.*.attention.{name}": "colwise" for name in "qkv"}
TENSOR["blocks.*.attention.o"] = "rowwise"


class Block(nn.Module):
    def __init__(self, capacity_factor, num_experts):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.moe = MoE(WIDTH, 12, num_experts, capacity_factor=capacity_factor)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.moe(self.norm2(x))


def model(tied=True, capacity_factor=None, num_experts=NUM_EXPERTS, dtype=torch.float64):
    torch.manual_seed(3)
    net = CharModel(depth=0, tied=tied)
    net.blocks = nn.ModuleList(Block(capacity_factor, num_experts) for _ in range(2))
    return net.to(dtype)


def balance_of(net):
    return sum(block.moe.balance_loss for block in net.blocks)


def full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def on(mesh, fn=None, **options):
    """Run `train` on a mesh, or another function."""
    return simulate(functools.partial(fn or train, **options), MeshSpec.parse(mesh).size, mesh=mesh)


def train(ctx, plan=None, balance=0.01, num_chunks=2, **options):
    """Make 3 updates; return losses and norms, the first gradients and the last parameters."""
    net = faccel.wrap(model(**options), ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(net.parameters(), lr=0.01), net, ctx)
    scaler = faccel.init_scaler(ctx)
    numbers, grads = [], {}
    for step in range(3):
        for i in range(num_chunks):
            data = tokens(16, seed=step).chunk(num_chunks)[i]
            batch = data.chunk(ctx.data_world_size)[ctx.data_rank]
            with faccel.grad_sync(net, on=i == num_chunks - 1):
                loss = loss_of(net(batch[:, :-1]), batch[:, 1:]) + balance * balance_of(net)
                scaler = faccel.scaled_backward(loss, scaler, ctx, scale=1 / num_chunks)
            numbers.append(faccel.reduce(loss.detach(), ctx, op="mean").item())
        grads = grads or {name: full(p.grad) for name, p in net.named_parameters()}
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.1)
        numbers.append(info.grad_norm.item())
    return numbers, grads, {name: full(p) for name, p in net.named_parameters()}


@functools.cache
def reference(**options):
    return train(fake_context(0, 1), **options)


def check_equal(ranks, expected, atol=1e-10):
    for numbers, grads, parameters in ranks:
        assert numbers == pytest.approx(expected[0], abs=atol, rel=0)
        for got, want in ((grads, expected[1]), (parameters, expected[2])):
            assert got.keys() == want.keys()
            for name, x in want.items():
                assert torch.allclose(got[name], x, rtol=0, atol=atol), name


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("tied", "capacity_factor"), [(True, None), (False, ROOMY)])
def test_sharded_experts_train_as_one_process_does(mesh, tied, capacity_factor):
    options = {"tied": tied, "capacity_factor": capacity_factor}
    check_equal(on(mesh, **options), reference(**options))


@pytest.mark.parametrize("mesh", TENSOR_MESHES)
@pytest.mark.parametrize("capacity_factor", [None, ROOMY])
def test_experts_beside_tensor_parallel_attention_train_as_one_process_does(mesh, capacity_factor):
    options = {"capacity_factor": capacity_factor}
    check_equal(on(mesh, plan=faccel.Plan(tensor=TENSOR), **options), reference(**options))


PLANS = {
    "checkpoint": ("dp_shard=4,ep=2", faccel.Plan(units="Block", activation_checkpoint="full")),
    "by size": (
        "dp_shard=4,ep=2",
        faccel.Plan(units=3000, fsdp=FsdpConfig(prefetch=1)),
    ),  # the experts of a layer
    "layers": (
        "dp_shard=2,ep=2",
        faccel.Plan(units="MoE", fsdp=FsdpConfig(reshard_after_forward=False)),
    ),
    "number": ("dp_shard=4,ep=4", faccel.Plan(fsdp=FsdpConfig(reshard_after_forward=2))),
    "experts": ("dp_shard=2,ep=2", faccel.Plan(units="Experts", offload=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_no_plan_changes_the_result(name):
    mesh, plan = PLANS[name]
    check_equal(on(mesh, plan=plan), reference())


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_experts", [2, 6]
)  # one or three on each rank of `ep`, for four ranks that hold the same
def test_fewer_experts_than_ranks_are_sharded_by_rows(num_experts):
    check_equal(on("dp_shard=8,ep=2", num_experts=num_experts), reference(num_experts=num_experts))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_rank_drops_the_same_tokens_as_one_process(mesh):
    """One process takes the ranks' batches in turn, without the balance loss of all ranks."""
    num_ranks = MeshSpec.parse(mesh).size
    alone = train(fake_context(0, 1), balance=0.0, num_chunks=num_ranks, capacity_factor=0.8)
    for _, grads, parameters in on(mesh, balance=0.0, num_chunks=1, capacity_factor=0.8):
        for name in parameters:
            assert torch.allclose(grads[name], alone[1][name], rtol=0, atol=1e-10), name
            assert torch.allclose(parameters[name], alone[2][name], rtol=0, atol=1e-10), name


@pytest.mark.parametrize("mesh", TENSOR_MESHES)
def test_ranks_of_tensor_parallel_drop_the_same_tokens_as_one_process(mesh):
    num_ranks = MeshSpec.parse(mesh).data_world_size
    alone = train(fake_context(0, 1), balance=0.0, num_chunks=num_ranks, capacity_factor=0.8)
    options = {"balance": 0.0, "num_chunks": 1, "capacity_factor": 0.8}
    for _, grads, parameters in on(mesh, plan=faccel.Plan(tensor=TENSOR), **options):
        for name in parameters:
            assert torch.allclose(grads[name], alone[1][name], rtol=0, atol=1e-10), name
            assert torch.allclose(parameters[name], alone[2][name], rtol=0, atol=1e-10), name


def rows_of_experts(ctx):
    net = faccel.wrap(model(capacity_factor=ROOMY), ctx, plan=faccel.Plan(tensor=TENSOR))
    moe, shapes = net.module.blocks[0].moe, []
    moe.experts.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    data = tokens(4)[:, :-1]
    with torch.no_grad():
        net(data)
    return moe.experts.up.to_local().shape[0], shapes[0].numel(), data.numel()


def test_ranks_of_tensor_parallel_divide_the_experts_and_their_rows():
    for num_experts, num_values, num_tokens in on("tp=2,ep=2", rows_of_experts):
        assert num_experts == NUM_EXPERTS // 2
        # Each expert computes as many slots as in one process, not twice as many.
        capacity = ROOMY * num_tokens * 2 / NUM_EXPERTS
        assert num_values == num_experts * capacity * WIDTH


def experts_of_rank(ctx):
    net = faccel.wrap(model(), ctx)
    moe = net.module.blocks[0].moe
    return moe.experts.up.to_local().clone(), moe.router.weight.to_local().shape


def test_a_rank_has_only_its_experts_in_order():
    all_experts = model().blocks[0].moe.experts.up
    for rank, (up, router) in enumerate(on("dp_shard=4,ep=2", experts_of_rank)):
        first = 4 * (rank % 2) + 2 * (
            rank // 2
        )  # four for each rank of `ep`, which two ranks share
        assert torch.equal(up, all_experts[first : first + 2])
        assert router == (2, WIDTH)


def uneven(ctx, plan=None):
    net = faccel.wrap(model(), ctx, plan=plan)
    rows = ctx.data_rank  # the first has none
    with torch.no_grad():
        return rows, net(tokens(rows, seed=rows)[:, :-1])


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [("dp_shard=4,ep=2", None), ("dp_shard=2,tp=2,ep=4", faccel.Plan(tensor=TENSOR))],
)
def test_ranks_may_have_different_numbers_of_tokens_without_a_capacity(mesh, plan):
    for rows, out in on(mesh, uneven, plan=plan):
        assert torch.allclose(out, model()(tokens(rows, seed=rows)[:, :-1]), rtol=0, atol=1e-12)


def test_the_experts_of_ranks_of_tensor_parallel_are_no_copies():
    def compare(ctx):
        net = faccel.wrap(model(), ctx, plan=faccel.Plan(tensor=TENSOR))
        loss = loss_of(net(tokens(4)[:, :-1]), tokens(4)[:, 1:])
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        assert_replicated({"model": net}, ctx, hashed=True)
        # The router is one: it is not sharded over `tp`.
        if ctx.rank == 1:
            net.module.blocks[0].moe.router.weight.to_local().detach().add_(1)
        with pytest.raises(AssertionError) as error:
            assert_replicated({"model": net}, ctx, hashed=True)
        return str(error.value)

    for message in on("tp=2,ep=2", compare):
        assert "blocks.0.moe.router.weight" in message


def saved_on(ctx, path, plan):
    net = faccel.wrap(model(), ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(net.parameters(), lr=0.01), net, ctx)
    scaler = faccel.init_scaler(ctx)
    data = tokens(8).chunk(ctx.data_world_size)[ctx.data_rank]
    scaler = faccel.scaled_backward(loss_of(net(data[:, :-1]), data[:, 1:]), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    faccel.save({"model": net, "opt": opt}, path, ctx, step=1)
    return {name: full(p) for name, p in net.named_parameters()}


def loaded_on(ctx, path, plan):
    torch.manual_seed(9)
    net = model()
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    net = faccel.wrap(net, ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(net.parameters(), lr=0.01), net, ctx)
    faccel.load({"model": net, "opt": opt}, path, ctx)
    moments = {name: full(opt.state[p]["exp_avg"]) for name, p in net.named_parameters()}
    return {name: full(p) for name, p in net.named_parameters()}, moments


@pytest.mark.parametrize(
    ("saved", "loaded"), [("dp_shard=2,tp=2,ep=4", "tp=2,ep=2"), ("tp=2,ep=2", "dp_shard=2")]
)
def test_a_checkpoint_of_experts_beside_tensor_parallel_loads_on_another_mesh(
    saved, loaded, tmp_path
):
    plans = {mesh: faccel.Plan(tensor=TENSOR) if "tp" in mesh else None for mesh in (saved, loaded)}
    alone = saved_on(fake_context(0, 1), str(tmp_path / "one"), None)
    params = on(saved, saved_on, path=str(tmp_path / "many"), plan=plans[saved])[0]
    (_, moments) = loaded_on(fake_context(0, 1), str(tmp_path / "one"), None)
    for got, got_moments in on(loaded, loaded_on, path=str(tmp_path / "many"), plan=plans[loaded]):
        for name, param in alone.items():
            assert torch.equal(got[name], params[name]), name
            # The key biases have a gradient of zero, whose sign AdamW amplifies.
            assert "attention.k.bias" in name or (got[name] - param).abs().max() < 1e-10, name
            assert (got_moments[name] - moments[name]).abs().max() < 1e-12, name


def in_bf16(ctx):
    net = faccel.wrap(
        model(dtype=torch.float32), ctx, plan=faccel.Plan(fsdp=FsdpConfig(fp32_units="blocks.0"))
    )
    seen = {}
    for i, block in enumerate(net.module.blocks):
        block.moe.experts.register_forward_hook(
            lambda m, args, out, i=i: seen.update({i: out.dtype})
        )
    loss = loss_of(net(tokens()[:, :-1]), tokens()[:, 1:])
    faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    return loss.item(), net.module.blocks[1].moe.balance_loss.dtype, seen


def test_experts_compute_in_the_precision_of_their_unit():
    want = loss_of(model()(tokens()[:, :-1]), tokens()[:, 1:]).item()
    for loss, balance, seen in simulate(
        in_bf16, 2, mesh="dp_shard=2,ep=2", config={"mixed_precision": "bf16"}
    ):
        assert loss == pytest.approx(want, abs=0.02)
        assert balance == torch.float32
        assert seen == {0: torch.float32, 1: torch.bfloat16}


def by_hand(moe, x, capacity):
    """The layer as a loop over choices, tokens and experts; also counts dropped tokens."""
    chances = F.softmax(x @ moe.router.weight.T, -1)
    best = chances.argsort(-1, descending=True)[:, : moe.top_k]
    out, counts, refused = torch.zeros_like(x), [0] * moe.num_experts, 0
    for choice in range(moe.top_k):
        for t in range(len(x)):
            e = int(best[t, choice])
            if counts[e] == capacity:
                refused += 1
                continue
            counts[e] += 1
            weight = chances[t, e] / chances[t, best[t]].sum()
            out[t] = out[t] + weight * (moe.experts.down[e] @ F.gelu(moe.experts.up[e] @ x[t]))
    shares = torch.bincount(best.flatten(), minlength=moe.num_experts) / best.numel()
    return out, refused, moe.num_experts * (shares * chances.mean(0)).sum()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("capacity_factor", "capacity"), [(None, 99), (0.7, 0.7), (1.0, 1.0), (ROOMY, ROOMY)]
)
def test_the_layer_equals_a_plain_loop(top_k, capacity_factor, capacity):
    torch.manual_seed(0)
    moe = MoE(6, 10, 4, top_k=top_k, capacity_factor=capacity_factor).double()
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    want, refused, balance = by_hand(moe, x.flatten(0, 1), -(-capacity * 21 * top_k // 4))
    got = moe(x)
    assert torch.allclose(got.flatten(0, 1), want, rtol=0, atol=1e-12)
    assert torch.allclose(moe.balance_loss, balance, rtol=0, atol=1e-12)
    assert (refused > 0) == (capacity_factor in (0.7, 1.0))
    params = tuple(moe.parameters())
    seed = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got.flatten(0, 1) * seed).sum() + moe.balance_loss, params),
        torch.autograd.grad((want * seed).sum() + balance, params),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_the_balance_loss_of_even_and_of_uneven_routing():
    moe = MoE(4, 4, 4, top_k=1)
    with torch.no_grad():
        moe.router.weight.copy_(20 * torch.eye(4))
    moe(torch.eye(4))
    assert moe.balance_loss.item() == pytest.approx(1)
    moe(torch.eye(4)[[0] * 4])
    assert moe.balance_loss.item() == pytest.approx(4)


def test_a_layer_can_be_copied_after_a_forward():
    moe = MoE(4, 4, 2)
    x = torch.ones(3, 4)
    assert torch.equal(moe(x), copy.deepcopy(moe)(x))


def test_no_tokens_are_no_error():
    assert MoE(4, 4, 2)(torch.ones(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 3}, {"capacity_factor": 0.0}])
def test_an_option_of_a_layer_out_of_range_is_an_error(options):
    with pytest.raises(ConfigError):
        MoE(4, 4, 2, **options)


def refused(ctx, make, kind):
    net = make()
    before = {name: (type(p), p.shape) for name, p in net.named_parameters()}
    with pytest.raises(kind) as error:
        faccel.wrap(net, ctx, plan=faccel.Plan(tensor={"head": "colwise_gather"}))
    assert {name: (type(p), p.shape) for name, p in net.named_parameters()} == before
    return error.value.problem, error.value.got


@pytest.mark.parametrize(
    ("mesh", "make", "kind", "expected"),
    [
        (
            "dp_shard=2,ep=2",
            lambda: model(num_experts=5),
            ModelError,
            "ep=2 does not divide the experts",
        ),
        ("dp_shard=2,ep=2", CharModel, ConfigError, "the mesh has `ep`, and the model no experts"),
    ],
    ids=["number", "none"],
)
def test_unsupported_experts_raise_before_any_parameter_moves(mesh, make, kind, expected):
    for problem, got in on(mesh, refused, make=make, kind=kind):
        assert problem == expected
        assert got


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ({"blocks.*.attention.o": "sequence_rowwise"}, "sequence parallel with expert parallel"),
        ({"blocks.*.moe.router": "colwise_gather"}, "a module of a layer of experts"),
    ],
)
def test_styles_with_which_ranks_would_route_other_tokens_raise_before_any_parameter_moves(
    tensor, problem
):
    def wrap(ctx):
        net = model()
        with pytest.raises(ConfigError, match=problem) as error:
            faccel.wrap(net, ctx, plan=faccel.Plan(tensor=tensor))
        assert {type(param) for param in net.parameters()} == {nn.Parameter}
        return error.value.got

    for got in on("tp=2,ep=2", wrap):
        assert next(iter(tensor)).rpartition(".")[2] in got
