"""Seeded mutations of the folder of a checkpoint: of its bytes, its JSON, and its entries."""

import json
import os
import struct

import xxhash

# What replaces a value of JSON. Each is wrong for most fields, and some are wrong for all.
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e300,
    float("nan"), float("inf"), "", "x", "../x", "../../etc/passwd", "/etc/passwd", "nan",
    "\udcff", "\0", "os.system", "float32", "_dynamo", "O", "U99999999", "é" * 300, [], {}, [None],
    [0], [-1], [2**62, 2**62], [[[]]], {"!": "tensor"}, {"!": "list", "v": []}, {"!": []},
    {"!": "module", "v": {}}, {"!": "unknown"}, {"!": "set", "v": [[]]}, {"!": "rng", "ranks": 0},
    {"!": "record", "class": "Cursor", "own": True, "v": {"epoch": "x"}}, {"!": "float", "v": "x"},
    {"!": "dict", "k": [[1]], "v": [1]}, {"!": "bits", "dtype": "float32"}, {"a": 1},
)  # fmt: skip
KINDS = (
    "tensor", "complex", "bits", "array", "tuple", "list", "set", "Size", "dict", "OrderedDict",
    "Counter", "record", "module", "optimizer", "stateful", "rng", "ema", "per_rank", "wrapper",
    "tensordict", "float", "bytes", "complex number", "dtype", "device", "plain", "unknown",
)  # fmt: skip
DEPTHS = (2, 50, 99, 101, 150, 400, 2000, 100_000)
NESTINGS = (("[", "]"), ('{"a":', "}"), ('{"!":"tuple","v":[', "]}"))


def places(tree):
    """Return the container and the key of each value inside of a JSON value."""
    found = []
    stack = [tree]
    while stack:
        container = stack.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, child in list(items):
            found.append((container, key))
            if isinstance(child, (dict, list)):
                stack.append(child)
    return found


def copied(value):
    return json.loads(json.dumps(value))


def rename(container, key, draw):
    if isinstance(container, dict):
        container[draw.choice(("", "!", "x", "../x", f"{key}x"))] = container.pop(key)


def change_kind(container, key, draw):
    if isinstance(container[key], dict):
        container[key]["!"] = draw.choice(KINDS)


def repeat(container, key, draw):
    if isinstance(container, list):
        container.append(copied(container[key]))


def shift(container, key, draw):
    if isinstance(container[key], (int, float)):
        container[key] += draw.choice((-1, 1, 0.5, 2**20, 2**70))


def replace(container, key, draw):
    container[key] = copied(draw.choice(VALUES))


def delete(container, key, draw):
    del container[key]


def mutate_json(tree, draw):
    """Change a JSON value in place at one to three places."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        candidates = places(tree)
        if not candidates:
            return
        container, key = draw.choice(candidates)
        change = draw.choice((rename, change_kind, repeat, shift, replace, replace, delete, None))
        if change is None:  # a value from another place
            other, other_key = draw.choice(candidates)
            container[key] = copied(other[other_key])
        else:
            change(container, key, draw)


def nested(draw):
    """Return the text of a deeply nested JSON value."""
    depth = draw.choice(DEPTHS)
    opening, closing = draw.choice(NESTINGS)
    return opening * depth + "1" + closing * depth


def flip(data, draw):
    """Return bytes with one change: of a bit or a run, a cut, an insertion or a removal."""
    data = bytearray(data)
    index = draw.randrange(len(data) + 1)
    kind = draw.randrange(6)
    if kind == 0 and data:
        data[min(index, len(data) - 1)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[index : index + draw.randrange(1, 9)] = draw.randbytes(draw.randrange(9))
    elif kind == 2:
        del data[index:]
    elif kind == 3:
        data[index:index] = draw.choice((b"\0", b"\xff", b"{", b"]", b'"', b"\n", b"9" * 5000))
    elif kind == 4:
        del data[index : index + draw.randrange(1, 100)]
    else:
        start = draw.randrange(len(data) + 1)
        data[index:index] = data[start : start + draw.randrange(200)]
    return bytes(data)


def sealed(body, version=b"1"):
    """Return a manifest with a valid hash."""
    digest = xxhash.xxh3_128(body).hexdigest().encode()
    return b"faccel checkpoint " + version + b" " + digest + b"\n" + body


def fields_of(folder):
    """Return the fields of the manifest of a folder."""
    return json.loads((folder / "manifest.json").read_bytes().partition(b"\n")[2])


def write_fields(folder, fields):
    """Write a manifest with a valid hash."""
    (folder / "manifest.json").write_bytes(sealed(json.dumps(fields).encode() + b"\n"))


def reseal(folder, change=lambda fields: None):
    """Write the manifest of a folder with the sizes and hashes that its files have now."""
    fields = fields_of(folder)
    change(fields)
    for entry in fields["files"]:
        data = (folder / entry["name"]).read_bytes()
        entry |= {"size": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
    write_fields(folder, fields)


def without_file(folder, name):
    """Remove a file, also from the manifest."""
    fields = fields_of(folder)
    fields["files"] = [entry for entry in fields["files"] if entry["name"] != name]
    (folder / name).unlink()
    write_fields(folder, fields)


def with_header(data, change):
    """Return the bytes of a safetensors file with a changed header, a text."""
    (size,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def with_sharding(file, change):
    """Change where the slices of a safetensors file belong."""

    def change_header(text):
        header = json.loads(text)
        sharding = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        new = change(sharding)
        if not isinstance(new, str):
            new = json.dumps(sharding)
        header["__metadata__"]["DCP_SHARDING_INFO"] = new
        return json.dumps(header).encode()

    file.write_bytes(with_header(file.read_bytes(), change_header))


# Mutations of a folder.


def raw_bytes(folder, draw):
    """Change the bytes of a file; its hash does not fit."""
    file = draw.choice(sorted(folder.iterdir()))
    file.write_bytes(flip(file.read_bytes(), draw))


def manifest_json(folder, draw):
    """Change fields of the manifest, with a valid hash."""
    fields = fields_of(folder)
    mutate_json(fields if draw.random() < 0.3 else fields["state"], draw)
    write_fields(folder, fields)


def manifest_text(folder, draw):
    """Change the text of the manifest, with a valid hash."""
    path = folder / "manifest.json"
    body = path.read_bytes().partition(b"\n")[2]
    kind = draw.randrange(3)
    if kind == 0:
        body = flip(body, draw)
    elif kind == 1:  # one value becomes a deep one
        fields = json.loads(body)
        container, key = draw.choice(places(fields))
        container[key] = "@"
        body = json.dumps(fields).replace('"@"', nested(draw)).encode() + b"\n"
    else:  # a field twice
        body = body.replace(b"{", b'{"step":1,"state":{},"files":[],"v":1,"!":"tuple",', 1)
    path.write_bytes(sealed(body, draw.choice((b"1", b"1", b"1", b"0", b"2", b"x"))))


def header(folder, draw):
    """Change the header of a safetensors file, with valid hashes."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    kind = draw.randrange(4)
    if kind == 0:
        with_sharding(file, lambda sharding: mutate_json(sharding, draw))
    elif kind == 1:
        with_sharding(file, lambda sharding: nested(draw))
    elif kind == 2:

        def change(text):
            fields = json.loads(text)
            mutate_json(fields, draw)
            return json.dumps(fields).encode()

        file.write_bytes(with_header(file.read_bytes(), change))
    else:
        file.write_bytes(with_header(file.read_bytes(), lambda text: flip(text, draw)))
    reseal(folder)


def shard_bytes(folder, draw):
    """Change the bytes of a safetensors file, with valid hashes."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    file.write_bytes(flip(file.read_bytes(), draw))
    reseal(folder)


def removed_file(folder, draw):
    """Remove a file, also from the manifest."""
    without_file(folder, draw.choice(sorted(folder.glob("*.safetensors"))).name)


def exchanged_files(folder, draw):
    """Write the content of a file into another one, or exchange them; with valid hashes."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    data = first.read_bytes()
    if draw.random() < 0.5:
        first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    reseal(folder)


def linked_file(folder, draw):
    """Replace a file by a link."""
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    file.symlink_to(draw.choice(("/etc/passwd", "../../outside.txt", "/dev/zero", file.name, "x")))


def no_file(folder, draw):
    """Replace a file by a folder or a pipe."""
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    if draw.random() < 0.5:
        file.mkdir()
    else:
        os.mkfifo(file)


def linked_folder(folder, draw):
    """Replace the folder by a link."""
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(draw.choice(("elsewhere", "missing", folder.name, "/")))


def renamed_file(folder, draw):
    """Rename a file, also in the manifest."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    file.rename(folder / "shard.safetensors")

    def change(fields):
        for entry in fields["files"]:
            if entry["name"] == file.name:
                entry["name"] = "shard.safetensors"

    reseal(folder, change)


LAST = (linked_file, no_file, linked_folder)  # the others could not read what these leave
MUTATIONS = (
    raw_bytes, raw_bytes, raw_bytes, manifest_json, manifest_json, manifest_json, manifest_json,
    manifest_json, manifest_json, manifest_text, manifest_text, header, header, header, shard_bytes,
    removed_file, exchanged_files, renamed_file, *LAST,
)  # fmt: skip


def mutate(folder, draw):
    """Change a folder of a checkpoint in one or two ways; return the names of the mutations."""
    names = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        mutation = draw.choice(MUTATIONS)
        names.append(mutation.__name__)
        try:
            mutation(folder, draw)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            OSError,
            RecursionError,
            struct.error,
        ):
            break  # it does not fit what the first one has left
        if mutation in LAST:
            break
    return names
