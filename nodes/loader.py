"""The node "Streamed Model Loader", and loading a diffusion model for streaming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_detection
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..streaming import Checkpoint, CheckpointError, UnsupportedModelError, warm_up
from .changed_files import fingerprint_of
from .host.devices import make_backend
from .host.generators import GeneratorStates
from .host.hosts import made_with
from .host.mapped import SAFETENSORS_ENDINGS, mapped_loading, opened
from .model.offload import GIB, ROUND_GIB, STEP_GIB, OffloadSettings
from .model.patcher import StreamedModelPatcher
from .model.streamed_model import make_streamed
from .tell import messages
from .tell.failures import told_on_node
from .tell.names import shown_name
from .tell.notices import keep_notice

# The options of the host's Load Diffusion Model, and the model options that its loading function takes for each.
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}

ALIASES = ["load diffusion model", "unet", "unet loader", "vram", "low vram", "block swap", "offload", "distorch"]

# Folders of files that hold a diffusion model alone, and of files that hold text encoders and VAE too.
MODELS, CHECKPOINTS = "diffusion_models", "checkpoints"


class StreamedModelLoader(io.ComfyNode):
    """Loads a diffusion model whose blocks stream from page-locked RAM while the blocks before them compute.

    As many blocks as fit stay in VRAM. The images are the same as with Load Diffusion Model, to the bit. Takes files of
    the folders diffusion_models and checkpoints; CLIP and VAE come from a file of checkpoints alone. Of a model in
    several files (-00001-of-00003) choose any.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WeightStreamModelLoader",
            display_name="Streamed Model Loader",
            category="weightstream",
            description=cls.__doc__,
            search_aliases=ALIASES,
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=_model_files(),
                    tooltip="A file of models/diffusion_models or models/checkpoints.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    advanced=True,
                    tooltip="As in Load Diffusion Model. default leaves it to ComfyUI.",
                ),
                io.Float.Input(
                    "vram_limit_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=STEP_GIB,
                    round=ROUND_GIB,
                    optional=True,
                    tooltip="VRAM for the model's weights, in GiB. 0 uses what ComfyUI offers.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model, streamed."),
                io.Clip.Output(tooltip="The text encoder, from a file of models/checkpoints alone."),
                io.Vae.Output(tooltip="The VAE, from a file of models/checkpoints alone."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str = "", **_: Any) -> str:
        """The node runs again when the file was changed."""
        return fingerprint_of(unet_name, _path_of(unet_name)) if _is_safetensors(unet_name) else ""

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, vram_limit_gb: float = 0.0) -> io.NodeOutput:
        options = WEIGHT_DTYPES[weight_dtype]
        limit = int(vram_limit_gb * GIB) if vram_limit_gb > 0 else None
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        with told_on_node(unet_name, node_id):
            if path := folder_paths.get_full_path(MODELS, unet_name):
                return io.NodeOutput(load_streamed(path, options, limit, node_id), None, None)
            path = folder_paths.get_full_path_or_raise(CHECKPOINTS, unet_name)
            model = load_streamed(path, options, limit, node_id, full_checkpoint=True)
            return io.NodeOutput(model, *_load_companions(path))


def _path_of(name: str) -> str | None:
    return folder_paths.get_full_path(MODELS, name) or folder_paths.get_full_path(CHECKPOINTS, name)


def _model_files() -> list[str]:
    """The files to choose from. If both folders have a file of the same name, that of diffusion_models is used."""
    names = folder_paths.get_filename_list(MODELS)
    return names + [name for name in folder_paths.get_filename_list(CHECKPOINTS) if name not in names]


def load_streamed(
    path: str,
    model_options: dict,
    vram_limit: int | None = None,
    node_id: str | None = None,
    full_checkpoint: bool = False,
    **options: Any,
) -> ModelPatcher:
    """Load the diffusion model at ``path`` for streaming, or the host's way if it cannot stream, which is reported.

    Args:
        path: the checkpoint; of a sharded one any shard or the index.
        model_options: as :func:`comfy.sd.load_diffusion_model` takes them.
        vram_limit: bytes of VRAM for weights; None takes what the host offers.
        node_id: where to show progress and plan.
        full_checkpoint: the file holds text encoders and VAE too, which stay where they are.
        options: what the host passes when it loads the same model again, for its own loaders (``disable_dynamic`` asks
            for a patcher without dynamic VRAM, which a streamed one never has).

    Raises:
        CheckpointError: the file is damaged, or holds no model that the host knows.
        BudgetError: ``vram_limit`` has no room for the largest block.
    """
    name = shown_name(path)
    weights = _open(path)
    generators = GeneratorStates()
    try:
        settings = OffloadSettings(vram_limit=vram_limit)
        patcher = _load_for_streaming(weights, full_checkpoint, model_options, settings, node_id)
    except UnsupportedModelError as error:
        text = f"not streamed, loaded ComfyUI's own way: {error}"
        messages.announce(name, text, node_id)
        generators.restore()
        patcher = load_unstreamed(path, model_options, full_checkpoint, **options)
        keep_notice("inactive", name, text, node_id, patcher.model)
        if not weights.sharded:
            return patcher  # It has the host's own factory.
    patcher.cached_patcher_init = (load_streamed, (path, model_options, vram_limit, node_id, full_checkpoint))
    return patcher


def _load_for_streaming(
    weights: _Weights, full_checkpoint: bool, model_options: dict, settings: OffloadSettings, node_id: str | None
) -> StreamedModelPatcher:
    load_device = model_options.get("load_device", mm.get_torch_device())
    warm_up(make_backend(load_device).device, _computing_dtype(weights.tensors))
    with mapped_loading():
        loaded = _load_by_host(weights, full_checkpoint, model_options)
    model, name = loaded.model, shown_name(weights.path)
    streamed = make_streamed(model, model.diffusion_model, loaded.load_device, name, weights.locate, settings, node_id)
    streamed.load_by_host = partial(load_unstreamed, weights.path, model_options, full_checkpoint)
    patcher = StreamedModelPatcher(model, **{**made_with(loaded), "size": streamed.streamer.model_bytes})
    patcher.settings, patcher.node_id = settings, node_id
    return patcher


@dataclass(frozen=True)
class _Weights:
    """What a file holds, as the host's functions take it.

    Attributes:
        path: the file.
        tensors, metadata: its tensors, views of the mapped file where it is a safetensors file, and its metadata.
        locate: finds the part of the file that a tensor maps.
        files: the files that hold the tensors; if ``path`` is an index it is not among them.
    """

    path: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] | None
    locate: Callable[[torch.Tensor], Any]
    files: tuple[str, ...]

    @property
    def sharded(self) -> bool:
        return len(self.files) > 1


def _open(path: str) -> _Weights:
    """Open the file, whatever its type."""
    if _is_safetensors(path):
        checkpoint = Checkpoint.open(path)
        files = tuple(file.path for file in checkpoint.files)
        return _Weights(path, opened(checkpoint), checkpoint.metadata, checkpoint.locate, files)
    with _named_errors(path):
        tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    return _Weights(path, tensors, metadata, lambda tensor: None, (path,))


def _is_safetensors(path: str) -> bool:
    return path.lower().endswith((*SAFETENSORS_ENDINGS, ".index.json"))


def _load_companions(path: str) -> tuple[Any, Any]:
    """The text encoders and the VAE of a full checkpoint, loaded the host's way; None for what the file lacks."""
    weights = _open(path) if _is_safetensors(path) else None
    if weights is not None and _is_bare(weights.tensors):
        return None, None
    options = {
        "output_vae": True,
        "output_clip": True,
        "output_model": False,
        "embedding_directory": folder_paths.get_folder_paths("embeddings"),
    }
    with _named_errors(path):
        if weights is not None and weights.sharded:
            found = comfy.sd.load_state_dict_guess_config(dict(weights.tensors), metadata=weights.metadata, **options)
        else:
            found = comfy.sd.load_checkpoint_guess_config(path, **options)
    _, clip, vae, *_ = found
    return clip, vae


def _is_bare(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the file holds a diffusion model alone: the host would load that a second time and find nothing else."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    return not any(name.startswith(prefix) for name in tensors)


def _load_by_host(weights: _Weights, full_checkpoint: bool, model_options: dict, **options: Any) -> ModelPatcher:
    """What Load Diffusion Model and Load Checkpoint do with the tensors of their file."""
    tensors = dict(weights.tensors)  # The host removes what it has used.
    options = {"model_options": model_options, "metadata": weights.metadata, **options}
    with _named_errors(weights.path):
        if full_checkpoint:
            found = comfy.sd.load_state_dict_guess_config(tensors, output_vae=False, output_clip=False, **options)
            model = found[0] if found is not None else None
        else:
            model = comfy.sd.load_diffusion_model_state_dict(tensors, **options)
    if model is None:
        raise CheckpointError(
            f"{weights.path}: ComfyUI knows no diffusion model with these weights. A VAE, text encoder or LoRA belongs "
            "into another folder and another loader"
        )
    return model


def load_unstreamed(path: str, model_options: dict, full_checkpoint: bool, **options: Any) -> ModelPatcher:
    """Load a model as the host does without our loader. The host cannot open a model in several files; we do that."""
    if _is_safetensors(path):
        weights = _open(path)
        if weights.sharded:
            return _load_by_host(weights, full_checkpoint, model_options, **options)
        (path,) = weights.files
    options = {"model_options": model_options, **options}
    with _named_errors(path):
        if full_checkpoint:
            return comfy.sd.load_checkpoint_guess_config_model_only(path, **options)
        return comfy.sd.load_diffusion_model(path, **options)


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Have errors of the host's functions name the file, as :class:`CheckpointError`; out of memory stays as it is."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:  # Whatever a damaged file of any format makes its reader raise.
        raise CheckpointError(
            f"{path}: ComfyUI could not load it; it may be damaged or of another type ({type(error).__name__}: {error})"
        ) from error


def _computing_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Guess what dtype the host will compute in: that of most bytes of weights, or bfloat16 if the host casts it."""
    nbytes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    [(dtype, _)] = nbytes.most_common(1) or [(torch.bfloat16, 0)]
    return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
