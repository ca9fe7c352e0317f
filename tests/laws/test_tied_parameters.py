"""The law of tied parameters: every name and every stage has one value, whatever was written.

A pipeline has the copies of a tied parameter on several ranks, under one name each. What writes
parameters writes all of them or none. What one process makes of the same files is compared.
"""

import pytest
import torch
from safetensors.torch import save_file

import faccel
from faccel.checkpoint.tied_tensors import StoredTie, check_equal, tied_names
from faccel.errors import CheckpointError, ModelError, OptimizerError
from faccel.testing import fake_context, simulate
from tests.models import model
from tests.training import full, plan_of

ONE = fake_context(0, 1)
NAMES = ("embed.token.weight", "head.weight")
MESHES = ("dp_replicate=1", "dp_shard=2", "tp=2", "pp=2", "pp=2,dp_shard=2")
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts


# Files of an untied model. With one of the names, as transformers writes a tied model.


def different(net):
    with torch.no_grad():
        net.head.weight[-1, -1] += 1.0  # one element of 512


def equal(net):
    """Both names have one value."""


def first_name(net):
    del net.head


def last_name(net):
    del net.embed.token


def written(path, change):
    """Write the files in both formats; return the value of the tied parameter."""
    net = model(tied=False)
    with torch.no_grad():
        net.head.weight.copy_(net.embed.token.weight)
        net.norm.bias.fill_(7.0)  # of another tensor, which shows that all are loaded
    value = net.head.weight.detach().clone()
    change(net)
    faccel.save({"model": net}, path / "native", ONE, step=1)
    (path / "files").mkdir()
    save_file(net.state_dict(), path / "files" / "model.safetensors")
    return value


def load(wrapped, path, ctx):
    faccel.load({"model": wrapped}, path / "native", ctx)


def load_not_strict(wrapped, path, ctx):
    _, report = faccel.load({"model": wrapped}, path / "native", ctx, strict=False)
    # What is loaded under another name is not missing.
    assert report == type(report)()


def load_files(wrapped, path, ctx):
    faccel.load({"model": wrapped}, path / "files", ctx, format="safetensors")


def load_model(wrapped, path, ctx):
    faccel.checkpoint.load_model(wrapped, path / "files", ctx)


WRITERS = (load, load_not_strict, load_files, load_model)


def on(mesh, fn, *args):
    return simulate(fn, faccel.MeshSpec.of(mesh).size, *args, mesh=mesh)


def wrapped_model(ctx):
    return faccel.wrap(model(), ctx, plan=plan_of(str(ctx.mesh.spec)))


def state_of(wrapped):
    return {name: full(value) for name, value in wrapped.state_dict().items()}


def tied_values(state):
    values = [state[name] for name in NAMES if name in state]
    assert values
    return values


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("change", [equal, first_name, last_name])
def test_every_copy_has_the_value_of_the_files(tmp_path, change, write, mesh):
    if write is load and change is not equal:
        pytest.skip("a strict load needs all names that a model of faccel saves")
    expected = written(tmp_path, change)

    def fn(ctx):
        wrapped = wrapped_model(ctx)
        write(wrapped, tmp_path, ctx)
        return state_of(wrapped)

    biases = 0
    for state in on(mesh, fn):
        for value in tied_values(state):
            assert torch.equal(value, expected)
        if "norm.bias" in state:
            assert state["norm.bias"].eq(7.0).all()
            biases += 1
    assert biases


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("write", WRITERS)
def test_different_values_raise_on_every_rank_and_change_nothing(tmp_path, write, mesh):
    written(tmp_path, different)

    def fn(ctx):
        wrapped = wrapped_model(ctx)
        before = state_of(wrapped)
        with pytest.raises(CheckpointError) as caught:
            write(wrapped, tmp_path, ctx)
        after = state_of(wrapped)
        assert all(torch.equal(before[name], value) for name, value in after.items())
        return str(caught.value)

    for message in on(mesh, fn):
        assert "two names of one tied tensor have different values" in message
        assert "embed.token.weight` and `" in message
        assert "head.weight`, which are one tensor" in message


@pytest.mark.parametrize("format", ["faccel", "safetensors"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_fix_of_the_message_loads_the_first_name(tmp_path, mesh, format):
    expected = written(tmp_path, different)
    path = tmp_path / ("native" if format == "faccel" else "files")

    def fn(ctx):
        wrapped = wrapped_model(ctx)
        with pytest.raises(CheckpointError) as caught:
            faccel.load({"model": wrapped}, path, ctx, format=format)
        rename = {"model.head.weight": "model.head.weight_unused"}
        assert f"strict=False, rename={rename}".replace("'", '"') in caught.value.fix
        state = {"model": wrapped}
        _, report = faccel.load(state, path, ctx, strict=False, rename=rename, format=format)
        assert not report.missing
        return state_of(wrapped)

    for state in on(mesh, fn):
        assert all(torch.equal(value, expected) for value in tied_values(state))


@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,dp_shard=2"])
@pytest.mark.parametrize("change", [equal, first_name, last_name])
def test_a_state_dict_of_full_tensors_is_loaded_into_every_copy(change, mesh):
    net = model(tied=False)
    with torch.no_grad():
        net.head.weight.copy_(net.embed.token.weight).mul_(2.0)
        net.embed.token.weight.mul_(2.0)
    expected = net.head.weight.detach().clone()
    change(net)

    def fn(ctx):
        wrapped = wrapped_model(ctx)
        wrapped.load_state_dict(net.state_dict(), strict=False)
        return state_of(wrapped)

    for state in on(mesh, fn):
        assert all(torch.equal(value, expected) for value in tied_values(state))


def test_a_state_dict_with_different_values_raises():
    net = model(tied=False)

    def fn(ctx):
        wrapped = wrapped_model(ctx)
        before = state_of(wrapped)
        with pytest.raises(ModelError, match=r"`embed\.token\.weight` and `head\.weight`"):
            wrapped.load_state_dict(net.state_dict(), strict=False)
        after = state_of(wrapped)
        assert all(torch.equal(before[name], value) for name, value in after.items())

    on("pp=2", fn)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_write_into_gathered_parameters_is_in_every_copy(mesh, name):
    def fn(ctx):
        wrapped = wrapped_model(ctx)
        with faccel.parallel.gathered(wrapped, ctx, modifier_rank=0) as params, torch.no_grad():
            params[name].fill_(3.0)
        return state_of(wrapped)

    for state in on(mesh, fn):
        assert all(value.eq(3.0).all() for value in tied_values(state))


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "pp=2"])
def test_averages_of_an_untied_model_are_refused_and_those_of_a_tied_one_are_equal(tmp_path, mesh):
    def save(ctx, folder, *, tied):
        wrapped = faccel.wrap(model(tied=tied), ctx)
        ema = faccel.parallel.init_ema(wrapped, ctx)
        with torch.no_grad():
            for param in wrapped.parameters():
                param.add_(1.0)
        ema = faccel.parallel.update_ema(ema, wrapped, ctx)
        faccel.save({"model": wrapped, "ema": ema}, tmp_path / folder, ctx, step=1)

    def fn(ctx, folder):
        wrapped = wrapped_model(ctx)
        ema = faccel.parallel.init_ema(wrapped, ctx)
        ema = faccel.load({"ema": ema}, tmp_path / folder, ctx)["ema"]
        with faccel.parallel.ema_weights(wrapped, ema, ctx):
            return state_of(wrapped)

    save(ONE, "untied", tied=False)
    save(ONE, "tied", tied=True)
    with pytest.raises(CheckpointError, match=r"`.*head\.weight` only in the checkpoint"):
        on(mesh, fn, "untied")
    values = [value for state in on(mesh, fn, "tied") for value in tied_values(state)]
    assert all(torch.equal(value, values[0]) for value in values)


PLACERS = {
    "place": lambda net, path: faccel.inference.place(net, path, ONE, budget={"cpu": "1GB"}),
    "load_quantized": lambda net, path: faccel.inference.load_quantized(net, path, ONE),
}


@pytest.mark.parametrize("name", PLACERS)
def test_files_for_inference_are_compared_too(tmp_path, name):
    written(tmp_path / "different", different)
    net = model(torch.float32)
    before = state_of(net)
    with pytest.raises(CheckpointError) as caught:
        PLACERS[name](net, tmp_path / "different" / "files")
    assert "`embed.token.weight` and `head.weight`" in str(caught.value)
    after = state_of(net)
    assert all(torch.equal(before[key], value) for key, value in after.items())
    if name == "place":  # the other needs a library
        expected = written(tmp_path / "equal", equal)
        PLACERS[name](net, tmp_path / "equal" / "files")
        assert torch.equal(net.head.weight, expected.float())


# The copies are stepped by the optimizers of their ranks. A group that is chosen by names holds one
# of them only: on one process a tied parameter has its first name.


def decayed(name):
    return 0.0 if name == "embed.token.weight" else 0.1


def with_groups(params):
    groups = {}
    for name, param in params:
        groups.setdefault(decayed(name), []).append(param)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    )


def without_head(params):
    return torch.optim.SGD([param for name, param in params if name != "head.weight"], lr=0.1)


class Rounding(torch.optim.SGD):
    bf16_stochastic_round = True


OPTIMIZERS = {
    "other options": (with_groups, "weight_decay=0.0 and weight_decay=0.1"),
    "one in no group": (without_head, "only one of them in a group"),
    "rounds": (lambda params: Rounding([param for _, param in params]), "`embed.token.weight`"),
}


@pytest.mark.parametrize("mesh", ["pp=2", "pp=3", "pp=2,dp_shard=2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_would_step_the_copies_differently_raises_on_every_rank(name, mesh):
    make, got = OPTIMIZERS[name]

    def fn(ctx):
        wrapped = wrapped_model(ctx)
        with pytest.raises(OptimizerError) as caught:
            faccel.wrap_optimizer(make(wrapped.named_parameters()), wrapped, ctx)
        assert got in caught.value.got
        return str(caught.value)

    assert len(set(on(mesh, fn))) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_such_an_optimizer_of_a_frozen_or_an_untied_parameter_is_taken(name):
    def fn(ctx, tied):
        net = model(tied=tied)
        net.embed.token.weight.requires_grad_(not tied)
        wrapped = faccel.wrap(net, ctx, plan=plan_of("pp="))
        opt = OPTIMIZERS[name][0](wrapped.named_parameters())
        assert faccel.wrap_optimizer(opt, wrapped, ctx) is opt

    simulate(fn, 2, False, mesh="pp=2")
    simulate(fn, 2, True, mesh="pp=2")


def test_two_models_with_one_parameter_are_compared_too(tmp_path):
    def nets(*, shared):
        first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        if shared:
            second.weight = first.weight
        return {"first": first, "second": second}

    faccel.save(nets(shared=False), tmp_path, ONE, step=1)
    with pytest.raises(CheckpointError, match=r"`first\.weight` and `second\.weight`"):
        faccel.load(nets(shared=True), tmp_path, ONE)
    state = nets(shared=True)
    faccel.save(state, tmp_path, ONE, step=2)
    loaded = faccel.load(nets(shared=True), tmp_path, ONE)
    assert torch.equal(loaded["second"].weight, state["first"].weight)


def test_empty_shards_are_tied_by_their_parameter():
    def fn(ctx):
        from torch.distributed.tensor import DTensor, Shard

        def sharded():
            # Rank 1 has no row, and so no memory that could be compared.
            local, mesh = torch.ones(1 - ctx.rank, 4), ctx.mesh.device_mesh
            x = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([1, 4]), stride=(4, 1))
            return torch.nn.Parameter(x)

        net = torch.nn.Sequential(*[torch.nn.Linear(4, 1, bias=False) for _ in range(3)])
        net[0].weight, net[1].weight = sharded(), sharded()
        net[2].weight = net[0].weight
        return tied_names(net, net.state_dict())

    names = ("0.weight", "2.weight")
    assert simulate(fn, 2) == (dict.fromkeys(names, names),) * 2


# The comparison is in blocks, which the data ranks have in turn.
ROWS = 5
ROW = 2**22  # float64: two rows are one block of 64 MiB


@pytest.mark.parametrize("row", [None, *range(ROWS)])
def test_a_difference_in_any_block_raises_on_the_rank_that_compares_it(row):
    reads = []

    def read_block(name, offsets, sizes):
        reads.append((name, offsets[0], sizes[0]))
        is_changed = name == "b" and row is not None and offsets[0] <= row < sizes[0] + offsets[0]
        return torch.full((sizes[0],), float(is_changed))

    def fn(ctx):
        shapes = dict.fromkeys("ab", torch.Size([ROWS, ROW]))
        tie = StoredTie(("a", "b"), ("a", "b"), torch.float64)
        try:
            check_equal([tie], shapes, read_block, ctx, fix=str)
        except CheckpointError:
            return True
        return False

    raised = simulate(fn, 2)
    # Rank 0 has rows 0, 1 and 4, rank 1 has rows 2 and 3.
    assert list(raised) == [row in (0, 1, 4), row in (2, 3)]
    assert {read for read in reads if read[0] == "a"} <= {("a", 0, 2), ("a", 2, 2), ("a", 4, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 2), (3,), (2, 0), (2, 3)])
def test_values_are_equal_as_bits(dtype, shape):
    def read_block(name, offsets, sizes):
        return torch.full(sizes, float("nan") if dtype.is_floating_point else 1, dtype=dtype)

    shapes = dict.fromkeys("ab", torch.Size(shape))
    check_equal([StoredTie(("a", "b"), ("a", "b"), dtype)], shapes, read_block, ONE, fix=str)


def test_values_of_other_dtypes_are_compared_as_the_model_has_them():
    values = {"a": torch.tensor([1.0 + 2**-20]), "b": torch.ones(1, dtype=torch.bfloat16)}

    def differ(dtype):
        shapes = dict.fromkeys(values, torch.Size([1]))
        tie = StoredTie(("a", "b"), ("a", "b"), dtype)
        try:
            check_equal([tie], shapes, lambda name, *_: values[name], ONE, fix=str)
        except CheckpointError:
            return True
        return False

    assert differ(torch.float32)
    assert not differ(torch.bfloat16)
