"""The node "Streamed Model Loader", and loading a diffusion model for streaming."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_patcher
import comfy.sd
import folder_paths
import safetensors
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..streaming import BudgetError, Streamer, UnsupportedModelError, format_bytes, split_model
from . import status
from .devices import evictable, host_config, make_backend, pins
from .patcher import ATTRIBUTE, StreamedModel, StreamedModelPatcher

GIB = 1024**3

# The options of the host's Load Diffusion Model, and what each of them means to its loading function.
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}

SAFETENSORS_ENDINGS = (".safetensors", ".sft")


class CheckpointError(ValueError):
    """A file cannot be loaded; the message names it."""


class StreamedModelLoader(io.ComfyNode):
    """Loads a diffusion model whose blocks stream from page-locked RAM while the blocks before them compute.

    As many blocks as fit stay in VRAM. The images are the same as with Load Diffusion Model, to the bit.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WeightStreamModelLoader",
            display_name="Streamed Model Loader",
            category="weightstream",
            description=cls.__doc__,
            inputs=[
                io.Combo.Input("unet_name", options=folder_paths.get_filename_list("diffusion_models")),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), advanced=True),
                io.Float.Input(
                    "vram_limit_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="VRAM for the model's weights, in GiB. 0 uses what ComfyUI offers.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, vram_limit_gb: float = 0.0) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        limit = int(vram_limit_gb * GIB) if vram_limit_gb > 0 else None
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        return io.NodeOutput(load_streamed(path, WEIGHT_DTYPES[weight_dtype], limit, node_id))


def load_streamed(
    path: str,
    model_options: dict,
    vram_limit: int | None = None,
    node_id: str | None = None,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Load the diffusion model at ``path`` for streaming, or the host's way where it cannot stream, and say so.

    Args:
        path: the checkpoint.
        model_options: as :func:`comfy.sd.load_diffusion_model` takes them.
        vram_limit: bytes of VRAM for weights; None takes what the host offers.
        node_id: where to show the plan.
        disable_dynamic: for callers who want a patcher without dynamic VRAM; a streamed one never has it.

    Raises:
        CheckpointError: the file is damaged, or holds no model that the host knows.
        BudgetError: ``vram_limit`` has no room for the largest block.
    """
    name = os.path.basename(path)
    _check_file(path)
    try:
        patcher = _load_for_streaming(path, model_options, vram_limit, node_id)
        patcher.cached_patcher_init = (load_streamed, (path, model_options, vram_limit, node_id))
        return patcher
    except UnsupportedModelError as error:
        status.announce(name, f"not streamed, loaded ComfyUI's own way: {error}", node_id)
        return _load_by_host(path, model_options, disable_dynamic)


def _load_for_streaming(path: str, model_options: dict, vram_limit: int | None, node_id: str | None) -> ModelPatcher:
    name = os.path.basename(path)
    backend = make_backend(model_options.get("load_device", comfy.model_management.get_torch_device()))
    with _views_of_the_file():
        loaded = _load_by_host(path, model_options)
    model, load_device = loaded.model, loaded.load_device
    blocks = split_model(model, _model_dtype)
    config = host_config(vram_limit, backend)
    streamer = Streamer(model.diffusion_model, blocks, backend, config, pins, evictable)
    _check_limit(vram_limit, streamer, name)
    streamed = StreamedModel(name, streamer, node_id)
    setattr(model, ATTRIBUTE, streamed)
    status.watch(streamed)
    status.announce(
        name,
        f"{len(blocks.blocks)} blocks, {format_bytes(streamer.model_bytes)}, ready to stream to {backend.name}",
        node_id,
    )
    return StreamedModelPatcher(model, load_device, loaded.offload_device, streamer.model_bytes)


def _check_file(path: str) -> None:
    """Read a safetensors header before the host does: its own message for a damaged file seldom names the file."""
    if not path.lower().endswith(SAFETENSORS_ENDINGS):
        return
    try:
        with safetensors.safe_open(path, framework="pt"):
            return
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated or of another type; "
            "check its size and download it again."
        ) from error


def _check_limit(vram_limit: int | None, streamer: Streamer, name: str) -> None:
    if vram_limit is not None and vram_limit < streamer.minimum_bytes:
        # Rounded up, so that the value in the message works when typed in.
        gib = -(-streamer.minimum_bytes * 1000 // GIB) / 1000
        raise BudgetError(
            f"vram_limit_gb={vram_limit / GIB:.3f} is too small for {name}: its largest block and what lies outside of "
            f"blocks need at least {gib:.3f}. Set vram_limit_gb to that or more, or to 0 for automatic.",
            streamer.minimum_bytes,
        )


def _load_by_host(path: str, model_options: dict, disable_dynamic: bool = False) -> ModelPatcher:
    try:
        return comfy.sd.load_diffusion_model(path, model_options=model_options, disable_dynamic=disable_dynamic)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Whatever a damaged file of any format makes its reader raise.
        if "Could not detect model type" in str(error):
            reason = "ComfyUI knows no diffusion model with these weights. A VAE, text encoder or LoRA belongs into "
            reason += "another folder and another loader"
        else:
            reason = "ComfyUI could not load it; it may be damaged or of another type"
        raise CheckpointError(f"{path}: {reason} ({type(error).__name__}: {error})") from error


def _model_dtype(module: torch.nn.Module, attribute: str, tensor: torch.Tensor) -> torch.dtype:
    """The dtype that the host built this tensor with, which a file's tensor that was only mapped may not have."""
    return getattr(module, f"{attribute}_comfy_model_dtype", None) or tensor.dtype


class _MappedModelPatcher(ModelPatcher):
    """Says that it is dynamic, so that the host keeps the parameters as views of the mapped file."""

    def is_dynamic(self) -> bool:
        return True


_mapping = threading.Lock()


@contextmanager
def _views_of_the_file() -> Iterator[None]:
    """Let the host load without copying the file into fresh memory.

    Whether it copies hangs on the class that ``comfy.model_patcher.CoreModelPatcher`` is at that moment and on nothing
    that a caller can pass, so this is replaced for the length of one call, for this thread. A copy would be made, and
    dropped, for every byte of the model.
    """
    with _mapping:
        before = comfy.model_patcher.CoreModelPatcher
        comfy.model_patcher.CoreModelPatcher = _for_this_thread(_MappedModelPatcher, before)
        try:
            yield
        finally:
            comfy.model_patcher.CoreModelPatcher = before


def _for_this_thread(ours: type[ModelPatcher], theirs: type[ModelPatcher]) -> type[ModelPatcher]:
    """A class that makes ``ours`` on the calling thread and ``theirs`` on any other."""
    caller = threading.get_ident()

    class Choice(theirs):
        def __new__(cls, *args: object, **kwargs: object) -> ModelPatcher:
            return (ours if threading.get_ident() == caller else theirs)(*args, **kwargs)

        def __init__(self, *args: object, **kwargs: object) -> None:
            """Whoever was made is no instance of this class, so this is never called."""

    return Choice
