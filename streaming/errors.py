"""What can go wrong, as a tree.

StreamingError
|-- ConfigError            a setting has a value that cannot work
|-- UnsupportedModelError  the model cannot be streamed; it still runs the host's way
|-- BudgetError            the device memory allowed is too small for even one slot
|-- CheckpointError        a file cannot be loaded; the message names it
|   `-- CheckpointChangedError  the file was changed after it was opened
|-- CorruptionError        what is on the device is not what was sent or packed, time and again
|-- DeviceMemoryError      a virtual device has no room left for an allocation
|-- StepNotRepeatedError   a step failed and has changed what it began with
|-- WeightsMovedError      weights went off the device while a step ran that needed them
|-- GradientError          gradients are asked for through a block that streams
|-- SharingError           copies of weights cannot be shared with other processes
|-- WorkflowError          a file is no workflow, or one that cannot be read
|-- ServerError            no ComfyUI with this pack answers
`-- OutputError            a command has nowhere to print to
"""


class StreamingError(RuntimeError):
    """Base of everything that the engine raises by itself."""


class ConfigError(StreamingError, ValueError):
    """A setting has a value that cannot work."""


class UnsupportedModelError(StreamingError):
    """The model cannot be streamed; the message says why."""


class BudgetError(StreamingError):
    """The device memory allowed is too small.

    Attributes:
        minimum: bytes with which the smallest plan would fit.
    """

    def __init__(self, message: str, minimum: int) -> None:
        super().__init__(message)
        self.minimum = minimum


class CheckpointError(StreamingError, ValueError):
    """A file cannot be loaded; the message names it."""


class CheckpointChangedError(CheckpointError):
    """The file was changed after it was opened: what was read and what is there now belong to different versions."""


class CorruptionError(StreamingError):
    """What is on the device is not what was sent, also when it was sent again; or not what was packed."""


class DeviceMemoryError(StreamingError):
    """A virtual device has no room left for an allocation."""


class StepNotRepeatedError(StreamingError):
    """A step that failed would have to run again, and has changed what it began with; the message says what."""


class GradientError(StreamingError):
    """Gradients are asked for through a block that streams."""

    def __init__(self, block: str) -> None:
        super().__init__(
            f"gradients are recorded through {block}, which streams: when they are computed its weights are gone from "
            "the device, and those of another block would be taken for them. Nothing can be trained with a model that "
            "streams; load it with ComfyUI's own loader, set mode to off, or give it room for all of its weights"
        )


class WeightsMovedError(StreamingError):
    """Weights went off the device while a step ran that needed them, so what it has computed may be wrong."""


class SharingError(StreamingError):
    """Copies of weights cannot be shared with other processes of this host; the message says why."""


class WorkflowError(StreamingError, ValueError):
    """A file is no workflow of ComfyUI, or has something in it that cannot be read."""


class ServerError(StreamingError):
    """No ComfyUI with this pack answers; the message names the address."""


class OutputError(StreamingError):
    """A command has nowhere to print to."""


def _named_for_people(root: type[StreamingError]) -> None:
    """ComfyUI shows an error with its module, which for a pack begins with the path of its folder."""
    root.__module__ = "weightstream"
    for kind in root.__subclasses__():
        _named_for_people(kind)


_named_for_people(StreamingError)
