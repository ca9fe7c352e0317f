"""Exports from any mesh: Hugging Face libraries read them, and files of older ones are deleted."""

import json
import os

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import faccel
from faccel.cli.commands import main
from faccel.errors import CheckpointError, ConfigError
from faccel.testing import fake_context, simulate

ONE = fake_context(0, 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_a_small_model_is_one_file_that_safetensors_reads(tmp_path):
    net = nn.Linear(3, 2)
    assert (
        simulate(
            lambda ctx: faccel.checkpoint.export_model(faccel.wrap(net, ctx), tmp_path, ctx), 2
        )
        == (["model.safetensors"],) * 2
    )
    assert os.listdir(tmp_path) == ["model.safetensors"]
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == {"weight", "bias"}
    assert torch.equal(weights["weight"], net.weight)


@pytest.mark.parametrize(("size", "num_files"), [("1GB", 1), (200, 2), ("0.1KB", 3), (1, 6)])
def test_shards_have_an_index_and_load_again(tmp_path, size, num_files):
    torch.manual_seed(0)
    net, other = Tied(), Tied()
    files = faccel.checkpoint.export_model(net, tmp_path, ONE, max_shard_size=size)
    assert len(files) == num_files or size == 1
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert (
            index["metadata"]["total_size"]
            == sum(x.nbytes for x in net.state_dict().values()) - net.head.weight.nbytes
        )
    faccel.checkpoint.load_model(other, tmp_path, ONE)
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert other.head.weight is other.embed.weight


def test_tied_weights_are_stored_once_and_their_names_are_in_the_metadata(tmp_path):
    faccel.checkpoint.export_model(Tied(), tmp_path, ONE)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata()["head.weight"] == "embed.weight"
    from safetensors.torch import load_model

    assert load_model(Tied(), tmp_path / "model.safetensors") == (set(), [])


def test_only_the_files_of_an_older_export_are_deleted(tmp_path):
    for name in (
        "config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "notes.safetensors",
    ):
        (tmp_path / name).write_text("{}")
    faccel.checkpoint.export_model(Tied(), tmp_path, ONE, max_shard_size=200)
    faccel.checkpoint.export_model(nn.Linear(2, 2), tmp_path, ONE)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes.safetensors"]
    faccel.checkpoint.load_model(nn.Linear(2, 2), tmp_path, ONE)
    faccel.checkpoint.export_model(Tied(), tmp_path, ONE, max_shard_size=200)
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_do_not_fit_are_named_before_the_model_is_changed(tmp_path):
    faccel.checkpoint.export_model(nn.Linear(3, 2), tmp_path, ONE)
    for model, problem in (
        (nn.Linear(3, 2, bias=False), "`bias`: unknown to the model"),
        (nn.Bilinear(3, 3, 2), "`weight`: of another shape"),
        (nn.Sequential(nn.Linear(3, 2)), "`0.bias`, `0.weight`: missing"),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            faccel.checkpoint.load_model(model, tmp_path, ONE)
        assert problem in caught.value.got
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match="does not contain weights"):
        faccel.checkpoint.load_model(nn.Linear(1, 1), tmp_path / "nothing", ONE)
    with pytest.raises(ConfigError):
        faccel.checkpoint.export_model(nn.Linear(1, 1), tmp_path, ONE, max_shard_size="much")


def test_weights_of_one_file_are_cast_to_the_models_dtype(tmp_path):
    net = nn.Linear(3, 2)
    faccel.checkpoint.export_model(net, tmp_path, ONE)
    low = nn.Linear(3, 2).bfloat16()
    faccel.checkpoint.load_model(low, tmp_path / "model.safetensors", ONE)
    assert torch.equal(low.weight, net.weight.bfloat16())


def sharded(ctx, seed):
    """Return a model whose weight is sharded over the ranks of the mesh."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.manual_seed(seed)
    net = nn.Linear(3, 7)
    if ctx.world_size > 1:
        mesh = ctx.mesh.device_mesh
        net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
        net.bias = nn.Parameter(distribute_tensor(net.bias.detach(), mesh, [Replicate()]))
        assert isinstance(net.weight, DTensor)
    return net


def full_parameters(net):
    return [
        p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach().clone()
        for p in net.parameters()
    ]


def test_sharded_tensors_are_saved_by_their_ranks_and_read_in_any_layout(tmp_path):
    expected = full_parameters(sharded(ONE, 1))

    def save(ctx):
        net = sharded(ctx, 1)
        checkpoint = faccel.save({"net": net}, tmp_path, ctx, step=1)
        faccel.checkpoint.export_model(net, tmp_path / "export", ctx)
        return checkpoint

    checkpoint = simulate(save, 4)[0]
    stored = {
        rank: load_file(f"{checkpoint.path}/shard-{rank + 1:05d}-model-00001-of-00001.safetensors")
        for rank in range(4)
    }
    assert [len(stored[rank]["net/weight"]) for rank in range(4)] == [2, 2, 2, 1]

    def load(ctx, how):
        net = sharded(ctx, 2)
        if how == "load":
            faccel.load({"net": net}, tmp_path, ctx)
        else:
            faccel.checkpoint.load_model(net, tmp_path / "export", ctx)
        return full_parameters(net)

    for world_size in (1, 2, 3, 4):
        for how in ("load", "load_model"):
            for loaded in simulate(load, world_size, how):
                assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


def test_the_command_line_merges_and_lists(tmp_path):
    torch.manual_seed(0)
    net = Tied()
    simulate(lambda ctx: faccel.save({"net": net, "n": 1}, tmp_path / "runs", ctx, step=4), 2)
    out = CliRunner().invoke(main, ["merge", str(tmp_path / "runs"), str(tmp_path / "out")])
    assert (out.exit_code, out.output) == (0, "model.safetensors\n")
    other = Tied()
    faccel.checkpoint.load_model(other, tmp_path / "out", ONE)
    assert torch.equal(other.embed.weight, net.embed.weight)
    faccel.save({"a": net, "b": nn.Linear(1, 1)}, tmp_path / "two", ONE, step=1)
    out = CliRunner().invoke(main, ["merge", str(tmp_path / "two"), str(tmp_path / "out")])
    assert out.exit_code == 1
    assert "`a`, `b`" in out.output
    out = CliRunner().invoke(
        main, ["merge", str(tmp_path / "two"), str(tmp_path / "out"), "--model", "b"]
    )
    assert out.exit_code == 0

    out = CliRunner().invoke(main, ["checkpoints", str(tmp_path / "runs")])
    assert out.exit_code == 0
    assert out.output.startswith("step 4  ")
    file = next((tmp_path / "runs").glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    out = CliRunner().invoke(main, ["checkpoints", str(tmp_path / "runs")])
    assert out.exit_code == 1
    assert "CORRUPT" in out.output


class Copies(nn.Module):
    """A module whose `state_dict` returns copies, and an extra state that is not a weight."""

    def __init__(self, value):
        super().__init__()
        self.x = nn.Parameter(torch.full((3,), value))
        self.register_buffer("z", torch.full((2,), value + 1j))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}x"] = self.x.detach().clone()
        destination[f"{prefix}z"] = self.z.clone()

    def get_extra_state(self):
        return {"n": 3}

    def set_extra_state(self, state):
        pass


def test_modules_that_return_copies_and_complex_numbers_are_merged_and_loaded(tmp_path):
    faccel.save({"a/b é": Copies(2.0)}, tmp_path / "runs", ONE, step=1)
    out = CliRunner().invoke(main, ["merge", str(tmp_path / "runs"), str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["x"].tolist() == [2, 2, 2]
    assert weights["z"].tolist() == [2 + 1j] * 2
    net = nn.Module()
    net.x = nn.Parameter(torch.zeros(3))
    net.register_buffer("z", torch.zeros(2, dtype=torch.complex64))
    faccel.checkpoint.load_model(net, tmp_path / "out", ONE)
    assert net.z.tolist() == [2 + 1j] * 2
    copies = Copies(0.0)
    faccel.checkpoint.export_model(
        nn.ParameterDict({"x": torch.full((3,), 5.0)}), tmp_path / "x", ONE
    )
    with pytest.raises(CheckpointError, match="missing"):
        faccel.checkpoint.load_model(copies, tmp_path / "x", ONE)


def test_merge_raises_for_a_corrupt_checkpoint_and_overwrites_none(tmp_path):
    checkpoint = faccel.save({"net": nn.Linear(2, 2)}, tmp_path, ONE, step=1)
    out = CliRunner().invoke(main, ["merge", str(tmp_path), checkpoint.path])
    assert (out.exit_code, "overwrite" in out.output) == (1, True)
    file = next(tmp_path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    out = CliRunner().invoke(main, ["merge", str(tmp_path), str(tmp_path / "out")])
    assert (out.exit_code, "is corrupt" in out.output) == (1, True)


def test_an_index_that_names_files_outside_its_directory_raises(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "../secret.safetensors"}}'
    )
    with pytest.raises(CheckpointError, match="index"):
        faccel.checkpoint.load_model(nn.Linear(1, 1), tmp_path, ONE)


def test_rank_0_writes_an_object_atomically(tmp_path):
    def fn(ctx):
        faccel.checkpoint.save_object(
            {"rank": ctx.rank, "x": torch.ones(2)}, tmp_path / "x.pt", ctx
        )
        with pytest.raises(CheckpointError):
            faccel.checkpoint.save_object(1, tmp_path / "no" / "x.pt", ctx)
        return torch.load(tmp_path / "x.pt")["rank"]

    assert simulate(fn, 2) == (0, 0)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_weights_are_loaded_into_a_module_whose_state_dict_returns_copies(tmp_path):
    class Doubled(nn.Linear):
        """Stores twice its weight, so its `state_dict` cannot be read into."""

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[f"{prefix}weight"] = 2 * self.weight.detach()

        def _load_from_state_dict(self, state, prefix, *args):
            with torch.no_grad():
                self.weight.copy_(state[f"{prefix}weight"] / 2)

    nets = [Doubled(3, 2, bias=False), Doubled(3, 2, bias=False)]
    faccel.checkpoint.export_model(nets[0], tmp_path, ONE)
    faccel.checkpoint.load_model(nets[1], tmp_path, ONE)
    assert torch.equal(nets[0].weight, nets[1].weight)


URLS = ("s3://bucket/run", "gs://b/run", "hf://datasets/x", "dbfs:/run", "file:///data/run")


def path_calls(url):
    """Return every function of the library that takes a path, called with a URL."""
    import pathlib

    from faccel.config_edit import write
    from faccel.config_file import read
    from faccel.launching.spec import LaunchSpec

    net, check = nn.Linear(1, 1), faccel.checkpoint
    url = pathlib.Path(url) if url.startswith("gs") else url  # `gs:/b/run`, with one slash
    text = str(url)
    return {
        "save": lambda: faccel.save({"step": 1}, url, ONE, step=1),
        "load": lambda: faccel.load({"step": 1}, url, ONE),
        "latest": lambda: faccel.latest(url, ONE),
        "checkpoints": lambda: check.checkpoints(url),
        "export_model": lambda: check.export_model(net, url, ONE),
        "load_model": lambda: check.load_model(net, url, ONE),
        "save_object": lambda: check.save_object(net, url, ONE),
        "run_dir": lambda: faccel.Config(run_dir=text),
        "init_trackers": lambda: faccel.tracking.init_trackers(text, ONE),
        "environment": lambda: fake_context(0, 1, config={"run_dir": text}),
        "log_dir": lambda: LaunchSpec(command=("x.py",), log_dir=text),
        "config": lambda: read(f"{text}.yaml"),
        "config file": lambda: write(f"{text}.yaml", {}),
    }


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_an_error_with_a_way_to_copy_and_never_a_local_folder(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for name, call in path_calls(url).items():
        with pytest.raises(faccel.errors.FaccelError, match="must be a local path") as caught:
            call()
        assert ("pip install" in caught.value.fix) == (not url.startswith("file:")), name
    for command in (["merge", url, "out"], ["merge", ".", url], ["checkpoints", url]):
        out = CliRunner().invoke(main, command)
        assert (out.exit_code, "must be a local path" in out.output) == (2, True), out.output
    assert os.listdir(tmp_path) == []


def test_local_paths_with_colons_are_no_urls(tmp_path):
    for name in ("a:b", "12:30:00", "s3:"):
        faccel.save({"x": 1}, tmp_path / name, ONE, step=1)
        assert faccel.load({"x": 0}, tmp_path / name, ONE) == {"x": 1}


def test_the_fix_for_a_url_copies_a_checkpoint(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        faccel.save({"x": 1}, "memory://bucket/run", ONE, step=1)
    faccel.save({"x": 1}, "local", ONE, step=1)
    code = caught.value.fix.split("`")[5]
    assert code.startswith("fsspec.filesystem(")
    eval(code, {"fsspec": fsspec})
    fsspec.filesystem("memory").get("memory://bucket/run", "copy", recursive=True)
    assert faccel.load({"x": 0}, "copy", ONE) == {"x": 1}


def test_merge_reaches_models_at_every_depth(tmp_path):
    nets = [nn.Linear(2, n) for n in range(1, 7)]
    states = {
        "nested": ({"train": {"ema": {"model": nets[0]}}, "step": 1}, "train.ema.model", nets[0]),
        "list": ({"nets": [nets[1], nets[2]]}, "nets.1", nets[2]),
        "numbered": ({"nets": {0: (nets[3],), (1, 2): 3}}, "nets.0.0", nets[3]),
        "root": (nets[4], "model", nets[4]),
        "ambiguous": ({"a.b": nets[0], "a": {"b": nets[5]}}, "a/b", nets[5]),
    }
    for kind, (state, name, net) in states.items():
        faccel.save(state, tmp_path / kind, ONE, step=1)
        out = str(tmp_path / f"{kind}-out")
        result = CliRunner().invoke(main, ["merge", str(tmp_path / kind), out, "--model", name])
        assert result.exit_code == 0, result.output
        weights = load_file(f"{out}/model.safetensors")
        assert torch.equal(weights["weight"], net.weight), kind
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "list"), str(tmp_path / "x")])
    assert "`nets.0`, `nets.1`" in result.output


@pytest.mark.parametrize("module", [nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)])
def test_a_model_without_elements_is_not_exported(tmp_path, module):
    def run(ctx):
        with pytest.raises(CheckpointError, match="`weight` cannot be stored"):
            faccel.checkpoint.export_model(module, tmp_path, ctx)

    simulate(run, 2)
    assert os.listdir(tmp_path) == []


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mesh", [None, "dp_replicate=2", "dp_shard=2"])
def test_weights_are_exported_in_a_dtype_as_torch_casts_them(tmp_path, dtype, mesh):
    def export(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(Tied(), ctx)
        faccel.checkpoint.export_model(model, tmp_path, ctx, dtype=dtype)
        return {tensor.dtype for tensor in model.parameters()}

    world_size = 2 if mesh else 1
    # The model itself is not cast.
    assert simulate(export, world_size, mesh=mesh) == ({torch.float32},) * world_size
    torch.manual_seed(0)
    expected = Tied().to(dtype).state_dict()  # the count of BatchNorm stays an int
    weights = load_file(tmp_path / "model.safetensors")
    assert expected.keys() - weights.keys() == {"head.weight"}
    for name, tensor in weights.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_files_have_the_size_of_the_dtype(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    export = faccel.checkpoint.export_model
    assert len(export(net, tmp_path / "32", ONE, max_shard_size=256)) == 2
    assert len(export(net, tmp_path / "16", ONE, max_shard_size=256, dtype=torch.float16)) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_no_export_has_is_an_error(tmp_path, dtype):
    with pytest.raises(ConfigError, match="`dtype` must be a floating-point dtype"):
        faccel.checkpoint.export_model(nn.Linear(2, 2), tmp_path / "export", ONE, dtype=dtype)
    assert not (tmp_path / "export").exists()


class Diffuser(nn.Module):
    """Has what faccel uses of a model of diffusers, whose `ConfigMixin` has these names."""

    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def save_config(self, folder):
        config = {"_class_name": type(self).__name__, "dim": 4}
        with open(os.path.join(folder, self.config_name), "w") as file:
            json.dump(config, file)


@pytest.mark.parametrize("mesh", [None, "dp_shard=2"])
@pytest.mark.parametrize("size", ["5GB", 80])
def test_models_of_diffusers_have_the_names_of_its_files(tmp_path, mesh, size):
    def export(ctx):
        torch.manual_seed(0)
        faccel.checkpoint.export_model(nn.Linear(2, 2), tmp_path, ctx)  # of another library
        model = faccel.wrap(Diffuser(), ctx)
        files = faccel.checkpoint.export_model(model, tmp_path, ctx, max_shard_size=size)
        loaded = Diffuser()
        faccel.checkpoint.load_model(loaded, tmp_path, ctx)
        return files, loaded.state_dict()

    results = simulate(export, 2 if mesh else 1, mesh=mesh)
    files = results[0][0]
    for _, loaded in results:
        torch.manual_seed(0)
        nn.Linear(2, 2)
        for name, tensor in Diffuser().state_dict().items():
            assert torch.equal(loaded[name], tensor)
    assert all(file.startswith("diffusion_pytorch_model") for file in files)
    others = {"config.json"}
    if size == 80:
        assert len(files) > 1
        others.add("diffusion_pytorch_model.safetensors.index.json")
    assert set(os.listdir(tmp_path)) == {*files, *others}
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "Diffuser"


class Counted(nn.Linear):
    """A layer whose state has a tensor that is neither a parameter nor a buffer."""

    def __init__(self):
        super().__init__(4, 4)
        self.count = torch.ones(3)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}count"] = self.count


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_a_frozen_layer_that_is_sharded_is_not_taken_for_a_quantized_one(mesh, tmp_path):
    def fn(ctx):
        net = nn.Sequential(Counted().requires_grad_(requires_grad=False), nn.Linear(4, 4))
        model = faccel.wrap(net, ctx)
        faccel.save({"net": model}, tmp_path / "adapter", ctx, step=1, trained_only=True)
        faccel.checkpoint.export_model(model, tmp_path, ctx)

    simulate(fn, 2, mesh=mesh)
    assert "0.count" in load_file(tmp_path / "model.safetensors")
    files = (tmp_path / "adapter").rglob("*.safetensors")
    names = set().union(*[load_file(path).keys() for path in files])
    assert names == {"net/0.count", "net/1.weight", "net/1.bias"}
