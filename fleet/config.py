"""Settings of a fleet, handed from the command line to the ComfyUI in front by an environment variable."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .errors import FleetConfigError

# Holds a FleetConfig as JSON in the ComfyUI in front.
FRONT_VARIABLE = "WEIGHTSTREAM_FLEET"
# The engine's own: where processes share copies (streaming/sharing).
SHARE_VARIABLE = "WEIGHTSTREAM_SHARE"

MOST_WAITING = 1000
NO_RAY = "the fleet needs Ray, which is not installed: pip install 'ray>=2.40', with ComfyUI's own Python"


@dataclass(frozen=True)
class FleetConfig:
    """How many workers there are, and how they are started.

    Attributes:
        comfyui: the folder of ComfyUI, on each host.
        python: the interpreter that runs it there.
        host_arguments: of ``main.py``, for the front and for all workers: folders, precision, attention.
        worker_arguments: for workers alone, which have the GPUs.
        environ: of workers, beside what their host has.
        workers: how many; 0 for one for each GPU.
        address: of a Ray cluster to join; "" for one of its own on this machine.
        most_waiting: prompts that may wait. More are refused, with HTTP status 429.
        silent_minutes: after which a worker that says nothing of its prompt is started again; 0 for never.
        token: what a client has to know; "" for nothing.
        folder: where the front was started, for relative paths.
        pack: this pack's folder, on each host.
        share: the address at which workers of a host share page-locked copies (docs/sharing.md); "" for none.
    """

    comfyui: str
    python: str
    host_arguments: tuple[str, ...] = ()
    worker_arguments: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    workers: int = 0
    address: str = ""
    most_waiting: int = MOST_WAITING
    silent_minutes: float = 0.0
    token: str = ""
    folder: str = ""
    pack: str = ""
    share: str = ""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise FleetConfigError(f"{self.workers} workers: expected 1 or more, or 0 for one for each GPU")
        if self.most_waiting < 1:
            raise FleetConfigError(f"a queue for {self.most_waiting} prompts: expected 1 or more")
        if not 0 <= self.silent_minutes < math.inf:
            raise FleetConfigError(f"{self.silent_minutes:g} minutes of silence: expected 0 or more")

    @property
    def silent_seconds(self) -> float:
        return 60 * self.silent_minutes

    @property
    def main(self) -> Path:
        return Path(self.comfyui) / "main.py"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> FleetConfig | None:
        """The settings of the front that this process is; None where it is none.

        Raises:
            FleetConfigError: the variable holds something else.
        """
        text = os.environ.get(FRONT_VARIABLE, "")
        if not text:
            return None
        try:
            values = json.loads(text)
            known = {each.name for each in fields(cls)}
            if not isinstance(values, dict) or not values.keys() <= known:
                raise FleetConfigError(f"{FRONT_VARIABLE}: expected an object of {', '.join(sorted(known))}")
            for name in ("host_arguments", "worker_arguments"):
                values[name] = tuple(values.get(name, ()))
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise FleetConfigError(f"{FRONT_VARIABLE} is set by python -m fleet, and is malformed: {error}") from error
