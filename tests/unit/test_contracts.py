"""Every public name: its label is in its docstring, it has an example, it is exported once."""

import ast
import importlib
import inspect
import pathlib
import pickle
import re
import subprocess
import sys

import attrs
import pytest

import faccel
from faccel import errors
from faccel.effects import effects_of

NAMESPACES = (
    "checkpoint", "comm", "data", "func", "inference", "parallel", "random", "tracking", "tree",
)  # fmt: skip
PUBLIC = {name: getattr(faccel, name) for name in faccel.__all__} | {
    f"{namespace}.{name}": getattr(getattr(faccel, namespace), name)
    for namespace in NAMESPACES
    for name in getattr(faccel, namespace).__all__
}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]
RECORDS = [name for name, value in PUBLIC.items() if attrs.has(value)]
TUPLES = ["func.Updates", "tracking.Meter"]
ENUMS = ["func.Role"]
LAYERS = ["parallel.MoE"]  # modules of torch


def test_all_is_sorted_and_every_name_is_a_function_a_record_or_a_layer():
    assert faccel.__all__ == sorted(faccel.__all__)
    assert len(faccel.__all__) <= 55
    for namespace in NAMESPACES:
        names = getattr(faccel, namespace).__all__
        assert names == sorted(names), namespace
    assert {*FUNCTIONS, *RECORDS, *LAYERS, *TUPLES, *ENUMS} == set(PUBLIC)
    assert set(dir(faccel)) >= set(faccel.__all__)


UNKNOWN_NAMES = {
    ("", "export_model"): "use `faccel.checkpoint.export_model`",
    ("", "adamw"): "use `faccel.func.adamw`",
    ("", "ConfigError"): "use `faccel.errors.ConfigError`",
    ("", "Accelerator"): "use `ctx = faccel.init()`",
    ("", "accelerator"): "use `ctx = faccel.init()`",
    ("", "optimiser_step"): "use `faccel.optimizer_step`",
    ("", "distcontext"): "use `faccel.DistContext`",
    ("", "init_ema"): "use `faccel.parallel.init_ema(model, ctx)`",
    ("", "update_ema"): "use `faccel.parallel.update_ema(ema, model, ctx)`",
    ("checkpoint", "keep_last"): "use `faccel.checkpoint.keep_latest`",
    ("checkpoint", "windows"): "use `faccel.windows`",
    ("tracking", "init_tracker"): "use `faccel.tracking.init_trackers`",
}


@pytest.mark.parametrize(("namespace", "name"), UNKNOWN_NAMES, ids=lambda name: name or "faccel")
def test_an_unknown_name_suggests_the_nearest_public_name(namespace, name):
    package = importlib.import_module(f"faccel.{namespace}".rstrip("."))
    with pytest.raises(AttributeError) as error:
        getattr(package, name)
    fix = UNKNOWN_NAMES[namespace, name]
    assert str(error.value) == (
        f"module `{package.__name__}` has no attribute `{name}`.\nTo fix: {fix}."
    )


def test_a_name_far_from_every_public_name_has_no_suggestion():
    with pytest.raises(AttributeError) as error:
        _ = faccel.xyzzy
    assert str(error.value) == "module `faccel` has no attribute `xyzzy`"


def test_python_protocol_names_and_modules_do_not_import_every_namespace():
    code = "import sys, faccel; hasattr(faccel, '__wrapped__'); from faccel import mesh; "
    code += "assert 'faccel.func' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


LAZY = (
    *("", "backends", "checkpoint", "comm", "data", "inference"),
    *("parallel", "random", "testing", "tracking"),
)


@pytest.mark.parametrize("namespace", LAZY)
def test_names_for_type_checkers_are_the_imported_names(namespace):
    package = importlib.import_module(f"faccel.{namespace}".rstrip("."))
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        seen |= {alias.asname: node.module for alias in node.names}
    submodules = {name for name, module in seen.items() if module == "faccel"}
    assert {name: module for name, module in seen.items() if name not in submodules} == {
        name: module for module, names in package._NAMES.items() for name in names
    }
    assert set(dir(package)) - {"__version__"} == {*package.__all__, *submodules}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_repeats_the_label(name):
    fn = PUBLIC[name]
    line = re.search(r"^\s*Effects: ([^.]*(?:\.grad)?[^.]*)\.", fn.__doc__, re.M)
    assert line, "no `Effects:` line"
    stated = set(re.sub(r", (?:until|as far).*", "", line[1]).split(", "))
    assert stated == set(effects_of(fn) or {"pure"})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_context_is_the_last_positional_argument(name):
    parameters = list(inspect.signature(PUBLIC[name]).parameters.values())
    names = [p.name for p in parameters]
    if "ctx" in names:
        after = parameters[names.index("ctx") + 1 :]
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in after)
    assert not any(
        isinstance(p.default, bool) and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example(name):
    assert ">>>" in PUBLIC[name].__doc__


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_is_frozen_and_documents_its_fields_and_methods(name):
    record = PUBLIC[name]
    assert record.__setattr__ is not object.__setattr__
    for field in attrs.fields(record):
        if field.init and not field.name.startswith("_"):
            assert re.search(rf"^\s+{field.name}: ", record.__doc__, re.M), field.name
    for method, value in vars(record).items():
        if not method.startswith("_") and (
            inspect.isfunction(value) or isinstance(value, property)
        ):
            assert inspect.getdoc(value), method


ERRORS = [
    cls
    for cls in vars(errors).values()
    if inspect.isclass(cls) and issubclass(cls, errors.FaccelError)
]


@pytest.mark.parametrize("cls", ERRORS)
def test_errors_carry_their_parts_and_can_be_pickled(cls):
    error = pickle.loads(pickle.dumps(cls("what", got="that", fix="do this")))
    assert (type(error), error.problem, error.got, error.fix) == (cls, "what", "that", "do this")
    assert str(error) == "what. Got that.\nTo fix: do this."
    assert cls is errors.FaccelError or len(cls.__mro__) > len(errors.FaccelError.__mro__) + 1


def test_the_nearest_name_is_suggested():
    assert (
        errors.nearest("grad_acum", ["seed", "grad_accum"])
        == "use `grad_accum` (allowed: `grad_accum`, `seed`)"
    )
    assert errors.nearest("zzz", ["b", "a"]) == "use one of `a`, `b`"


def test_no_module_is_longer_than_450_lines():
    for path in pathlib.Path(faccel.__file__).parent.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_nothing_outside_backends_asks_which_backend_it_is():
    root = pathlib.Path(faccel.__file__).parent
    for path in root.rglob("*.py"):
        if "backends" not in path.parts:
            assert not re.search(
                r"if .*(backend|strategy|parallelism\.name) ==", path.read_text()
            ), path


def test_the_table_of_bugs_names_existing_tests():
    tests = pathlib.Path(__file__).parents[1]
    existing = set(
        re.findall(r"^def (\w+)", "\n".join(p.read_text() for p in tests.rglob("*.py")), re.M)
    )
    table = (tests / "README.md").read_text().partition("| bug | tests |\n| --- | --- |\n")[2]
    for line in table.splitlines():
        names = re.findall(r"`(\w+)`", line.split("|")[2])
        assert names, line
        assert set(names) <= existing, set(names) - existing
