"""One rank of `faccel.launch(..., on="ray")`: an actor of Ray, and how its function ended."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from faccel.checkpoint.preemption import Preemption
from faccel.errors import FaccelError, RankFailedError, short_repr
from faccel.launching.loopback import ADDRESS, loopback_variables
from faccel.runtime.excepthook import CONSEQUENCES
from faccel.runtime.initialize import init
from faccel.runtime.listener import bind
from faccel.runtime.user_traceback import hide_frames

# Ray sets one of them for each actor: the second one for GPUs of AMD.
_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# What `init` reads on the node itself: DeepSpeed looks for a compiler there.
_NODE_VARIABLES = ("PATH", "CXX")


@attrs.frozen
class Location:
    """Where an actor runs.

    Args:
        node_id: Ray's identity of the node.
        address: Address of the node, for the ranks of other nodes.
        gpu_ids: The GPUs that Ray assigned to the actor, numbered on its node.
        gpu_variable: The variable by which a process sees only some GPUs of the node.
    """

    node_id: str
    address: str
    gpu_ids: tuple[str, ...] = ()
    gpu_variable: str = _GPU_VARIABLES[0]


@attrs.frozen
class Outcome:
    """How the function of a rank ended.

    Args:
        result: The pickled result; None if the function did not return.
        exit_code: 0, the code for "preempted and saved", or 1 for an error.
        error: The traceback, or how the actor ended.
        is_consequence: Whether the failure of another rank is the cause.
    """

    result: bytes | None = None
    exit_code: int = 0
    error: str = ""
    is_consequence: bool = False


def rank_order(locations: Sequence[Location]) -> list[int]:
    """Return the numbers of the actors in the order of their ranks: those of a node together.

    Effects: pure.

    Examples:
        >>> rank_order([Location("b", "10.0.0.2"), Location("a", "10.0.0.1"), Location("b", "")])
        [0, 2, 1]
    """
    node_ids = [location.node_id for location in locations]
    # The node of the first actor has rank 0. Sorting is stable.
    return sorted(range(len(locations)), key=lambda index: node_ids.index(node_ids[index]))


def rank_variables(locations: Sequence[Location], port: int, attempt: int) -> list[dict[str, str]]:
    """Return the variables of torchrun for each rank, and those of its GPUs and network.

    Effects: ambient. Lists the network interfaces.

    Args:
        locations: Of the ranks, in their order.
        port: A free port on the node of rank 0.
        attempt: Number of restarts so far.
    """
    nodes: dict[str, list[int]] = {}
    for rank, location in enumerate(locations):
        nodes.setdefault(location.node_id, []).append(rank)
    variables: list[dict[str, str]] = []
    for node_rank, ranks in enumerate(nodes.values()):
        # All GPUs of the launch on this node, so that the local rank is the index of a GPU, and
        # NCCL copies from one to another directly.
        gpu_ids = [gpu_id for rank in ranks for gpu_id in locations[rank].gpu_ids]
        for local_rank, rank in enumerate(ranks):
            variables.append(
                {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(locations)),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(len(ranks)),
                    "GROUP_RANK": str(node_rank),
                    "GROUP_WORLD_SIZE": str(len(nodes)),
                    "MASTER_ADDR": main_address(locations),
                    "MASTER_PORT": str(port),
                    "TORCHELASTIC_RESTART_COUNT": str(attempt),
                }
            )
            if gpu_ids:
                variables[-1][locations[rank].gpu_variable] = ",".join(gpu_ids)
    return variables


def main_address(locations: Sequence[Location]) -> str:
    """Return the address of rank 0, which is the loopback interface for a launch on one node.

    Effects: pure.

    Examples:
        >>> main_address([Location("a", "10.0.0.1"), Location("a", "10.0.0.1")])
        '127.0.0.1'
        >>> main_address([Location("a", "10.0.0.1"), Location("b", "10.0.0.2")])
        '10.0.0.1'
    """
    node_ids = {location.node_id for location in locations}
    if len(node_ids) == 1:
        return ADDRESS
    return locations[0].address


class RankActor:
    """The class of the actors. Ray calls its methods on the main thread, as signals need it."""

    def locate(self) -> Location:
        """Return the node and the GPUs of this actor."""
        ray: Any = importlib.import_module("ray")
        context = ray.get_runtime_context()
        variable = _GPU_VARIABLES[0]
        # The administrator of a cluster can turn this off, and then neither is set.
        for name in _GPU_VARIABLES:
            if name in os.environ:
                variable = name
        return Location(
            node_id=context.get_node_id(),
            address=ray.util.get_node_ip_address(),
            gpu_ids=tuple(context.get_accelerator_ids().get("GPU", ())),
            gpu_variable=variable,
        )

    def free_port(self, host: str) -> int:
        """Return a port that is free now; the ranks take it within seconds."""
        with bind(host, 0) as listener:
            return int(listener.getsockname()[1])

    def run(self, variables: Mapping[str, str], call: bytes) -> Outcome:
        """Run the function as a rank, and return how it ended.

        Args:
            variables: Of this rank; see `rank_variables`.
            call: The pickled function, its arguments, the configuration and the device.
        """
        os.environ.update(variables)
        if variables["MASTER_ADDR"] == ADDRESS:
            os.environ.update(loopback_variables(os.environ))
        # Ray's handler raises `SystemExit`, which would look like a call of `sys.exit`. A script
        # that saves at SIGTERM installs its handler later.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The scheduler that started Ray, and `FACCEL_...` of the node, are not this launch.
        env = {name: os.environ[name] for name in _NODE_VARIABLES if name in os.environ}
        is_debug = False
        try:
            fn, args, config, device = pickle.loads(call)
            is_debug = config.debug
            with init(config, env={**env, **variables}, device=device) as ctx:
                result = fn(ctx, *args)
            return Outcome(_pickled(result, int(variables["RANK"])))
        except Exception as error:
            return _failure(error, shows_frames=is_debug)
        # A normal end of a script, or the end after a preemption.
        except SystemExit as exit:
            return _after_exit(exit.code, int(variables["RANK"]))


def _pickled(result: object, rank: int) -> bytes:
    # As Ray pickles, which includes functions and classes of a notebook.
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")
    try:
        return cloudpickle.dumps(result)
    except Exception as error:
        raise RankFailedError(
            f"the result of rank {rank} cannot be pickled",
            got=short_repr(error),
            fix="return tensors, numbers, text, lists or dicts",
        ) from None


def _failure(error: Exception, *, shows_frames: bool) -> Outcome:
    """Return the outcome of an error. Its class may not exist in the script, so it is text."""
    if isinstance(error, FaccelError) and not shows_frames:
        hide_frames(error)
    is_consequence = CONSEQUENCES.search(f"{type(error).__name__}: {error}") is not None
    text = "".join(traceback.format_exception(error)).strip()
    return Outcome(exit_code=1, error=text, is_consequence=is_consequence)


def _after_exit(code: object, rank: int) -> Outcome:
    if code in (None, 0):
        return Outcome(_pickled(None, rank))  # the function ended without a result
    if code == Preemption.exit_code:
        return Outcome(exit_code=Preemption.exit_code)
    return Outcome(exit_code=1, error=f"the function called `sys.exit({short_repr(code)})`")
