"""Draws odd values, keys and texts: what a user, another program or an attacker could write."""

import datetime
import json

import yaml

FIELDS = {
    "mixed_precision": ["no", "bf16", "fp16", "fp8", "bf16-true", "fp16-true"],
    "grad_accum": [1, 2, 4],
    "seed": [0, 7, 2**63],
    "device": ["cpu"],
    "mesh": ["dp_replicate=-1", {"dp_shard": -1}, "tp=1"],
    "strategy": [None],
    "zero": [None, 0, 3],
    "plan": [{"units": "A", "fsdp": {"prefetch": 1}}, "units=[A,B],tensor.a.*=colwise", {}],
    "cp_layout": ["head-tail"],
    "compile": ["units", {"mode": "max-autotune"}, "what=units,options.x=1"],
    "matmul_precision": ["high"],
    "deterministic": [False],
    "comm_backend": ["gloo"],
    "start_timeout_s": [1, 600.0],
    "device_placement": [True, False],
    "debug": [True, False],
    "run_dir": ["runs", "a/b"],
    "timeout_s": [1, 600.0],
}
AXES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
PAYLOADS = (
    "!!python/object/apply:os.system ['touch PWNED']",
    "!!python/object/new:subprocess.Popen [['touch', 'PWNED']]",
    "$(touch PWNED)",
    "`touch PWNED`",
    "__import__('os').system('touch PWNED')",
    "{{ ''.__class__ }}",
    "%s%s%s%n",
    "../../../../tmp/PWNED",
    "; touch PWNED #",
)
TEXTS = (
    *PAYLOADS,
    *("", " ", "no", "NO", "null", "~", "true", "yes", "off", "1", "0", "-1", "1_0", "0x10", "1e5"),
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "9" * 30,
        "9" * 5000,
        "\uff11",
        "²",
        "auto",
        "cpu",
        "gpu",
        "cuda",
    ),
    *("cuda:1", "cuda:99999999999999999999", "cpu:0", "cpu:-1", "meta", "mps", "xla", "cuda:", ":"),
    *("dp_shard=2", "dp_shard=-1,tp=2", "tp=2,tp=2", "tp", "=", ",", "tp=", "=2", "tp=1.5", "pp=0"),
    *("tp=-1,pp=-1", "tp=" + "9" * 100, "bf16", "fp16", "fp8", "deepspeed", "s3://bucket/run"),
    *("file:///etc/passwd", "/dev/zero", "/dev/stdin", "a\0b", "a\nb", "\r\n", "\x1b[2J", "\x7f"),
    *("é", "😀", "\u2028", "\u202e", "\ufeff", "\udcff", "\ud800", "x" * 3000, "#", "a: b", "- a"),
    *("'", '"', '"""', "\\", "[", "{", "]]", "*a", "&a", "!x", "%YAML", "---", "...", "<<", "@"),
)
NUMBERS = (
    *(
        0,
        1,
        2,
        3,
        -1,
        -2,
        4,
        2**31,
        2**32,
        2**63,
        2**64,
        2**64 + 1,
        10**30,
        1 << 5000,
        1 << 100_000,
    ),
    *(-(1 << 20_000), 0.0, -0.0, 0.5, 1.0, 2.5, 1e9, 1e10, 1e300, -1e300, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), True, False),
)
OTHERS = (
    None,
    b"",
    b"\xff\0",
    datetime.date(2001, 1, 1),
    datetime.datetime(2001, 1, 1, 1),
    (),
    (1, 2),
    frozenset({1}),
    1j,
    ...,
    int,
    len,
)


class Hostile:
    """Raises from every method that a check or a message might call."""

    def _raise(self, *args):
        raise RuntimeError("hostile")

    __repr__ = __str__ = __eq__ = __bool__ = __len__ = __iter__ = __int__ = __float__ = _raise
    __hash__ = object.__hash__


def bomb(draw):
    value = draw.choice([0, "x", {"tp": 1}])
    for _ in range(draw.choice([2, 8, 30])):
        value = [value] * 10 if draw.random() < 0.7 else {"a": value, "b": value}
    return value


def scalar(draw):
    return draw.choice(draw.choice([TEXTS, NUMBERS, TEXTS, OTHERS]))


def value(draw, depth=3):
    """Return any value, nested at most `depth` levels; a bomb has a few objects only."""
    kind = draw.random()
    if kind < 0.7 or depth == 0:
        return scalar(draw)
    if kind < 0.73:
        return bomb(draw)
    if kind < 0.75:
        return Hostile()
    if kind < 0.85:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {key(draw): value(draw, depth - 1) for _ in range(draw.randrange(4))}


def plain(draw, depth=3):
    """Return a value that a file of every format can contain."""
    kind = draw.random()
    if kind < 0.75 or depth == 0:
        drawn = scalar(draw)
        while not isinstance(drawn, str | int | float | None):
            drawn = scalar(draw)
        if isinstance(drawn, int) and drawn.bit_length() > 10_000:
            return 3
        return drawn
    if kind < 0.87:
        return [plain(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {name(draw): plain(draw, depth - 1) for _ in range(draw.randrange(4))}


def name(draw):
    """Return a key: of a field, nearly of one, of an axis, or odd."""
    kind = draw.random()
    if kind < 0.6:
        return draw.choice([*FIELDS, "nproc"])
    if kind < 0.75:
        word = draw.choice([*FIELDS])
        position = draw.randrange(len(word))
        return word[:position] + draw.choice(["", "x", "_", "é"]) + word[position + 1 :]
    if kind < 0.9:
        return draw.choice(AXES)
    return draw.choice(TEXTS)


def key(draw):
    """Return a key of a mapping in Python, of any type that can be hashed."""
    if draw.random() < 0.85:
        return name(draw)
    drawn = scalar(draw)
    while isinstance(drawn, list | dict | set):
        drawn = scalar(draw)
    return drawn


def settings(draw, odd=plain):
    """Return fields with mostly valid values."""
    mapping = {}
    for _ in range(draw.randrange(1, 5)):
        field = draw.choice([*FIELDS])
        mapping[field] = draw.choice(FIELDS[field])
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2])):
        mapping[name(draw)] = odd(draw)
    return mapping


YAML_PARTS = (
    *PAYLOADS,
    *("a: &a [1, 2]\n", "*a", "<<: *a\n", "&b {tp: 1}", "<<: [*a, *a]\n", "!!set {a}", "!!omap []"),
    *(
        "!!binary aGk=",
        "!!timestamp x",
        "!!int x",
        "!!float .",
        "!!bool maybe",
        "!x y",
        "? [1]\n: 2",
    ),
    *("---\n", "...\n", "%YAML 9.9\n", "%TAG ! x\n", "|\n  x\n", ">-\n x\n", "\t", "\r\n", "# x\n"),
    *("{a: b", "[[[[", "- - -", ": ", "'", '"', "0x1F", "0o7", "1:2:3", "2001-01-01", "=", ".inf"),
    *("&a [*a]", "0x" + "f" * 4000, "é: ü\n", "\x85", "\u2028", "\0", "\x07"),
)
TOML_PARTS = (
    *(
        "[a]\n",
        "[[a]]\n",
        "[a.b]\n",
        "a.b.c = 1\n",
        "a = {b = 1}\n",
        "a = [1,\n",
        '"""',
        "'''",
        "\\u00",
    ),
    *(
        "1979-05-27T07:32:00Z",
        "0xff",
        "inf",
        "nan",
        "a" + ".a" * 300 + " = 1\n",
        "= 1\n",
        "\0",
        "\x7f",
    ),
)
JSON_PARTS = (
    *(
        "NaN",
        "-Infinity",
        "1e999",
        "[[[[",
        "]",
        "}",
        "{",
        ",",
        '"a": 1',
        "\\ud800",
        "\\u0000",
        "/* */",
    ),
    *("null", "true", "9" * 5000, "[" * 2000, "'", "\0"),
)


def as_toml(mapping):
    """Write a mapping as TOML without care: odd keys and values make invalid files."""
    lines = []
    for field, item in mapping.items():
        if isinstance(item, dict):
            lines += [f"{field}.{axis} = {json.dumps(x)}" for axis, x in item.items()]
        else:
            lines.append(f"{field} = {json.dumps(item)}")
    return "\n".join(lines) + "\n"


def mutated(draw, text, parts):
    """Return a text with pieces removed, repeated, replaced or inserted."""
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2, 5])):
        start = draw.randrange(len(text) + 1)
        stop = min(len(text), start + draw.choice([0, 1, 3, 20]))
        piece = draw.choice([draw.choice(parts), text[start:stop] * 2, "", draw.choice(TEXTS)])
        text = text[:start] + piece + text[stop:]
    return text


def document(draw, mapping):
    """Return the suffix and the bytes of a file with `mapping`, more or less."""
    suffix = draw.choice([".yaml", ".yaml", ".yml", ".toml", ".json"])
    if suffix == ".toml":
        text, parts = as_toml(mapping), TOML_PARTS
    elif suffix == ".json":
        text, parts = json.dumps(mapping, indent=draw.choice([None, 2])), JSON_PARTS
    else:
        text, parts = yaml.safe_dump(mapping, allow_unicode=draw.random() < 0.5), YAML_PARTS
        if draw.random() < 0.2:  # not quoted, as `safe_dump` would
            part = draw.choice(draw.choice([PAYLOADS[:2], parts]))
            text += f"{draw.choice([name(draw), 'x'])}: {part}\n"
    text = mutated(draw, text, parts)
    if draw.random() < 0.01:
        text *= draw.choice([10, 300])
    encoding = draw.choice(["utf-8"] * 17 + ["utf-16", "latin-1", "utf-8-sig"])
    data = text.encode(encoding, errors=draw.choice(["replace", "ignore"]))
    if data and draw.random() < 0.1:
        data = bytearray(data)
        for _ in range(draw.choice([1, 3])):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return suffix, bytes(data)
