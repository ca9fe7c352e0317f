"""Whether a run is observed, and the observer of this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from faccel.config import Config, is_given
from faccel.mesh import MeshSpec
from faccel.runtime.private_folder import private_folder

if TYPE_CHECKING:
    from faccel.context import DistContext, Topology
    from faccel.observe.observer import Observer

_logger = logging.getLogger(__name__)
# Collectives of PyTorch's flight recorder: some steps of a large model. With its 2000, each time
# that `watch` reads them takes 80 ms of the interpreter.
_NUM_RECORDED = "500"


class Observation:
    """The observer of this process, which the first context with a `run_dir` starts.

    Without one nothing is imported, and nothing is recorded.
    """

    def __init__(self) -> None:
        self._observer: Observer | None = None
        self._stack = ExitStack()  # holds the folder of the socket
        self._ctx: DistContext | None = None
        self._context_id: int | None = None

    @contextmanager
    def starting(self, config: Config, topology: Topology, spec: MeshSpec) -> Generator[None]:
        """Observe from now on, also the body, in which ranks wait for each other.

        Effects: ambient. Starts a thread, and writes into the run folder.
        """
        # The default folder is no wish to be observed: most scripts never use it.
        if self._observer is not None or not is_given(config, "run_dir"):
            yield
            return
        self._start(config, topology, spec)
        try:
            with _short_flight_record():
                yield
        except BaseException as error:
            self._close(error)
            raise

    def _start(self, config: Config, topology: Topology, spec: MeshSpec) -> None:
        # Only here, because few runs need it at the start.
        from faccel.observe.observer import Identity, Observer
        from faccel.observe.rank_file import facts_path, running_process, write
        from faccel.run_facts import run_facts

        run_dir = config.run_dir
        indices = spec.coordinates(topology.rank)
        # An axis of one rank distinguishes none.
        coordinates = {axis: index for axis, index in indices.items() if spec.extents[axis] > 1}
        identity = Identity(
            rank=topology.rank,
            world_size=topology.world_size,
            attempt=topology.attempt,
            world=f"{topology.main_address}:{topology.main_port}/{topology.attempt}",
            coordinates=coordinates,
        )
        other = running_process(run_dir, topology.rank)
        if other is not None:
            # `faccel env`, or an evaluation in the folder of a training that runs.
            _logger.warning(
                "rank %d of `%s` is observed already: %d", topology.rank, run_dir, other
            )
            return
        try:
            folder = self._stack.enter_context(private_folder("faccel-rank-"))
            if topology.rank == 0:
                write(facts_path(run_dir), run_facts(config))
            self._observer = Observer(run_dir, folder, identity, self._progress)
        # AttributeError: Windows has no such sockets. ValueError: a null character in the path.
        except (OSError, AttributeError, ValueError) as error:
            self._stack.close()
            # A training must not fail because it is not observed. A tracker raises for the folder.
            _logger.warning("rank %d is not observed in `%s`: %s", topology.rank, run_dir, error)

    def attach(self, ctx: DistContext) -> None:
        """Let the observer read the state of a context, the first one since it was started."""
        if self._observer is not None and self._context_id is None:
            self._ctx, self._context_id = ctx, id(ctx)

    def _progress(self) -> Mapping[str, Any]:
        """Return what only the context has; called in the thread of the observer."""
        if self._ctx is None:  # `init` has not returned
            return {"step": 0, "loader": "", "axes": {}}
        axes: dict[str, str] = {}
        groups: Mapping[str, Any] = getattr(self._ctx.comm, "groups", {})
        for axis, group in list(groups.items()):
            # DDP and FSDP2 use these groups, too, so that their collectives have an axis.
            axes[group.group_name] = axis
        return {"step": self._ctx.lifetime.num_updates, "loader": "", "axes": axes}

    def note_error(self, error: BaseException) -> None:
        """Note an error that ends the process, before anything waits for other ranks."""
        if self._observer is not None:
            self._observer.note_end(error)

    def close(self, context_id: int, error: BaseException | None) -> None:
        """End the observation with the context that has started it."""
        if context_id == self._context_id:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        # First None: an error while it closes must not keep the next context from starting one.
        observer, self._observer = self._observer, None
        self._ctx = self._context_id = None
        if observer is not None:
            observer.close(error)
        self._stack.close()


@contextmanager
def _short_flight_record() -> Generator[None]:
    """Let PyTorch hold few collectives if the body creates its first process group."""
    from faccel.torch_names import FLIGHT_RECORDER_SIZES

    # PyTorch reads it once, in C++. What the user has set stays, by either name.
    if any(name in os.environ for name in FLIGHT_RECORDER_SIZES):
        yield
        return
    name = FLIGHT_RECORDER_SIZES[0]
    os.environ[name] = _NUM_RECORDED
    try:
        yield
    finally:
        os.environ.pop(name, None)
