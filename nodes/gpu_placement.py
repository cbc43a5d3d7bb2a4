"""The node "GPU Placement": which GPUs a MODEL, a CLIP and a VAE use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..streaming import ConfigError, UnsupportedModelError, gpu_name, listed, parse_device
from ..streaming.machine.device_names import CPU, DEFAULT
from .changed_files import count_outdated
from .host.gpus import BITS, EXACT, PARALLEL, SPLITS, Choice, choose, not_there, visible_gpus, wanted_gpus, why_no_gpus
from .model.objections import keep_objection
from .model.parts import OneDeviceError
from .model.patcher import StreamedModelPatcher
from .model.streamed_model import PARALLEL_NOTICE
from .parallel.copies import in_parallel
from .tell import messages
from .tell.failures import told_on_node
from .tell.notices import keep_notice, withdraw_notice
from .twins.components import clip_on, model_on
from .twins.split import split_over
from .twins.vae import vae_on

NAME = "GPU Placement"
ALIASES = ["multi gpu", "multigpu", "distorch", "device", "cuda", "vram", "low vram", "offload"]


class DeviceChoices(list[str]):
    """The names in the menu. ComfyUI asks them whether it may run a prompt, so they have every name of a device.

    The menu is the same on every machine, and a workflow from a machine with more GPUs runs on one with fewer.
    """

    def __contains__(self, name: object) -> bool:
        try:
            parse_device(str(name))
        except ConfigError:
            return super().__contains__(name)
        return True


DEVICES = DeviceChoices([DEFAULT, CPU, *map(gpu_name, range(8))])

# Added to the text when the model of another loader has to stream (components.py).
STREAMS = ", where it streams, since its loader does not give it once more as it is"

T = TypeVar("T")


class GpuPlacement(io.ComfyNode):
    """Chooses the GPUs that a MODEL uses, and the device of the text encoder (CLIP) and of the VAE.

    One GPU takes the MODEL whole. Over several its blocks are split; with split=parallel each has all of it, and they
    work on a step at the same time. A workflow of a machine with more GPUs runs on one with fewer, or with none, and
    the node says what is used instead. The images are the same.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WeightStreamGPUPlacement",
            display_name="GPU Placement",
            category="weightstream",
            description=cls.__doc__,
            search_aliases=ALIASES,
            # All but the first are optional: the host lists required inputs before optional ones.
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL. Connect the node directly behind its loader."),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder that clip_device is for."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE that vae_device is for."),
                io.String.Input(
                    "devices",
                    default="",
                    optional=True,
                    tooltip="For the MODEL, the preferred one first: gpu:0,gpu:1 (or cuda:0, or 0). Empty is "
                    "WEIGHTSTREAM_GPUS, or all.",
                ),
                io.Combo.Input(
                    "split",
                    options=list(SPLITS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="How much each of several GPUs gets: auto by memory and speed, equal, or as ratio says. "
                    "With parallel each has the whole MODEL, and they work on a step at the same time.",
                ),
                io.String.Input(
                    "ratio",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="For split=ratio, or the tokens of split=parallel: a number for each GPU, as 60,40.",
                ),
                _device("clip_device", "the text encoder"),
                _device("vae_device", "the VAE"),
                io.Combo.Input(
                    "on_missing",
                    options=["fallback", "error"],
                    default="fallback",
                    optional=True,
                    advanced=True,
                    tooltip="Where a GPU is not there: use those that are, and say so, or stop.",
                ),
                io.Combo.Input(
                    "parallel_bits",
                    options=list(BITS),
                    default=EXACT,
                    optional=True,
                    advanced=True,
                    tooltip="For split=parallel. exact: the first step is compared with that of one GPU; where a bit "
                    "differs, one GPU works on. close: nothing is compared, and images may differ a little.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL, on the GPUs that were chosen."),
                io.Clip.Output(tooltip="The CLIP, on clip_device."),
                io.Vae.Output(tooltip="The VAE, on vae_device."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, devices: str | None = "") -> bool | str:
        """Whether the list can be read. Which devices exist is checked when the node runs.

        ComfyUI repeats what this returns for each input that it takes, so it takes one. ComfyUI looks at the menus
        itself, and the ratio is read when the node runs. A value that comes from another node is None here.
        """
        try:
            wanted_gpus(devices or "")
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> tuple[str | int, ...]:
        """The node runs again when GPUs have come or gone, and when a model's file was changed."""
        return (*visible_gpus(), count_outdated())

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: Any = None,
        vae: Any = None,
        devices: str = "",
        split: str = "auto",
        ratio: str = "",
        clip_device: str = DEFAULT,
        vae_device: str = DEFAULT,
        on_missing: str = "fallback",
        parallel_bits: str = EXACT,
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id if cls.hidden is not None else None
        placing = Placing(visible_gpus(), on_missing == "error", node_id)
        with told_on_node(NAME, node_id):
            choice = choose(devices, split, ratio, list(placing.gpus))
            names = parse_device(clip_device, "clip_device"), parse_device(vae_device, "vae_device")
            placing.check(choice, *names)
            if placing.gpus:
                model = placing.place_model(model, choice, split, parallel_bits == EXACT)
                clip = placing.place("CLIP", clip, names[0], clip_on)
                vae = placing.place("VAE", vae, names[1], vae_on)
        if not placing.gpus:
            placing.fall_back(
                f"placement is not available here, {why_no_gpus()}; everything stays where its loader put it"
            )
        text = "; ".join(placing.said)
        messages.announce(NAME, text, node_id)
        for notice in (NAME, PARALLEL_NOTICE):
            withdraw_notice(notice, node_id)
        if placing.fell_back:
            keep_notice("fallback", NAME, text, node_id, model.model)
        return io.NodeOutput(model, clip, vae)


def _device(name: str, what: str) -> io.Combo.Input:
    tooltip = f"Where {what} runs. default leaves it where its loader put it."
    return io.Combo.Input(name, options=DEVICES, default=DEFAULT, optional=True, tooltip=tooltip)


@dataclass
class Placing:
    """One run of the node.

    Attributes:
        gpus: the GPUs of this machine, by name.
        strict: whether a missing device is an error.
        node_id: the id of the node.
        said: texts for the user, in order.
        fell_back: whether something is in another place than the user asked for.
    """

    gpus: Mapping[str, torch.device]
    strict: bool
    node_id: str | None
    said: list[str] = field(default_factory=list)
    fell_back: bool = False

    def say(self, text: str) -> None:
        self.said.append(text)

    def fall_back(self, text: str) -> None:
        self.say(text)
        self.fell_back = True

    def check(self, choice: Choice, *devices: str) -> None:
        """Report the devices that are missing.

        Raises:
            ConfigError: some are missing, and ``strict`` is set.
        """
        named = [name for name in devices if name not in (CPU, DEFAULT, *self.gpus)]
        missing = list(dict.fromkeys([*choice.missing, *named]))
        if not missing:
            return
        text = not_there(missing, list(self.gpus))
        if self.strict:
            raise ConfigError(f"{text}; choose among these, or set on_missing to fallback")
        self.fall_back(text)

    def place_model(self, model: ModelPatcher, choice: Choice, split: str, exact: bool = True) -> ModelPatcher:
        """Place the MODEL on the chosen GPUs; if it cannot be split, on the one that has room for it, or the first."""
        if not choice.names:
            self.say("MODEL stays where its loader put it")
            return model
        if split == PARALLEL:
            try:
                devices = [self.gpus[name] for name in choice.names]
                placed = in_parallel(model, devices, self.node_id, exact, choice.shares)
            except UnsupportedModelError as error:
                self.fall_back(f"MODEL does not work in parallel, {error}")
                placed = self.place_model(model, replace(choice, shares=None), SPLITS[0])
                if isinstance(placed, StreamedModelPatcher):
                    keep_objection(placed.streamed.title, str(error))
                return placed
            self.say(f"MODEL on {listed(choice.names)} at the same time ({PARALLEL}){'' if exact else ', close'}")
            return placed
        if len(choice.names) > 1:
            devices = [self.gpus[name] for name in choice.names]
            try:
                placed, left_out, feeds = split_over(model, devices, split, choice.shares, self.node_id)
            except OneDeviceError as error:
                self.fall_back(f"MODEL is not split, {error}")
                return self.place("MODEL", model, choice.names[error.device], model_on)
            except UnsupportedModelError as error:
                self.fall_back(f"MODEL is not split, {error}")
            else:
                used = [name for place, name in enumerate(choice.names) if place not in left_out]
                names = ", ".join(used)
                self.say(f"MODEL on {used[0]}, weights over {names}" if feeds else f"MODEL on {names}")
                for place, reason in sorted(left_out.items()):
                    self.fall_back(f"{choice.names[place]} is left out, {reason}")
                return placed
        return self.place("MODEL", model, choice.names[0], model_on)

    def place(self, what: str, thing: T, name: str, move: Callable[[T, torch.device], T]) -> T:
        """Return ``thing`` on the device ``name``; unchanged if it cannot be moved, or if there is no such device."""
        if thing is None or name == DEFAULT:
            return thing
        if name != CPU and name not in self.gpus:
            self.fall_back(f"{what} stays where its loader put it")
            return thing
        try:
            placed = move(thing, torch.device(CPU) if name == CPU else self.gpus[name])
        except UnsupportedModelError as error:
            self.fall_back(f"{what} stays where its loader put it, {error}")
            return thing
        self.say(f"{what} on {name}{STREAMS if _streams(placed) and not _streams(thing) else ''}")
        return placed


def _streams(thing: Any) -> bool:
    return isinstance(getattr(thing, "patcher", thing), StreamedModelPatcher)
