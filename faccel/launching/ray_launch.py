"""`faccel.launch(..., on="ray")`: each rank is an actor on a cluster of Ray."""

from __future__ import annotations

import functools
import importlib
import math
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs

from faccel.checks import integer
from faccel.config import Config
from faccel.device_table import KINDS, DeviceKind
from faccel.errors import LaunchError, RankFailedError, short_repr, short_text
from faccel.launching.rank_outcomes import results_of
from faccel.launching.ray_rank import (
    Location,
    Outcome,
    RankActor,
    main_address,
    rank_order,
    rank_variables,
)

T = TypeVar("T")
# The module, which is an extra: its types are unknown where it is not installed.
_Ray = Any
_GPU = "GPU"  # Ray's name of the resource
_END_TIMEOUT_S = 60.0  # until an actor that was killed has ended


@attrs.frozen(eq=False)
class _Job:
    """What is the same for all attempts of a launch."""

    ray: _Ray
    call: bytes
    num_processes: int
    resources: Mapping[str, float]
    start_timeout_s: float


def launch_on_ray(
    fn: Callable[..., T],
    args: tuple[object, ...],
    config: Config,
    num_processes: int | None,
    resources: Mapping[str, float] | None,
    max_restarts: int,
) -> list[T]:
    """Run `fn(ctx, *args)` on the actors of a Ray cluster, and return the results by rank.

    Effects: ambient. Starts actors, and connects to Ray until they have ended, unless this process
    is connected already.

    Args:
        fn: Takes a `DistContext` first.
        args: Further arguments.
        config: The resolved configuration of all ranks.
        num_processes: Number of ranks; None is one per GPU of the cluster, or one without GPUs.
        resources: Ray's resources of a rank.
        max_restarts: How often all ranks start again after a failure.

    Raises:
        LaunchError: Ray is not installed or has not the resources, or a value is invalid.
        RankFailedError: A rank failed, and no restart is left.
    """
    integer("max_restarts", max_restarts, at_least=0)
    # Before Ray is imported, which takes seconds, and before a cluster starts.
    if resources is not None:
        _check_resources(resources)
    check_device(config.device, resources)
    try:
        ray: _Ray = importlib.import_module("ray")
    except ImportError:
        raise LaunchError(
            "Ray is not installed", got='`on="ray"`', fix='run `pip install "faccel[ray]"`'
        ) from None
    with _connected(ray):
        num_gpus = int(ray.cluster_resources().get(_GPU, 0))
        resources, device = rank_resources(resources, config.device, num_gpus)
        if num_processes is None:
            num_processes = 1
            # As without Ray, where it is one per accelerator of the node.
            if _GPU in resources:
                num_processes = max(1, num_gpus)
        job = _Job(
            ray=ray,
            call=_pickled_call(ray, fn, args, config, device),
            num_processes=num_processes,
            resources=resources,
            start_timeout_s=config.start_timeout_s or config.timeout_s,
        )
        start = functools.partial(_started, job)
        results = results_of(start, num_processes, max_restarts)
        return [_unpickled(result, rank) for rank, result in enumerate(results)]


def _check_resources(resources: object) -> None:
    problem = ""
    if not isinstance(resources, Mapping) or not resources:
        problem = "`resources` must be a dict of Ray's resources"
    else:
        for name, amount in resources.items():
            is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
            if not isinstance(name, str) or not is_number or not 0 <= amount < math.inf:
                problem = f"`resources[{short_repr(name)}]` must be a number of at least 0"
        # Two ranks on a GPU would wait for each other in NCCL, and a rank uses one.
        if not problem and resources.get(_GPU, 0) not in (0, 1):
            problem = '`resources["GPU"]` must be 0 or 1, because a rank has one GPU'
    if problem:
        raise LaunchError(
            problem, got=short_repr(resources), fix='write `resources={"CPU": 8, "GPU": 1}`'
        )


def check_device(device: str | None, resources: Mapping[str, float] | None) -> None:
    """Raise if actors cannot have the device, or their resources contradict it.

    Effects: pure.

    Raises:
        LaunchError: The device is neither CPU nor GPU, or the GPU is missing or superfluous.

    Examples:
        >>> check_device("cpu", {"CPU": 1, "GPU": 1})
        Traceback (most recent call last):
        faccel.errors.LaunchError: `resources` contradicts `device`. Got {'CPU': 1, 'GPU': 1} ...
        To fix: write `resources={"CPU": 1}` for `device="cpu"`.
    """
    if device is None:
        return
    device_type = device.partition(":")[0]  # of `cuda:0`
    kind = KINDS.get(device_type, DeviceKind())
    if not kind.is_host and not kind.ray_resource:
        raise LaunchError(
            f"the ranks of a launch on Ray use CPUs or CUDA GPUs, not `{short_text(device_type)}`",
            got=f"device={short_repr(device)}",
            fix='use `device="cpu"`, or start the nodes with `faccel launch`',
        )
    if resources is None:
        return
    has_gpu = resources.get(_GPU, 0) > 0
    if has_gpu == kind.is_host:
        example = '{"CPU": 1}'
        if not kind.is_host:
            example = '{"CPU": 1, "GPU": 1}'
        raise LaunchError(
            "`resources` contradicts `device`",
            got=f"{short_repr(dict(resources))} and {short_repr(device)}",
            fix=f'write `resources={example}` for `device="{device_type}"`',
        )


def rank_resources(
    resources: Mapping[str, float] | None, device: str | None, num_gpus: int
) -> tuple[dict[str, float], str]:
    """Return Ray's resources of a rank, and its device.

    The device is never left to the node: PyTorch without CUDA would take the CPU.

    Effects: pure.

    Args:
        resources: As the user wrote them.
        device: Of the configuration.
        num_gpus: Of the cluster.

    Examples:
        >>> rank_resources(None, None, 8)
        ({'CPU': 1, 'GPU': 1}, 'cuda')
        >>> rank_resources({"CPU": 4}, None, 8)
        ({'CPU': 4}, 'cpu')
    """
    gpu_type = _device_type_of(_GPU)
    if resources is None:
        # The core is for the Python of the rank. Data workers need more, which the user counts.
        resources = {"CPU": 1}
        if (device or "").startswith(gpu_type) or (device is None and num_gpus > 0):
            resources = {"CPU": 1, _GPU: 1}
    # A bundle of a placement group may not have an amount of 0.
    needed = {name: amount for name, amount in resources.items() if amount}
    if device is not None:
        return needed, device
    if _GPU in needed:
        return needed, gpu_type
    return needed, "cpu"


def _device_type_of(resource: str) -> str:
    """Return the device type that Ray assigns as this resource."""
    for device_type, kind in KINDS.items():
        if kind.ray_resource == resource:
            return device_type
    raise LookupError(resource)


def _pickled_call(
    ray: _Ray, fn: Callable[..., object], args: tuple[object, ...], config: Config, device: str
) -> bytes:
    try:
        return ray.cloudpickle.dumps((fn, args, config, device))
    # Whatever the `__reduce__` of an argument raises.
    except Exception as error:
        raise LaunchError(
            "the function or one of its arguments cannot be pickled",
            got=short_text(str(error)),
            fix="open files, loaders and locks inside of the function",
        ) from None


def _unpickled(result: bytes, rank: int) -> Any:
    try:
        return pickle.loads(result)
    except Exception as error:
        raise RankFailedError(
            f"the result of rank {rank} cannot be unpickled in this process",
            got=short_text(str(error)),
            fix="return CPU tensors: `tensor.cpu()`",
        ) from None


@contextmanager
def _connected(ray: _Ray) -> Generator[None]:
    """Connect to the cluster of `RAY_ADDRESS`, or to one on this node, until the block ends."""
    if ray.is_initialized():  # by the script, which may use it afterwards
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init()
    # Ray raises all three: the address does not answer, is no address, or a component failed.
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(
            "this process cannot connect to a Ray cluster",
            got=short_text(str(error)),
            fix="start one by `ray start --head`, and check or unset `RAY_ADDRESS`",
        ) from None
    try:
        yield
    finally:
        # As at the exit of a script: it waits a moment for the last output of the ranks.
        ray.shutdown(_exiting_interpreter=True)
        # Ray replaces the handler on the main thread, and leaves it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _started(job: _Job, attempt: int) -> Generator[_RayRanks]:
    """Start all ranks on new actors; end the actors with the block."""
    placement: _Ray = importlib.import_module("ray.util.placement_group")
    # All ranks or none: two launches that each wait for the other's resources would never start.
    group = placement.placement_group([dict(job.resources)] * job.num_processes, strategy="PACK")
    ranks = _RayRanks(job.ray)
    try:
        if not group.wait(job.start_timeout_s):
            raise _no_resources(job)
        ranks.start(job, group, attempt)
        yield ranks
    finally:
        # Also after Ctrl-C. Before the next attempt: two of them would write one checkpoint.
        ranks.close()
        placement.remove_placement_group(group)


def _no_resources(job: _Job) -> LaunchError:
    # Also of nodes that others use: the free ones may have changed since the timeout.
    total = job.ray.cluster_resources()
    present = {name: total.get(name, 0) for name in job.resources}
    return LaunchError(
        f"the cluster has not enough free resources for {job.num_processes} ranks",
        got=f"{short_repr(dict(job.resources))} for each rank, a cluster with "
        f"{short_repr(present)}, and {job.start_timeout_s:g} seconds to get them",
        fix="start fewer ranks with `num_processes`, or add nodes to the cluster",
    )


class _RayRanks:
    """The actors of one attempt, by rank."""

    def __init__(self, ray: _Ray) -> None:
        self._ray = ray
        self._actors: list[Any] = []
        self._running: dict[Any, int] = {}  # the rank of each running call
        self._ended: list[tuple[int, Outcome]] = []

    def start(self, job: _Job, group: Any, attempt: int) -> None:
        """Start an actor in each bundle of a placement group, and the function on all of them."""
        scheduling: _Ray = importlib.import_module("ray.util.scheduling_strategies")
        resources = dict(job.resources)
        num_cpus, num_gpus = resources.pop("CPU", 0), resources.pop(_GPU, 0)
        for index in range(job.num_processes):
            actor_class = self._ray.remote(RankActor).options(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=resources,
                # A rank cannot start again alone: all of them have one process group.
                max_restarts=0,
                scheduling_strategy=scheduling.PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index
                ),
            )
            self._actors.append(actor_class.remote())
        locations = self._locations(job.start_timeout_s)
        if locations is None:
            return
        order = rank_order(locations)
        self._actors = [self._actors[index] for index in order]
        locations = [locations[index] for index in order]
        try:
            host = main_address(locations)
            call = self._actors[0].free_port.remote(host)
            port = self._ray.get(call, timeout=job.start_timeout_s)
        except self._ray.exceptions.RayError as error:
            self._ended.append((0, _died(error)))
            return
        # The ranks have until the start timeout of `init` to connect.
        call = self._ray.put(job.call)  # once for each node, not for each rank
        for rank, variables in enumerate(rank_variables(locations, port, attempt)):
            self._running[self._actors[rank].run.remote(variables, call)] = rank

    def _locations(self, timeout_s: float) -> list[Location] | None:
        """Return where the actors run; None if one of them did not start."""
        calls = [actor.locate.remote() for actor in self._actors]
        locations: list[Location] = []
        for index, call in enumerate(calls):
            try:
                locations.append(self._ray.get(call, timeout=timeout_s))
            # For example on a node without faccel, or that has ended since.
            except self._ray.exceptions.RayError as error:
                self._ended.append((index, _died(error, "did not start")))
                return None
        return locations

    def wait(self, timeout_s: float | None) -> tuple[int, Outcome] | None:
        """Return the next rank that has ended, and how; None after the timeout."""
        if self._ended:
            return self._ended.pop()
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        if not ready:
            return None
        rank = self._running.pop(ready[0])
        try:
            return rank, self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            return rank, _died(error)

    def end(self, rank: int) -> None:
        """End the process of a rank, so that others do not wait for it."""
        self._ray.kill(self._actors[rank])

    def close(self) -> None:
        """End all actors, and wait until their processes have ended."""
        # Killed, and not asked: a rank may wait in a collective, where it reads no message.
        for actor in self._actors:
            self._ray.kill(actor)
        calls = list(self._running)
        if calls:
            # A call ends, with an error, when its actor has ended.
            self._ray.wait(calls, num_returns=len(calls), timeout=_END_TIMEOUT_S)


def _died(error: Exception, event: str = "ended") -> Outcome:
    # The text of Ray names the process, its node, and the signal or the lack of memory.
    return Outcome(exit_code=1, error=f"the actor {event}: {error}")
