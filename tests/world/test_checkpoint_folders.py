"""Directories of checkpoints in the wild: links, foreign folders, manifests of any content."""

import json
import os
import pathlib
import shutil

import attrs
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import faccel
from faccel.checkpoint.codecs import CODECS
from faccel.checkpoint.merge import merge
from faccel.checkpoint.node_checks import KINDS
from faccel.cli.commands import main
from faccel.errors import CheckpointError, ConfigError, FaccelError
from faccel.testing import fake_context, simulate
from tests.fuzz.mutations import (
    fields_of,
    reseal,
    sealed,
    with_sharding,
    without_file,
    write_fields,
)

ONE = fake_context(0, 1)


def save(path, step, **options):
    # A new context: the newest checkpoint that one has loaded is never deleted.
    ctx = fake_context(0, 1)
    checkpoint = faccel.save({"x": torch.full((3,), step)}, path, ctx, step=step, **options)
    return pathlib.Path(checkpoint.path)


def loaded(path, ctx=ONE, **options):
    return faccel.load({"x": None}, path, ctx, **options)["x"][0].item()


def steps(path):
    existing = faccel.checkpoint.checkpoints(path)
    return [checkpoint.step for checkpoint in existing if checkpoint.problem is None]


def entries(path):
    """Return the names of all files, folders and links, with the targets and contents."""
    found = {}
    for entry in sorted(pathlib.Path(path).rglob("*")):
        name = str(entry.relative_to(path))
        if entry.is_symlink():
            found[name] = os.readlink(entry)
        elif entry.is_file():
            found[name] = entry.read_bytes()
        else:
            found[name] = None
    return found


# Links


def test_a_step_folder_that_is_a_link_is_read_and_pruned_as_a_link(tmp_path):
    folder = save(tmp_path / "runs", 1)
    elsewhere = tmp_path / "disk" / "first"
    elsewhere.parent.mkdir()
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    assert steps(tmp_path / "runs") == [1]
    assert faccel.latest(tmp_path / "runs", ONE).step == 1
    assert loaded(tmp_path / "runs") == 1
    manifest = elsewhere / "manifest.json"
    before = manifest.read_bytes()
    save(tmp_path / "runs", 2, keep=1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        ".lock",
        "step-000000002",
    ]
    assert manifest.read_bytes() == before
    assert len(list(elsewhere.iterdir())) == 2


def test_a_corrupt_link_is_renamed_as_a_link_and_one_that_was_left_is_removed(tmp_path):
    folder = save(tmp_path / "runs", 5)
    shutil.move(folder, tmp_path / "first")
    os.truncate(next((tmp_path / "first").glob("*.safetensors")), 3)
    folder.symlink_to(tmp_path / "first")
    (tmp_path / "runs" / ".tmp-step-old-0123abcd").symlink_to(tmp_path / "first")
    save(tmp_path / "runs", 5)
    names = sorted(path.name.split(".corrupt")[0] for path in (tmp_path / "runs").iterdir())
    assert names == [".lock", "step-000000005", "step-000000005-1"]
    assert len(list((tmp_path / "first").iterdir())) == 2
    assert loaded(tmp_path / "runs") == 5


@pytest.mark.parametrize("target", ["missing", "step-000000003", "/dev/null", "."])
def test_a_link_that_leads_to_no_checkpoint_is_left_alone(tmp_path, target):
    save(tmp_path, 1)
    (tmp_path / "step-000000003").symlink_to(target)
    assert loaded(tmp_path) == 1
    save(tmp_path, 3)
    assert os.readlink(tmp_path / "step-000000003") == target
    assert loaded(tmp_path) == 3
    assert steps(tmp_path)[0] == 3


def test_a_lock_that_is_a_link_creates_nothing_outside(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".lock").symlink_to(tmp_path / "created")
    with pytest.raises(CheckpointError):
        save(tmp_path / "runs", 1)
    assert not (tmp_path / "created").exists()


# Manifests of any content


def field(name, value):
    return lambda folder: write_fields(folder, fields_of(folder) | {name: value})


def entry(name, value):
    def change(folder):
        fields = fields_of(folder)
        fields["files"][0][name] = value
        write_fields(folder, fields)

    return change


def text(content, version=b"1"):
    def change(folder):
        body = content(folder) if callable(content) else content
        (folder / "manifest.json").write_bytes(sealed(body, version))

    return change


def replaced(old, new):
    return text(lambda folder: json.dumps(fields_of(folder)).encode().replace(old, new))


def state(node):
    return field("state", node)


def pipe(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def link(target):
    def change(folder):
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").symlink_to(target)

    return change


def directory(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def huge(folder):
    os.truncate(folder / "manifest.json", 1 << 40)


DEEP = {"x": {}}
for _ in range(150):
    DEEP = {"x": DEEP}


def opened(opening, closing, depth):
    return opening * depth + b"1" + closing * depth


def array(dtype):
    return state({"x": {"!": "array", "v": {"!": "tensor"}, "dtype": dtype, "scalar": False}})


# A file with another field, and an optimizer whose parameter groups are no dicts.
OTHER_FIELD = {"name": "x", "size": 1, "xxh3": "0" * 32, "y": 1}
OPTIMIZER = {"!": "optimizer", "v": {"state": {}, "param_groups": ["x"], "rest": {}}}
METADATA = b'"metadata": {}'
# Listing finds the problem of the first ones, and `load` that of all.
LISTED = {
    "nested 100,000 lists deep": text(opened(b"[", b"]", 100_000)),
    "nested 2000 objects deep": replaced(METADATA, b'"metadata": ' + opened(b'{"a":', b"}", 2000)),
    "metadata 500 levels deep": replaced(METADATA, b'"metadata": ' + opened(b'{"a":', b"}", 500)),
    "a list": text(b"[]"),
    "a number": text(b"1"),
    "no JSON": text(b"{"),
    "not UTF-8": text(b'{"step": "\xff"}'),
    "NaN": replaced(METADATA, b'"metadata": {"a": NaN}'),
    "an infinite number": replaced(METADATA, b'"metadata": {"a": 1e999}'),
    "an infinite time": replaced(b'"created_s": ', b'"created_s": 1e999'),
    "5000 digits": replaced(METADATA, b'"metadata": {"a": ' + b"9" * 5000 + b"}"),
    "a field twice": replaced(b'"mesh"', b'"step": 2, "mesh"'),
    "an unknown field": field("extra", 1),
    "no step": replaced(b'"step"', b'"steps"'),
    "step is a text": field("step", "2"),
    "step is negative": field("step", -2),
    "step is a bool": field("step", True),
    "step is a float": field("step", 2.0),
    "step is None": field("step", None),
    "another step": field("step", 3),
    "world_size 0": field("world_size", 0),
    "world_size is a list": field("world_size", [1]),
    "mesh is None": field("mesh", None),
    "an extent is a text": field("mesh", {"dp_shard": "2"}),
    "created_s is a text": field("created_s", "now"),
    "created_s is a bool": field("created_s", True),
    "created_s is huge": field("created_s", 10**400),
    "metadata is a list": field("metadata", [1]),
    "metadata is None": field("metadata", None),
    "files is None": field("files", None),
    "files is an object": field("files", {}),
    "a file is a text": field("files", ["x"]),
    "a file is None": field("files", [None]),
    "a file has no hash": field("files", [{"name": "x", "size": 1}]),
    "a file has another field": field("files", [OTHER_FIELD]),
    "a file twice": lambda folder: field("files", fields_of(folder)["files"] * 2)(folder),
    "a name is a number": entry("name", 3),
    "a name in the parent": entry("name", "../x"),
    "an absolute name": entry("name", "/etc/passwd"),
    "a name of the parent": entry("name", ".."),
    "an empty name": entry("name", ""),
    "a name with a null": entry("name", "x\0"),
    "the size of a file is a text": entry("size", "9"),
    "a size is negative": entry("size", -1),
    "a size is huge": entry("size", 10**400),
    "a hash is a number": entry("xxh3", 0),
    "a hash is a list": entry("xxh3", []),
    "a pipe": pipe,
    "a directory": directory,
    "a link to a device": link("/dev/zero"),
    "a link to itself": link("manifest.json"),
    "a terabyte": huge,
    "version 0": text(lambda folder: json.dumps(fields_of(folder)).encode(), b"0"),
    "version x": text(lambda folder: json.dumps(fields_of(folder)).encode(), b"x"),
}
LOADED = {
    "150 levels": state(DEEP),
    "400 levels": state(json.loads("[" * 400 + "]" * 400)),
    "the kind is a list": state({"x": {"!": []}}),
    "the kind is None": state({"x": {"!": None}}),
    "a tuple without items": state({"x": {"!": "tuple"}}),
    "items are a number": state({"x": {"!": "tuple", "v": 3}}),
    "keys are missing": state({"x": {"!": "dict", "v": [1]}}),
    "more keys than values": state({"x": {"!": "dict", "k": [1, 2], "v": [1]}}),
    "a key is a list": state({"x": {"!": "dict", "k": [[1]], "v": [1]}}),
    "a size is a text": state({"x": {"!": "Size", "v": ["2"]}}),
    "a float is a text": state({"x": {"!": "float", "v": "x"}}),
    "bytes are no base64": state({"x": {"!": "bytes", "v": "é"}}),
    "a part is no number": state({"x": {"!": "complex number", "v": ["1", "x"]}}),
    "a dtype is a number": state({"x": {"!": "dtype", "v": 3}}),
    "an array of objects": array("O"),
    "an array of text": array("<U99999999"),
    "an array of records": array("f4,f4"),
    "a module is a list": state({"x": {"!": "module", "v": []}}),
    "a group is a text": state({"x": OPTIMIZER}),
    "zero ranks": state({"x": {"!": "rng", "ranks": 0, "device": False}}),
    "a negative count": state({"x": {"!": "ema", "v": {}, "num_updates": -1, "options": {}}}),
    "an infinite float": replaced(b'"state": {', b'"state": {"y": 1e999, '),
    "a tensor in no file": state({"x": {"!": "tensor"}, "y": {"!": "tensor"}}),
}


@pytest.mark.parametrize("name", [*LISTED, *LOADED])
def test_one_bad_manifest_does_not_block_the_other_steps(tmp_path, name):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (LISTED | LOADED)[name](folder)
    second = faccel.checkpoint.checkpoints(tmp_path)[0]
    assert second.step == 2
    if name in LISTED:
        assert second.problem
        assert faccel.latest(tmp_path, ONE).step == 1
    assert loaded(tmp_path) == 1
    assert simulate(lambda ctx: loaded(tmp_path, ctx), 2) == (1, 1)
    with pytest.raises(CheckpointError, match=r"step 2 in .* is corrupt"):
        loaded(tmp_path, step=2)
    result = CliRunner().invoke(main, ["checkpoints", str(tmp_path)])
    assert result.exit_code == 1
    assert "CORRUPT" in result.output
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2


def test_each_kind_of_value_has_checks_of_its_fields():
    kinds = {kind for codec in CODECS for kind in codec.kinds}
    assert kinds == {*KINDS, "plain"}


# Foreign folders, and those of newer versions

FOREIGN = {
    "step-1700000000": ["notes.txt"],
    "step-000000007": ["model.pt"],
    "step-000000008": [],
    "step-000000009": ["manifest.json"],
    "step-000000010": ["shard-00001-model-00001-of-00001.safetensors"],
    ".tmp-step-notes": ["notes.txt"],
    ".tmp-step-": ["notes.txt"],
    ".tmp-step-2024-10": ["notes.txt"],
    ".tmp-step-old-data": ["notes.txt"],
    ".tmp-step-3-abcd": ["shard-00001.safetensors", "notes.txt"],
}


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_other_programs_are_left_alone(tmp_path, overwrite):
    for name, files in FOREIGN.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "step-000000011").write_text("a file")
    (tmp_path / ".tmp-step-4-abcd").symlink_to("step-000000007")
    before = entries(tmp_path)
    for step in (6, 7, 9, 10):
        save(tmp_path, step, keep=1, overwrite=overwrite)
        assert loaded(tmp_path) == step
        after = entries(tmp_path)
        assert {name: after.get(name, "gone") for name in before} == before
    assert faccel.latest(tmp_path, ONE).step == 10
    listed = {pathlib.Path(item.path).name for item in faccel.checkpoint.checkpoints(tmp_path)}
    assert listed >= {"step-000000009", "step-000000010-1"}
    assert not listed & {"step-1700000000", "step-000000007", "step-000000008", "step-000000011"}


def newer(folder):
    text(b'{"a format": "of the future"}', b"2")(folder)


def test_a_newer_format_is_an_error_and_not_corruption(tmp_path):
    save(tmp_path, 1)
    newer(save(tmp_path, 5))
    before = entries(tmp_path)
    calls = {
        "load": lambda ctx: loaded(tmp_path, ctx),
        "load that step": lambda ctx: loaded(tmp_path, ctx, step=5),
        "latest": lambda ctx: faccel.latest(tmp_path, ctx),
        "save": lambda ctx: faccel.save({}, tmp_path, ctx, step=5),
        "save below": lambda ctx: faccel.save({}, tmp_path, ctx, step=2, overwrite=True),
        "merge": lambda ctx: merge(str(tmp_path), str(tmp_path / "out"), ctx),
        "merge that folder": lambda ctx: merge(
            str(tmp_path / "step-000000005"), str(tmp_path / "out"), ctx
        ),
    }
    for name, call in calls.items():
        with pytest.raises(CheckpointError, match="newer version of faccel") as caught:
            call(ONE)
        assert "step=step" in caught.value.fix, name
        assert entries(tmp_path) == before
    assert loaded(tmp_path, step=1) == 1

    def on_two(ctx):
        with pytest.raises(CheckpointError, match="newer version of faccel"):
            loaded(tmp_path, ctx)
        return loaded(tmp_path, ctx, step=1)

    assert simulate(on_two, 2) == (1, 1)
    checkpoint = faccel.checkpoint.checkpoints(tmp_path)[0]
    assert (checkpoint.step, checkpoint.is_newer_format) == (5, True)
    assert checkpoint.problem == "version 2 of the format, this faccel reads 1"
    result = CliRunner().invoke(main, ["checkpoints", str(tmp_path)])
    assert (result.exit_code, "NEWER" in result.output) == (1, True)


def test_a_newer_format_below_the_step_is_kept(tmp_path):
    newer(save(tmp_path, 1))
    save(tmp_path, 2)
    save(tmp_path, 3, keep=1)
    assert loaded(tmp_path) == 3
    assert (tmp_path / "step-000000001").exists()
    assert not (tmp_path / "step-000000002").exists()


# What `save` refuses


def deep(depth, kind=list):
    value = 1
    for _ in range(depth):
        value = {"x": value} if kind is dict else kind([value])
    return value


@pytest.mark.parametrize("kind", [list, dict, tuple])
def test_what_is_nested_as_deeply_as_allowed_loads_and_deeper_values_are_refused(tmp_path, kind):
    value = deep(100, kind)
    faccel.save(value, tmp_path, ONE, step=1)
    assert faccel.load(value, tmp_path, ONE) == value
    for depth in (101, 150, 400, 900, 5000):
        with pytest.raises(CheckpointError, match="nested"):
            faccel.save(deep(depth, kind), tmp_path, ONE, step=2)
        with pytest.raises(CheckpointError, match="nested"):
            faccel.load(deep(depth, kind), tmp_path, ONE)
    assert steps(tmp_path) == [1]


BAD_METADATA = {
    "a list": [1],
    "a text": "accuracy",
    "a number": 3,
    "an object inside": {"a": object()},
    "a tensor": {"a": torch.ones(())},
    "a tensor in a list": {"a": [0, torch.ones(())]},
    "a number of numpy": {"a": np.float32(1)},
    "NaN": {"a": float("nan")},
    "an infinite number": {"a": -float("inf")},
    "bytes": {"a": b"x"},
    "a key that is no text": {1: "x"},
    "a key inside": {"a": {None: "x"}},
    "a set": {"a": {1}},
    "nesting": {"a": deep(200)},
    "a huge int": {"a": 10**5000},
}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_that_is_no_json_object_is_refused_before_anything_is_written(
    tmp_path, name, background
):
    def fn(ctx):
        for rank in (0, 1):
            metadata = BAD_METADATA[name] if ctx.rank == rank else {"a": 1}
            options = {"step": 1, "metadata": metadata, "background": background}
            with pytest.raises(CheckpointError, match="metadata"):
                faccel.save({"x": torch.ones(3)}, tmp_path / "runs", ctx, **options)
        return faccel.latest(tmp_path / "runs", ctx)

    assert simulate(fn, 2) == (None, None)
    assert not [file for file in (tmp_path / "runs").glob("*") if file.name != ".lock"]


def test_metadata_is_stored_as_it_was_at_the_call(tmp_path):
    metadata = {"a": (1, {"b": [None, True, 0.5, "é", np.float64(2)]})}
    expected = {"a": [1, {"b": [None, True, 0.5, "é", 2.0]}]}
    ctx = fake_context(0, 1)
    faccel.save({}, tmp_path, ctx, step=1, metadata=metadata, background=True)
    metadata["a"][1]["b"].append(object())
    assert faccel.latest(tmp_path, ctx).metadata == expected
    assert faccel.save({}, tmp_path, ctx, step=2, metadata={"a": (1,)}).metadata == {"a": [1]}


def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/runs-\xff")

    def fn(ctx):
        with pytest.raises(FaccelError, match="UTF-8"):
            faccel.save({"x": torch.ones(3)}, path, ctx, step=1)

    simulate(fn, 2)
    assert list(tmp_path.iterdir()) == []
    for call in (faccel.checkpoint.checkpoints, lambda bad: faccel.latest(bad, ONE)):
        with pytest.raises(ConfigError, match="null character"):
            call("runs\0")


REFUSED = {
    "a key that is not UTF-8": {"\udcff": torch.ones(1)},
    "an int of 5000 digits": {"x": 10**5000},
    "a negative one": [-(10**5000)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_save_refuses_what_load_cannot_read(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"UTF-8|could not read"):
        faccel.save(REFUSED[name], tmp_path, ONE, step=1)
    assert steps(tmp_path) == []


def test_tensors_under_keys_of_numpy_and_large_ints_load(tmp_path):
    state = {"x": {np.int64(1): torch.ones(1), (2, torch.float32): torch.zeros(1)}, "n": 10**4000}
    faccel.save(state, tmp_path, ONE, step=1)
    assert faccel.load({"x": None, "n": None}, tmp_path, ONE) == {
        "x": {1: torch.ones(1), (2, torch.float32): torch.zeros(1)},
        "n": 10**4000,
    }


# Slices


def sharded(ctx, size, dim=0):
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = torch.arange(float(size * 4)).view(size, 4)
    mesh = ctx.mesh.device_mesh
    return distribute_tensor(tensor, mesh, [Shard(dim)] * mesh.ndim)


@pytest.fixture
def slices(tmp_path):
    """Return a folder with a tensor and a model whose slices are in three files."""
    save(tmp_path, 1)

    def fn(ctx):
        net = nn.Linear(4, 6, bias=False)
        net.weight = nn.Parameter(sharded(ctx, 6))
        return faccel.save({"x": sharded(ctx, 6), "net": net}, tmp_path, ctx, step=2).path

    return pathlib.Path(simulate(fn, 3)[0])


def shard(folder, index):
    return sorted(folder.glob("*.safetensors"))[index]


def moved(offset):
    def change(folder):
        def move(sharding):
            for fields in sharding.values():
                fields["saved_offsets"] = offset

        with_sharding(shard(folder, 1), move)
        reseal(folder)

    return change


def changed(name, value):
    def change(folder):
        with_sharding(shard(folder, 1), lambda sharding: sharding["x"].update({name: value}))
        reseal(folder)

    return change


def without_shape(folder):
    for file in folder.glob("*.safetensors"):
        with_sharding(
            file, lambda sharding: [place.pop("full_shape") for place in sharding.values()]
        )
    without_file(folder, shard(folder, 1).name)


def text_of_sharding(folder):
    with_sharding(shard(folder, 1), lambda sharding: "[" * 100_000)
    reseal(folder)


INCOMPLETE = {
    "no first shard": lambda folder: without_file(folder, shard(folder, 0).name),
    "no middle shard": lambda folder: without_file(folder, shard(folder, 1).name),
    "no last shard": lambda folder: without_file(folder, shard(folder, 2).name),
    "no middle shard of an older version": without_shape,
    "a shard twice": moved([0, 0]),
    "a shard that overlaps": moved([1, 0]),
    "a shard outside": moved([5, 0]),
    "a shard far away": moved([2**40, 0]),
    "a huge offset": moved([2**70, 0]),
    "a negative offset": moved([-2, 0]),
    "one offset": moved([2]),
    "no offset": moved([]),
    "three offsets": moved([2, 0, 0]),
    "an offset is a text": moved(["2", 0]),
    "an offset is a bool": moved([2, False]),
    "an offset is a float": moved([2.0, 0]),
    "offsets are a text": moved("20"),
    "offsets are None": moved(None),
    "another full shape": changed("full_shape", [7, 4]),
    "a smaller full shape": changed("full_shape", [4, 4]),
    "a full shape of one dim": changed("full_shape", [24]),
    "a full shape of text": changed("full_shape", "x"),
    "deep nesting": text_of_sharding,
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_every_element_of_a_tensor_must_be_in_a_slice(slices, name):
    path = slices.parent
    assert (
        faccel.load({"x": None}, path, ONE)["x"].tolist() == torch.arange(24.0).view(6, 4).tolist()
    )
    INCOMPLETE[name](slices)
    net = nn.Linear(4, 6, bias=False)
    before = net.weight.detach().clone()
    for state in ({"x": None}, {"net": net}, {"net": None}):
        with pytest.raises(CheckpointError, match=r"step 2 in .* is corrupt"):
            faccel.load(state, path, ONE, step=2)
    assert torch.equal(net.weight, before)
    assert loaded(path) == 1
    with pytest.raises(CheckpointError, match="corrupt"):
        merge(str(slices), str(path / "out"), ONE)


def test_slices_that_overlap_and_cover_the_tensor_load(slices):
    whole = torch.arange(24.0).view(6, 4)
    from faccel.checkpoint.files import Slice, write_safetensors

    for index, (start, end) in enumerate(((0, 4), (1, 5), (2, 6))):
        file = shard(slices, index)
        file.unlink()
        piece = Slice("x", whole[start:end], (start, 0), (6, 4))
        write_safetensors(str(slices), file.name, [piece])
    fields = fields_of(slices)
    fields["state"].pop("net")
    write_fields(slices, fields)
    reseal(slices)
    assert torch.equal(faccel.load({"x": None}, slices.parent, ONE, step=2)["x"], whole)


def test_load_model_refuses_files_without_a_shard(slices):
    exported = slices.parent / "export"
    exported.mkdir()
    names = []
    for index in (0, 1, 2):
        names.append(f"model-{index + 1:05d}-of-00003.safetensors")
        shutil.copy(shard(slices, index), exported / names[-1])
    net = nn.Module()
    net.register_buffer("x", torch.zeros(6, 4))
    for folder, weight_map in ((exported, {str(i): name for i, name in enumerate(names[:1])}),):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"none has the element \[2, 0\]"):
            faccel.checkpoint.load_model(net, folder, ONE)
        for wrong in ({"weight_map": [1]}, [], {"weight_map": {"x": "../x.safetensors"}},
                      {"weight_map": {"x": 3}}, {"weight_map": {"x": ".."}}):  # fmt: skip
            index.write_text(json.dumps(wrong))
            with pytest.raises(CheckpointError, match="the index names no files"):
                faccel.checkpoint.load_model(net, folder, ONE)
    assert net.x.tolist() == torch.zeros(6, 4).tolist()


# Failures change nothing


class Meter:
    """An object whose `load_state_dict` may fail in the middle."""

    def __init__(self, *, fails=False):
        self.total, self.history, self.inner, self.fails = 0, [1, [2]], {"a": 1}, fails

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]
        self.history.append(3)
        self.history[1].append(4)
        self.inner["b"] = 2
        self.new = 1
        if self.fails:
            raise KeyError("not ours")


class Wrapper:
    """An object with another one inside, as a `SequentialLR` has schedulers."""

    def __init__(self, inner):
        self.inner = [inner]

    def state_dict(self):
        return {"inner": self.inner[0].state_dict()}

    def load_state_dict(self, state):
        self.inner[0].load_state_dict(state["inner"])


def program(ctx, value, *, fails=False):
    torch.manual_seed(value)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    opt = torch.optim.AdamW(net.parameters(), lr=0.1 * value)
    for _ in range(value):
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
    schedules = [
        torch.optim.lr_scheduler.LinearLR(opt),
        torch.optim.lr_scheduler.StepLR(opt, value),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(opt, schedules, milestones=[value])
    meter = Meter()
    meter.total = value
    return {
        "first": meter,
        "model": faccel.wrap(net, ctx),
        "opt": opt,
        "schedule": schedule,
        "inside": Wrapper(Meter()),
        "last": Meter(fails=fails),
    }


def described(value, seen=()):
    """Return the attributes of objects as text, with the values of tensors."""
    if isinstance(value, torch.Tensor):
        return repr((value.dtype, value.tolist()))
    if isinstance(value, dict):
        return {str(key): described(child, seen) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(child, seen) for child in value]
    if hasattr(value, "load_state_dict") and not any(value is other for other in seen):
        if isinstance(value, (nn.Module, torch.optim.Optimizer)) or hasattr(value, "module"):
            return described(dict(value.state_dict()), (*seen, value))
        return described(vars(value), (*seen, value))
    return repr(value) if isinstance(value, (int, float, str, type(None))) else type(value).__name__


class Same:
    """Equal to one object only."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value is other

    __hash__ = None


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_an_object_that_fails_to_load_leaves_every_other_one_unchanged(tmp_path, failing_rank):
    def fn(ctx):
        faccel.save(program(ctx, 3), tmp_path, ctx, step=1)
        state = program(ctx, 1, fails=ctx.rank == failing_rank)
        before = described(state)
        averages = [Same(entry["exp_avg"]) for entry in state["opt"].state.values()]
        with pytest.raises(CheckpointError, match="KeyError"):
            faccel.load(state, tmp_path, ctx)
        assert described(state) == before
        assert [entry["exp_avg"] for entry in state["opt"].state.values()] == averages
        faccel.load(program(ctx, 1), tmp_path, ctx)
        return True

    assert simulate(fn, 2) == (True, True)


def test_a_value_that_cannot_be_built_leaves_the_model_unchanged(tmp_path):
    @attrs.frozen
    class Positive:
        x: int = attrs.field(validator=attrs.validators.gt(0))

    folder = pathlib.Path(
        faccel.save({"net": nn.Linear(1, 1), "p": Positive(1)}, tmp_path, ONE, step=1).path
    )
    fields = fields_of(folder)
    fields["state"]["p"]["v"]["x"] = 0
    write_fields(folder, fields)
    net = nn.Linear(1, 1)
    before = net.weight.detach().clone()
    with pytest.raises(CheckpointError):
        faccel.load({"net": net, "p": Positive(1)}, tmp_path, ONE)
    assert torch.equal(net.weight, before)


def test_the_version_of_a_module_of_another_type_leaves_all_models_unchanged(tmp_path):
    folder = pathlib.Path(
        faccel.save([nn.Linear(1, 1), nn.BatchNorm1d(1)], tmp_path, ONE, step=1).path
    )
    fields = fields_of(folder)
    fields["state"][1]["versions"][""] = "2"
    write_fields(folder, fields)
    state = [nn.Linear(1, 1), nn.BatchNorm1d(1)]
    before = state[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match="version"):
        faccel.load(state, tmp_path, ONE)
    assert torch.equal(state[0].weight, before)


# Paths


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    net = nn.Linear(1, 1)
    saved = faccel.save({"net": net}, "~/runs", ONE, step=1)
    assert saved.path == str(tmp_path / "runs" / "step-000000001")
    assert faccel.latest("~/runs", ONE) == faccel.checkpoint.checkpoints(pathlib.Path("~/runs"))[0]
    faccel.load({"net": net}, "~/runs", ONE)
    faccel.checkpoint.export_model(net, "~/export", ONE)
    faccel.checkpoint.load_model(net, "~/export", ONE)
    faccel.checkpoint.save_object(1, "~/x.pt", ONE)
    merge("~/runs", "~/merged", ONE)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"runs", "export", "x.pt", "merged"}
    with pytest.raises(ConfigError, match="unknown user") as caught:
        faccel.save({}, "~unknown-user/runs", ONE, step=1)
    assert "./~unknown-user/runs" in caught.value.fix
    faccel.save({}, "./~unknown-user/runs", ONE, step=1)
