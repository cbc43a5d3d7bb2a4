"""Workers as Ray's actors: where they are, how they start, and what it looks like when one is gone. All that knows Ray.

[Note: what Ray does here]
Ray places one actor on each GPU of one host or of many, starts it, sees that it or its host is gone, makes it anew
(``max_restarts``), and carries messages and files. On one machine it starts what it needs itself and ends with this
process; its ports are bound to the loopback interface there. A cluster that is joined has the ports that its starter
gave it. Ray trusts whoever reaches them (docs/fleet.md).

Actors are sent by value, since the hosts of a cluster need not have this pack where this one has it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from . import worker as worker_module
from .config import NO_RAY, FleetConfig
from .errors import FleetConfigError, FleetError, WorkerDied, WorkerStartError
from .worker import WorkerSettings

logger = logging.getLogger(__name__)

NAMESPACE = "weightstream"
# What Ray does by itself on Windows and macOS: with it all of its ports are of the loopback interface. Read when it is
# imported. (An address that ray.init is given is exchanged for one that others reach.)
CLUSTERS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# How often Ray looks whether the RAM is full; 0 is never.
MEMORY_VARIABLE = "RAY_memory_monitor_refresh_ms"


class FleetWorker(Protocol):
    """A worker, as the dispatcher sees it. Each method may raise WorkerDied."""

    name: str

    async def start(self) -> dict[str, Any]: ...
    async def wait_for_end(self) -> str: ...
    def run(self, prompt_id: str, body: dict[str, Any]) -> AsyncIterator[tuple[Any, ...]]: ...
    async def interrupt(self, prompt_id: str) -> None: ...
    async def free(self, flags: Mapping[str, bool]) -> None: ...
    async def models(self) -> dict[str, list[str]]: ...
    async def lacks(self, places: Sequence[Any]) -> list[Any]: ...
    async def write(self, place: tuple[str, str, str], offset: int, piece: bytes, changed_ns: int) -> None: ...
    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]: ...


def connect(config: FleetConfig) -> int:
    """Start Ray, or join the cluster; the number of workers.

    Raises:
        FleetConfigError: there is no Ray, no such cluster, or no GPU.
    """
    if not config.address:
        os.environ.setdefault(CLUSTERS_VARIABLE, "0")
        # Models fill the RAM on purpose. Ray would end actors for it, and their ComfyUIs with them.
        os.environ.setdefault(MEMORY_VARIABLE, "0")
    ray = _ray()
    # The name of this package differs with the folder that the pack lies in.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__package__])
    common = {"namespace": NAMESPACE, "logging_level": logging.WARNING, "log_to_driver": False}
    try:
        if config.address:
            ray.init(address=config.address, **common)
        else:
            # Ray counts GPUs itself; where there is none, virtual devices stand in for as many as are asked for.
            own = {"num_gpus": config.workers} if config.workers else {}
            # "local": not a cluster that happens to be there, or that the environment names.
            ray.init(address="local", include_dashboard=False, **own, **common)
    except Exception as error:  # Of many kinds: no cluster, no such folder, a path that is too long for a socket.
        raise FleetConfigError(f"Ray cannot be used ({config.address or 'on this machine'}): {error}") from error
    count = config.workers or int(ray.cluster_resources().get("GPU", 0))
    if not count:
        raise FleetConfigError("there is no GPU for a worker; --workers N starts N of them anyway")
    return count


def disconnect() -> None:
    """End what :func:`connect` has started. Does nothing without it."""
    with contextlib.suppress(FleetConfigError):
        _ray().shutdown()


def node() -> str:
    """The Ray node that this process is on."""
    return str(_ray().get_runtime_context().get_node_id())


class RayWorker:
    """A :class:`FleetWorker` that is an actor of Ray."""

    def __init__(self, settings: WorkerSettings) -> None:
        ray = _ray()
        self.name = settings.name
        # Without CPUs of its own: it waits nearly always, and must not be refused for want of one.
        make = ray.remote(num_gpus=1, num_cpus=0, max_restarts=-1)(_actor_class())
        self._actor = make.remote(settings)

    async def start(self) -> dict[str, Any]:
        return await self._call("start_there")

    async def wait_for_end(self) -> str:
        return await self._call("wait_for_end")

    async def interrupt(self, prompt_id: str) -> None:
        await self._call("interrupt", prompt_id)

    async def free(self, flags: Mapping[str, bool]) -> None:
        await self._call("free", dict(flags))

    async def models(self) -> dict[str, list[str]]:
        return await self._call("models")

    async def lacks(self, places: Sequence[Any]) -> list[Any]:
        return await self._call("lacks", list(places))

    async def write(self, place: tuple[str, str, str], offset: int, piece: bytes, changed_ns: int) -> None:
        await self._call("write", place, offset, piece, changed_ns)

    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        return await self._call("request", method, path, dict(headers), body)

    async def run(self, prompt_id: str, body: dict[str, Any]) -> AsyncIterator[tuple[Any, ...]]:
        with self._errors():
            async for reference in self._actor.run.options(num_returns="streaming").remote(prompt_id, body):
                yield await reference

    async def _call(self, method: str, *arguments: Any) -> Any:
        with self._errors():
            return await getattr(self._actor, method).remote(*arguments)

    @contextlib.contextmanager
    def _errors(self) -> Any:
        """Ray's errors as ours."""
        errors = _ray().exceptions
        try:
            yield
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            # By their names: what comes back by value is of a class of its own.
            kinds = {kind.__name__: kind for kind in (WorkerStartError, WorkerDied)}
            raise kinds.get(type(cause).__name__, FleetError)(str(cause) or repr(cause)) from error
        except errors.RayError as error:
            raise WorkerDied(f"its process or its host is gone: {_first_line(error)}") from error


def _actor_class() -> type:
    class Actor(worker_module.Worker):
        """A worker that knows where Ray has put it."""

        async def start_there(self) -> dict[str, Any]:
            import ray

            context = ray.get_runtime_context()
            return await self.start(str(context.get_node_id()), ray.get_gpu_ids())

    return Actor


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _ray() -> Any:
    try:
        import ray
        import ray.cloudpickle
        import ray.exceptions
    except ImportError as error:
        raise FleetConfigError(NO_RAY) from error
    return ray
