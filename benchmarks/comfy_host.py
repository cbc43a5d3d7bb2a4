"""ComfyUI in this process, without its server: started as its main.py does, with our pack loaded as it loads packs."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_versions

ROOT = Path(__file__).resolve().parents[1]


def start(comfyui: Path, flags: list[str]) -> None:
    """Parse ``flags`` as ComfyUI's command line and start its engine.

    The order is main.py's: arguments, aimdo, the allocator's settings, and only then torch. aimdo hooks CUDA's
    allocator when it is loaded and must come first.
    """
    if "torch" in sys.modules:
        raise RuntimeError("start ComfyUI before anything imports torch")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", *flags]
    stand_in_for_missing("av")
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.cli_args import args, enables_dynamic_vram

    if enables_dynamic_vram():
        _load_aimdo(args)
    import cuda_malloc  # noqa: F401  (chooses PYTORCH_CUDA_ALLOC_CONF when imported)

    if enables_dynamic_vram():
        _enable_dynamic_vram(args)


def _load_aimdo(args: Any) -> None:
    import comfy_aimdo.control

    headroom = None if args.reserve_vram is None else int(args.reserve_vram * 1024**3)
    comfy_aimdo.control.init(simple_vram_headroom=headroom, nvml_pressure=not args.disable_nvml_pressure)


def _enable_dynamic_vram(args: Any) -> None:
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    if not comfy.model_management.is_nvidia():
        return
    headroom = int(args.vram_headroom * 1024**3)
    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices((device.index, headroom) for device in devices):
        raise RuntimeError("comfy-aimdo did not start, so there is no dynamic VRAM to measure")
    comfy_aimdo.control.set_log_info()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def end_of_node() -> None:
    """What ComfyUI's executor does after every node when dynamic VRAM is on."""
    import comfy.memory_management

    if comfy.memory_management.aimdo_enabled:
        for call in _calls_at_end_of_node():
            call()


def end_of_prompt() -> None:
    """What ComfyUI's server does between two prompts, if it did not do so in the ten seconds before."""
    import comfy.model_management as mm

    gc.collect()
    mm.soft_empty_cache()


@functools.cache
def _calls_at_end_of_node() -> tuple[Callable[[], None], ...]:
    import comfyui_version

    names = [name.rpartition(".") for name in host_versions.end_of_node(Path(comfyui_version.__file__).parent)]
    return tuple(getattr(importlib.import_module(module), function) for module, _, function in names)


def load_pack(node_id: str, name: str = "weightstream_pack") -> type:
    """The pack's node ``node_id``, from a folder that is loaded by its file location as every custom node is.

    Its modules are those of a package ``name``.
    """
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    for node in asyncio.run(_node_list(sys.modules[name])):
        if node.GET_SCHEMA().node_id == node_id:
            return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    raise RuntimeError(f"the pack has no node {node_id}")


async def _node_list(module: types.ModuleType) -> list[type]:
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    return await extension.get_node_list()


class _Absent(types.ModuleType):
    """A module whose every attribute is a class: enough for imports and annotations, useless for work."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        ours = name == self.package or name.startswith(f"{self.package}.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for_missing(package: str) -> None:
    """Let ``package`` be imported where it is not installed.

    ComfyUI's node API imports a video library at its top. A machine without network may lack it, and no video is made
    here.
    """
    if importlib.util.find_spec(package) is None:
        sys.meta_path.append(_AbsentFinder(package))
