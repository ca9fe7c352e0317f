"""pytest plugin: `@pytest.mark.world_size(1, 2, 4)` runs a test on every rank of simulated worlds.

The test takes `ctx`, and any fixtures, which the ranks share.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers", "world_size(*sizes): run the test on every rank of simulated worlds, as `ctx`"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each world size."""
    marker = metafunc.definition.get_closest_marker("world_size")
    if marker is None:
        return
    if (
        "ctx" not in metafunc.fixturenames
        or not all(isinstance(n, int) for n in marker.args)
        or not marker.args
    ):
        pytest.fail(
            f"{metafunc.definition.nodeid}: write `@pytest.mark.world_size(1, 2)` above a test that takes `ctx`",
            pytrace=False,
        )
    else:
        metafunc.parametrize("ctx", marker.args, ids=[f"world{n}" for n in marker.args])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a marked test in its simulated world."""
    if pyfuncitem.get_closest_marker("world_size") is None:
        return None
    from faccel.testing import simulate

    names = pyfuncitem._fixtureinfo.argnames  # pyright: ignore[reportPrivateUsage]
    arguments: dict[str, Any] = {name: pyfuncitem.funcargs[name] for name in names}
    world_size = arguments.pop("ctx")
    simulate(lambda ctx: pyfuncitem.obj(ctx=ctx, **arguments), world_size)
    return True
