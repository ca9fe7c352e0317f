"""pytest plugin: `@pytest.mark.world_size(1, 2, 4)` runs a test on every rank of a simulated world.

The test takes `ctx`. Its other fixtures are shared between the ranks.

The ini option `simulate_timeout_s` is the default of `simulate(timeout_s=...)`. A suite that runs
on loaded or slow nodes turns the limit off with `simulate_timeout_s = "inf"`.
"""

from __future__ import annotations

from typing import cast

import pytest

from faccel.testing.limits import LIMITS

_TIMEOUT_OPTION = "simulate_timeout_s"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the ini option."""
    doc = "seconds without progress after which `faccel.testing.simulate` raises; inf: no limit"
    parser.addini(_TIMEOUT_OPTION, doc)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and apply the ini option."""
    doc = "world_size(*sizes): run the test on every rank of simulated worlds, as `ctx`"
    config.addinivalue_line("markers", doc)
    # Empty if the project does not set it.
    timeout = config.getini(_TIMEOUT_OPTION)
    if timeout:
        LIMITS.timeout_s = float(timeout)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a marked test with its world sizes."""
    marker = metafunc.definition.get_closest_marker("world_size")
    if marker is None:
        return
    sizes = marker.args
    is_valid = bool(sizes) and all(isinstance(size, int) for size in sizes)
    if is_valid and "ctx" in metafunc.fixturenames:
        metafunc.parametrize("ctx", sizes, ids=[f"world{size}" for size in sizes])
        return
    # Without this error the test would run once, or pass without a run.
    pytest.fail(
        f"{metafunc.definition.nodeid}: `world_size` expects ints above a test that takes `ctx`. "
        f"Got {sizes!r}.\nTo fix: write `@pytest.mark.world_size(1, 2)`.",
        pytrace=False,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a marked test on every rank of its simulated world."""
    if pyfuncitem.get_closest_marker("world_size") is None:
        return None
    # Imported here: pytest loads the plugin in every project of this environment.
    from faccel.testing import simulate

    names = pyfuncitem._fixtureinfo.argnames  # pyright: ignore[reportPrivateUsage]
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name != "ctx"}
    world_size = cast("int", pyfuncitem.funcargs["ctx"])  # the parameter, in place of a fixture
    simulate(lambda ctx: pyfuncitem.obj(ctx=ctx, **arguments), world_size)
    return True  # pytest does not call the function itself
