"""Configuration files that are huge, no files, not text, or made to break a parser."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

import faccel
from faccel.backends.deepspeed.settings import read_settings
from faccel.checks import local_path
from faccel.cli.commands import main
from faccel.config import LAUNCH
from faccel.config_file import ConfigFile, find, read, read_accelerate
from faccel.config_sources import resolve
from faccel.errors import ConfigError, nearest, short_repr, short_text
from faccel.launching.import_accelerate import from_accelerate
from faccel.launching.spec import LaunchSpec
from faccel.mesh import MeshSpec
from faccel.parallel import DeepSpeedConfig
from faccel.small_file import MAX_BYTES
from tests.unit.test_config import VALUES as FIELDS

VALID = {name: value for name, (_, value) in FIELDS.items()}
ODD_KINDS = (
    "FIFO",
    "folder",
    "socket",
    "device",
    "endless device",
    "1 MB",
    "not UTF-8",
    "link to a FIFO",
)
MAX_MESSAGE = 4000  # characters: the longest list of allowed names


@pytest.fixture(autouse=True)
def limit():
    """End a test that blocks in `open` or expands without end."""

    def fail(number, frame):
        raise TimeoutError("blocked")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def bomb(levels, width=10):
    """Return lists of lists of ... of 0 without copies: `width ** levels` values in one list."""
    value = 0
    for _ in range(levels):
        value = [value] * width
    return value


def yaml_bomb(key, levels=9, width=10):
    """Return a YAML text of some 400 bytes whose `key` has `width ** levels` values."""
    lines = ["a0: &a0 0"]
    for level in range(levels):
        aliases = ", ".join([f"*a{level}"] * width)
        lines.append(f"a{level + 1}: &a{level + 1} [{aliases}]")
    return "\n".join([*lines, f"{key}: *a{levels}", ""])


HUGE = bomb(30)
LONG = "x" * 10**7
# Values that a message cannot print as they are: endless, long, with control characters.
VALUES = {
    "a bomb": HUGE,
    "a bomb in a mapping": {"x": HUGE, "y": {"z": HUGE}},
    "a long text": LONG,
    "a huge int": 1 << 10**6,
    "a huge negative int": -(1 << 10**6),
    "a long list": [0] * 10**6,
    "control characters": "\x1b[2J\nseed: 1\r" * 20,
    "surrogates": "\udcff" * 500,
    "bytes": b"\0" * 10**6,
}


def check_message(error):
    text = str(error)
    assert len(text) < MAX_MESSAGE, text[:500]
    assert error.fix
    for character in ("\x1b", "\r", "\udcff"):
        assert character not in text
    assert text.count("\n") == 1  # before the fix


@pytest.mark.parametrize("what", VALUES)
@pytest.mark.parametrize("name", VALID)
def test_a_message_shortens_the_value_of_every_field_from_every_source(name, what):
    value = VALUES[what]
    if name in ("run_dir", "device", "comm_backend") and isinstance(value, str):
        value = {"not": value}
    for options in (
        {"overrides": {name: value}},
        {"config": {name: value}},
        {"file": ConfigFile("x.yaml", {name: value})},
        {"file": ConfigFile("x.yaml#" + LONG, {name: value}, {name: 3})},
        {"overrides": {"mesh": {name: value}}},
        {"overrides": {"mesh": {"tp": value}}},
        {"config": {LONG: value}},
        {"config": {"x\x1b": value}},
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(**options)
        check_message(caught.value)
    # a weak source may be wrong: its value is a part of the explanation only
    replaced = resolve(file=ConfigFile("x.yaml", {name: value}), overrides={name: VALID[name]})
    assert len(replaced.explain()) < MAX_MESSAGE


@pytest.mark.parametrize("what", [what for what, value in VALUES.items() if isinstance(value, str)])
def test_a_message_shortens_the_text_of_a_variable_and_of_a_flag(what):
    text = VALUES[what]
    for name in ("grad_accum", "mesh", "mixed_precision", "timeout_s", "debug", "zero", "strategy"):
        with pytest.raises(ConfigError) as caught:
            resolve(env={f"FACCEL_{name.upper()}": text})
        check_message(caught.value)
        out = CliRunner().invoke(main, ["launch", f"--{name.replace('_', '-')}={text}", "x.py"])
        assert (out.exit_code, len(out.output) < MAX_MESSAGE, out.exception.__class__) == (
            2,
            True,
            SystemExit,
        )
    for env in ({f"FACCEL_{text}": "1"}, {"FACCEL_X": text}, {LAUNCH: text}):
        with pytest.raises(ConfigError) as caught:
            resolve(env=env)
        check_message(caught.value)


def test_names_and_values_in_messages_are_short_for_every_kind_of_value():
    for value in VALUES.values():
        assert len(short_repr(value)) <= 250
        assert len(short_text(value)) <= 310
        assert short_text(value).isprintable()
    names = [f"{index}-{LONG[:1000]}" for index in range(1000)]
    for word in VALUES.values():
        assert len(nearest(word, names)) < 60 * 320

    class Broken:
        def __repr__(self):
            raise KeyError

    assert "Broken" in short_repr(Broken())
    assert short_repr({"b": 1}) == "{'b': 1}"


@pytest.mark.parametrize(
    "text",
    [
        yaml_bomb("seed"),
        yaml_bomb("mesh"),
        yaml_bomb("other"),
        # merge keys: PyYAML copies the pairs of each merged mapping
        "".join(
            ["a0: &a0 {x: 1, y: 2}\n"]
            + [
                f"a{level + 1}: &a{level + 1} {{<<: [{', '.join([f'*a{level}'] * 10)}]}}\n"
                for level in range(9)
            ]
        ),
        "seed: &a [*a]\n",
        "&a seed: {x: &b [*b]}\n",
        "seed: [" + "0, " * 400_000 + "0]\n",
        "seed: " + "[" * 5000 + "]" * 5000 + "\n",
        "seed: " + "[" * 100 + "]" * 100 + "\n",
        "seed: 0x1" + "0" * 5000 + "\n",
        "0x1" + "0" * 5000 + ": 1\n",
        "? [1, 2]\n: 3\n",
        "seed: !!python/object/apply:os.system ['true']\n",
        "seed: [2001-01-01]\n",
        "".join(f"key{index}: 1\n" for index in range(60_000)),
    ],
    ids=lambda text: f"{text[:30]!r}, {len(text)} bytes",
)
def test_a_yaml_file_that_expands_is_an_error(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    calls = (
        lambda: faccel.init(str(path), env={}),
        lambda: faccel.init(env={"FACCEL_CONFIG": str(path)}),
        lambda: from_accelerate(read_accelerate(str(path))),
    )
    if len(text) > 100_000:  # takes a second
        calls = calls[:1]
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        check_message(caught.value)


def test_aliases_within_the_limit_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("own: &m {tp: 1, dp_replicate: 1}\nfaccel:\n  mesh: *m\n  seed: 3\n")
    assert read(f"{path}#faccel").values == {"mesh": {"tp": 1, "dp_replicate": 1}, "seed": 3}
    path.write_text("a: &a {seed: 3}\nfaccel:\n  <<: *a\n  debug: true\n")
    assert read(f"{path}#faccel").values == {"seed": 3, "debug": True}


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", "[" * 100_000),
        (".json", '{"seed": ' + "[" * 900 + "]" * 900 + "}"),
        (".json", '{"seed": 1' + "0" * 5000 + "}"),
        (".json", '{"seed": NaN}'),
        (".json", '{"seed": "\\ud800"}'),
        (".toml", "a" + ".a" * 400_000 + " = 1"),
        (".toml", "[a" + ".a" * 400_000 + "]"),
        (".toml", "seed = " + "[" * 5000),
        (".toml", "seed = 0x1" + "0" * 5000),
        (".toml", "[[seed]]\n" * 1000),
        (".toml", "seed = " + "x" * 900_000),  # a search for long keys takes linear time
    ],
    ids=lambda text: text[:20],
)
def test_a_toml_or_json_file_that_breaks_a_parser_is_an_error(tmp_path, suffix, text):
    path = tmp_path / f"a{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        faccel.init(str(path), env={})
    check_message(caught.value)


def readers(path, tmp_path):
    """Yield each way to read a configuration file, as a function that raises or exits."""
    yield lambda: faccel.init(str(path), env={})
    yield lambda: faccel.init(env={"FACCEL_CONFIG": f"{path}#faccel"})
    yield lambda: read_accelerate(str(path))
    home = tmp_path / "home" / "faccel"
    home.mkdir(parents=True, exist_ok=True)
    link = home / "config.yaml"
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    yield lambda: faccel.init(env={"XDG_CONFIG_HOME": str(tmp_path / "home")})
    yield lambda: faccel.launch(len, config=str(path), num_processes=1)
    yield lambda: LaunchSpec(command=("x.py",), config=str(path)) and read(str(path))


COMMANDS = (
    ["config", "check", "{path}"],
    ["config", "show"],
    ["config", "set", "seed=1"],
    ["config", "import", "{path}", "-o", "{out}"],
    ["launch", "--config", "{path}", "x.py"],
    ["env"],
)


@pytest.fixture
def odd(tmp_path):
    """Return paths with the suffix of a configuration that are no small regular file."""
    paths = {}
    for kind in ODD_KINDS:
        paths[kind] = tmp_path / f"{kind.replace(' ', '-')}.yaml"
    os.mkfifo(paths["FIFO"])
    paths["folder"].mkdir()
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(paths["socket"]))
    paths["device"].symlink_to("/dev/tty")
    paths["endless device"].symlink_to("/dev/zero")
    paths["1 MB"].write_text("seed: 1\n" + "#" * (MAX_BYTES - 7))
    paths["not UTF-8"].write_bytes(b"run_dir: \xff\xfe\n")
    paths["link to a FIFO"].symlink_to(paths["FIFO"])
    yield paths
    server.close()


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_what_is_no_small_file_of_text_is_refused_without_waiting(odd, tmp_path, kind):
    path = odd[kind]
    before = sorted(os.listdir(tmp_path))
    for call in readers(path, tmp_path):
        with pytest.raises(ConfigError) as caught:
            call()
        check_message(caught.value)
    for words in COMMANDS:
        words = [word.format(path=path, out=tmp_path / "out.yaml") for word in words]
        out = CliRunner(env={"FACCEL_CONFIG": str(path)}).invoke(main, words)
        assert out.exit_code in (1, 2), out.output
        assert isinstance(out.exception, SystemExit), out.exception
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "home"])  # nothing was written


def test_a_file_of_exactly_1_mb_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\n" + "#" * (MAX_BYTES - 8))
    assert path.stat().st_size == MAX_BYTES == 1_000_000
    assert read(str(path)).values == {"seed": 1}


# Texts with a key twice: the key, and the lines with it. PyYAML and `json` take the last value.
TWICE = {
    "yaml": ("a.yaml", "seed: 1\nrun_dir: a\nseed: 2\n", "seed", "1, 3"),
    "yaml, number and text": ("a.yaml", "1: a\n'1': b\n", "1", "1, 2"),
    "yaml, nested": ("a.yaml", "mesh:\n  tp: 2\n  tp: 4\n", "tp", "2, 3"),
    "yaml, one line": ("a.yaml", "mesh: {tp: 2, tp: 4}\n", "tp", "1, 1"),
    "yaml, in a list": ("a.yaml", "x:\n- a: 1\n  a: 1\n", "a", "2, 3"),
    "json": ("a.json", '{"seed": 1,\n"run_dir": "a",\n"seed": 2}', "seed", "1, 3"),
    "json, nested": ("a.json", '{"mesh":\n{"tp": 2,\n"tp": 4}}', "tp", "2, 3"),
}


@pytest.mark.parametrize("kind", TWICE)
def test_a_key_that_occurs_twice_is_an_error(tmp_path, kind):
    name, text, key, lines = TWICE[kind]
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"the key `{key}` occurs twice") as caught:
        read(str(tmp_path / name))
    assert caught.value.got == f"it on the lines {lines}"
    check_message(caught.value)


def test_toml_and_the_settings_of_deepspeed_refuse_a_key_that_occurs_twice(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("seed = 1\nseed = 2\n")
    with pytest.raises(ConfigError, match="line 2"):
        read(str(path))
    path = tmp_path / "ds.json"
    path.write_text('{"steps_per_print": 1,\n"steps_per_print": 2}')
    with pytest.raises(ConfigError, match=r"steps_per_print.* lines 1, 2"):
        read_settings(DeepSpeedConfig(settings=str(path)))


def test_a_merged_mapping_and_equal_keys_of_different_mappings_are_no_duplicates(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &a\n  seed: 1\nfaccel:\n  <<: *a\n  seed: 2\n")
    assert read(f"{path}#faccel").values == {"seed": 2}
    path.with_suffix(".json").write_text('{"a": {"seed": 1}, "faccel": {"seed": 2}}')
    assert read(f"{path.with_suffix('.json')}#faccel").values == {"seed": 2}


def test_a_script_of_gigabytes_is_an_error_before_it_is_read(tmp_path):
    path = tmp_path / "huge.py"
    with open(path, "wb") as file:
        file.truncate(1 << 34)  # a file with a hole takes no space
    out = CliRunner().invoke(main, ["launch", "--cpu", "--nproc", "2", str(path)])
    assert out.exit_code == 2
    assert "the script is larger than 10 MB" in out.output


def test_files_of_other_editors_are_read(tmp_path):
    for suffix, text in (
        (".yaml", "seed: 3\r\n"),
        (".toml", "seed = 3\r\n"),
        (".json", '{"seed": 3}'),
    ):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(str(path)).values == {"seed": 3}


@pytest.mark.parametrize(
    "key",
    [1, None, True, 1.5, (1, 2), b"tp", frozenset(), 1 << 10**5, LONG],
    ids=lambda key: type(key).__name__,
)
def test_a_key_of_another_type_is_an_error(key):
    for call in (
        lambda: MeshSpec.of({key: 2}),
        lambda: resolve({key: 2}),
        lambda: resolve({"mesh": {key: 2}}),
        lambda: faccel.init({"mesh": {"tp": 1, key: 1}}, env={}),
        lambda: from_accelerate({key: 1}),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        check_message(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "[]",
        '[["seed", 1]]',
        "3",
        '"seed"',
        "null",
        "{",
        "[" * 100_000,
        '{"seed": 1' + "0" * 5000 + "}",
        '{"sed": 1}',
        '{"\\r\\n": 1}',
        '{"seed": [1]}',
        '{"mesh": {"1": 2}}',
        '{"seed": -1}',
        "\x00",
        "\udcff",
        LONG,
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_a_malformed_variable_of_the_launcher_is_an_error(text, tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    for config in (None, str(tmp_path / "a.yaml")):
        with pytest.raises(ConfigError) as caught:
            faccel.init(config, env={LAUNCH: text})
        check_message(caught.value)
        assert LAUNCH in str(caught.value) or "flag" in str(caught.value)


@pytest.mark.parametrize("path", [5, b"a.yaml", None, "a\0.yaml", ["a"]], ids=str)
def test_what_is_no_path_is_an_error(path):
    with pytest.raises(ConfigError) as caught:
        local_path("path", path)
    check_message(caught.value)
    if isinstance(path, str):
        with pytest.raises(ConfigError):
            faccel.init(path, env={})
        with pytest.raises(ConfigError):
            faccel.Config(run_dir=path)


@pytest.mark.parametrize("url", ["s3://" + LONG, "file:///" + LONG, "x" * 1000 + "://a"])
def test_the_fix_for_a_url_is_short(url):
    with pytest.raises(ConfigError) as caught:
        faccel.Config(run_dir=url)
    check_message(caught.value)


def deepspeed_settings(settings):
    return lambda: read_settings(DeepSpeedConfig(settings=settings))


@pytest.mark.parametrize("kind", ODD_KINDS)
def test_settings_of_deepspeed_are_a_small_file_too(odd, kind):
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(str(odd[kind]))()
    check_message(caught.value)


@pytest.mark.parametrize("text", ["", "[", "[1]", "[" * 100_000, '{"x": NaN}'], ids=lambda t: t[:9])
def test_invalid_settings_of_deepspeed_are_an_error(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    for call in (deepspeed_settings(str(path)), deepspeed_settings({"fp16": {1, 2}})):
        with pytest.raises(ConfigError) as caught:
            call()
        check_message(caught.value)


def test_a_folder_or_a_fifo_in_place_of_the_default_file_is_an_error(tmp_path):
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert find(env) is None
    (tmp_path / "faccel" / "config.yaml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="must be a regular file"):
        faccel.init(env=env)


@pytest.mark.parametrize(
    "values",
    [
        {"num_processes": float("inf")},
        {"num_processes": float("nan")},
        {"num_processes": [1]},
        {"num_processes": LONG},
        {"num_processes": HUGE},
        {"main_process_port": "http", "num_processes": 2},
        {"main_process_ip": "a\nseed: 5", "num_machines": 2, "num_processes": 2},
        {"main_process_ip": "$(touch x)", "num_machines": 2, "num_processes": 2},
        {"main_process_ip": HUGE, "num_machines": 2, "num_processes": 2},
        {"machine_rank": "first", "num_machines": 2, "num_processes": 2},
        {"fsdp_config": LONG},
    ],
    ids=lambda values: short_text(str(sorted(values))),
)
def test_a_value_of_a_file_of_accelerate_that_has_no_meaning_is_an_error(values):
    with pytest.raises(ConfigError) as caught:
        from_accelerate({"distributed_type": "MULTI_GPU", **values})
    check_message(caught.value)


def test_numbers_of_a_plan_that_are_none_are_keys_without_an_equivalent():
    for value in ("x", [1], float("inf"), None):
        imported = from_accelerate(
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_min_num_params": value, "x": 1}}
        )
        assert "fsdp_config.fsdp_min_num_params" in imported.without_equivalent
    imported = from_accelerate(
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": [1]}}
    )
    assert "deepspeed_config.gradient_clipping" in imported.without_equivalent


def test_the_name_of_a_file_cannot_add_lines_to_the_imported_one(tmp_path):
    source = tmp_path / "a\nseed: 5 #.yaml"
    source.write_text("distributed_type: NO\nnum_processes: 2\nother: 2001-01-01\n? 3\n: 4\n")
    out = CliRunner().invoke(
        main, ["config", "import", str(source), "-o", str(tmp_path / "o.yaml"), "--json"]
    )
    assert out.exit_code == 0, out.output
    assert yaml.safe_load((tmp_path / "o.yaml").read_text()) == {"nproc": 2}
    assert json.loads(out.stdout)["without_equivalent"]["other"] == "2001-01-01"


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
@pytest.mark.parametrize(
    "text", ["é", "😀", "a b", "#", "a: b", '"', "\\", "\x7f", "\u2028", "\udcff"], ids=ascii
)
def test_a_value_is_written_so_that_it_is_read_or_not_at_all(tmp_path, suffix, text):
    path = tmp_path / f"a{suffix}"
    runner = CliRunner(env={"FACCEL_CONFIG": str(path)})
    for is_new in (True, False):
        before = None if is_new else path.read_bytes() if path.exists() else None
        out = runner.invoke(main, ["config", "set", f"run_dir={text}"])
        assert isinstance(out.exception, SystemExit | None), out.exception
        if out.exit_code == 0:
            assert read(str(path)).values["run_dir"] == text
        else:
            assert (path.read_bytes() if path.exists() else None) == before
        if is_new:
            assert runner.invoke(main, ["config", "set", "run_dir=b"]).exit_code == 0
    assert os.listdir(tmp_path) == [path.name]


def test_a_long_line_without_a_comment_is_edited_in_linear_time(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1" + " " * 500_000 + "\n")
    assert (
        CliRunner(env={"FACCEL_CONFIG": str(path)})
        .invoke(main, ["config", "set", "seed=2"])
        .exit_code
        == 0
    )
    assert read(str(path)).values == {"seed": 2}


def test_force_replaces_an_invalid_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1\n")
    runner = CliRunner(env={"FACCEL_CONFIG": str(path)})
    assert runner.invoke(main, ["config", "set", "seed=1"]).exit_code == 2
    assert runner.invoke(main, ["config", "default", "--force"]).exit_code == 0
    read(str(path))


LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"]}
SCRIPT = """
import sys
from faccel.cli.commands import main
from faccel.errors import FaccelError
from faccel.config_file import read
assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
try:
    read("é.yaml")
except FaccelError as error:
    sys.stderr.write("refused " + ascii(str(error)))
for words in ("show", "set run_dir=b", "path", "check é.yaml"):
    try:
        main(["config", *words.split()])
    except SystemExit as end:
        print("rc", end.code)
"""


@pytest.mark.parametrize(
    "locale", [LOCALE, LOCALE | {"PYTHONIOENCODING": "ascii:strict"}], ids=["C", "strict"]
)
def test_in_another_locale_the_files_and_the_errors_are_the_same(tmp_path, locale):
    path = tmp_path / "a.yaml"
    path.write_text("# größe\nrun_dir: é\n", encoding="utf-8")
    script = tmp_path / "s.py"
    script.write_text(SCRIPT, encoding="utf-8")
    env = {
        **locale,
        "FACCEL_CONFIG": str(path),
        "PYTHONPATH": str(pathlib.Path(faccel.__file__).parents[1]),
    }
    out = subprocess.run([sys.executable, script], env=env, cwd=tmp_path, capture_output=True)
    text = out.stdout + out.stderr
    assert b"Traceback" not in text, text.decode(errors="replace")
    assert out.stdout.count(b"rc 0") == 3, text
    assert path.read_text(encoding="utf-8") == '# größe\nrun_dir: "b"\n'
