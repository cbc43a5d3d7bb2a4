"""MODELs from GGUF files, as the pack for such files makes them: streamed, with LoRA, and on two devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.float
import comfy.lora
import comfy.model_management as mm
import comfy.ops
import comfy.sd
import comfy.utils
import gguf
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from gguf import GGMLQuantizationType as Kind
from placing import Machine, place
from sampling import MB, MODEL, sample, with_lora
from weightstream.nodes.model.offload import Mode, OffloadSettings
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.settings import with_settings
from weightstream.streaming import VirtualMemory

pytestmark = pytest.mark.usefixtures("one_thread")

# Of these torch has a dtype: the pack patches such weights for good, and leaves patches on all others.
UNPACKED = (Kind.F32, Kind.F16)


class PackedTensor(torch.Tensor):
    """What a file holds, and the shape of its values."""

    tensor_type: Kind
    tensor_shape: torch.Size
    patches: list

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()

    def to(self, *args: Any, **kwargs: Any) -> PackedTensor:
        new = super().to(*args, **kwargs)
        new.tensor_type, new.tensor_shape = (
            getattr(self, "tensor_type", None),
            getattr(self, "tensor_shape", new.size()),
        )
        new.patches = list(getattr(self, "patches", []))
        return new

    def detach(self) -> PackedTensor:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> PackedTensor:
        return self


def pack(values: torch.Tensor, kind: Kind) -> PackedTensor:
    data = torch.from_numpy(gguf.quants.quantize(values.float().numpy(), kind)).as_subclass(PackedTensor)
    data.tensor_type, data.tensor_shape, data.patches = kind, values.shape, []
    return data


def is_packed(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and getattr(tensor, "tensor_type", None) not in (None, *UNPACKED)


class PackedOps(comfy.ops.manual_cast):
    """The host's layers, but for linear ones, which take packed weights."""

    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, **_: Any) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
            for name in ("weight", "bias"):
                if (value := state_dict.get(prefix + name)) is not None:
                    setattr(self, name, torch.nn.Parameter(value, requires_grad=False))

        def forward_comfy_cast_weights(self, x: torch.Tensor) -> torch.Tensor:
            if not (is_packed(self.weight) or is_packed(self.bias)):
                return torch.Tensor(super().forward_comfy_cast_weights(x))
            bias = None if self.bias is None else unpack(self.bias, x.dtype)
            return torch.nn.functional.linear(x, unpack(self.weight, x.dtype), bias)


def unpack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values, with what is left on the weight applied: in its own memory where nothing is unpacked."""
    if is_packed(weight):
        values = gguf.quants.dequantize(weight.as_subclass(torch.Tensor).numpy(), weight.tensor_type)
        found = torch.from_numpy(values).reshape(weight.tensor_shape).to(dtype)
    else:
        found = weight.as_subclass(torch.Tensor).to(dtype)
    for patches, name in getattr(weight, "patches", []):
        found = comfy.lora.calculate_weight(patches, found, name)
    return found


class PackedPatcher(ModelPatcher):
    """Leaves patches on packed weights, and computes those of others in float32."""

    def patch_weight_to_device(
        self, key: str, device_to: torch.device | None = None, inplace_update: bool = False
    ) -> None:
        if key not in self.patches:
            return
        weight = comfy.utils.get_attr(self.model, key)
        if is_packed(weight):
            patched = weight.to(device_to)
            patched.patches = [(self.patches[key], key)]
        else:
            self.backup.setdefault(key, Kept(weight.to(self.offload_device), inplace_update))
            patched = weight.to(device_to, torch.float32, copy=True)
            patched = comfy.lora.calculate_weight(self.patches[key], patched, key)
            patched = comfy.float.stochastic_rounding(patched, weight.dtype)
        comfy.utils.set_attr_param(self.model, key, patched)

    def unpatch_model(self, *args: Any, unpatch_weights: bool = True, **kwargs: Any) -> None:
        if unpatch_weights:
            for weight in filter(is_packed, self.model.parameters()):
                weight.patches = []
        super().unpatch_model(*args, unpatch_weights=unpatch_weights, **kwargs)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:
        super().load(*args, force_patch_weights=True, **kwargs)


class Kept(NamedTuple):
    """What the host restores."""

    weight: torch.Tensor
    inplace_update: bool


# What the weights of blocks are packed as, by what a name holds; of other matrices, and of vectors.
FILES: dict[str, tuple[dict[str, Kind], Kind, Kind]] = {
    "F16": ({"": Kind.F16}, Kind.F16, Kind.F32),
    "Q8_0": ({"": Kind.Q8_0}, Kind.F16, Kind.F32),
    "BF16": ({"": Kind.BF16}, Kind.BF16, Kind.F32),
    "mixed": ({"attn.proj": Kind.F16, "modulation": Kind.F32, "linear2": Kind.Q5_1, "": Kind.Q8_0}, Kind.F16, Kind.F32),
}


EVERY_FILE = pytest.mark.parametrize("packed", FILES, indirect=True)
ONE_FILE = pytest.mark.parametrize("packed", ["mixed"], indirect=True)


@pytest.fixture
def packed(request: pytest.FixtureRequest, models: Path) -> ModelPatcher:
    """The tiny FLUX from a GGUF file of one kind."""
    in_blocks, matrices, vectors = FILES[request.param]
    weights: dict[str, torch.Tensor] = {}
    for name, weight in comfy.utils.load_torch_file(str(models / MODEL)).items():
        kind = matrices if weight.ndim > 1 else vectors
        if weight.ndim > 1 and "_blocks." in name:
            kind = next(kind for part, kind in in_blocks.items() if part in name)
        weights[name] = pack(weight, kind)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"custom_operations": PackedOps})
        return PackedPatcher(model.model, model.load_device, model.offload_device)


def with_full_lora(model: Any, strength: float) -> Any:
    """A LoRA on every matrix, and a difference on every bias."""
    generator = torch.Generator().manual_seed(11)
    lora = {}
    for name, weight in model.model.diffusion_model.named_parameters():
        layer, _, kind = f"diffusion_model.{name}".rpartition(".")
        shape = weight.shape
        if kind == "bias":
            lora[f"{layer}.diff_b"] = 0.02 * torch.randn(shape, generator=generator)
        elif len(shape) == 2:
            lora[f"{layer}.lora_A.weight"] = 0.05 * torch.randn(4, shape[1], generator=generator)
            lora[f"{layer}.lora_B.weight"] = 0.05 * torch.randn(shape[0], 4, generator=generator)
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


class Expected(NamedTuple):
    """What the pack's own MODEL gives: plain, with LoRA, and with another strength in more steps."""

    plain: torch.Tensor
    strong: torch.Tensor
    long: torch.Tensor


@pytest.fixture
def expected(packed: ModelPatcher) -> Expected:
    sample(packed)  # The host's first sampling in a process may differ from all of its later ones.
    found = Expected(
        sample(packed),
        sample(with_full_lora(packed, 0.7)),
        sample(with_full_lora(packed, -0.3), steps=5),
    )
    assert not torch.equal(found.plain, found.strong)
    return found


def check(model: Any, expected: Expected, add: Callable[[Any, float], Any] = with_full_lora) -> None:
    """Each result is the pack's own, whatever was in the weights before."""
    assert torch.equal(sample(model), expected.plain)
    assert torch.equal(sample(add(model, 0.7)), expected.strong)
    assert torch.equal(sample(add(model, -0.3), steps=5), expected.long)
    assert torch.equal(sample(model), expected.plain)


@EVERY_FILE
def test_a_model_from_a_gguf_file_streams_with_lora(
    packed: ModelPatcher, expected: Expected, virtual_device: Callable[[int], VirtualMemory]
) -> None:
    virtual_device(9 * MB)
    model = with_settings(packed, OffloadSettings())
    assert isinstance(model, StreamedModelPatcher)
    check(model, expected)
    assert torch.equal(sample(packed), expected.plain), "what came in is as it was"
    status = model.status()
    assert status["mode"] == "streamed"
    assert status["counters"]["streamed_bytes"] > 0


@ONE_FILE
def test_a_lora_in_front_of_the_settings_is_carried_over(
    packed: ModelPatcher, expected: Expected, virtual_device: Callable[[int], VirtualMemory]
) -> None:
    virtual_device(9 * MB)
    check(
        with_settings(packed, OffloadSettings()),
        expected,
        lambda _, strength: with_settings(with_full_lora(packed, strength), OffloadSettings()),
    )


@ONE_FILE
def test_it_is_unloaded_and_loaded_again(
    packed: ModelPatcher, expected: Expected, virtual_device: Callable[[int], VirtualMemory]
) -> None:
    virtual_device(9 * MB)
    model = with_settings(packed, OffloadSettings())
    patched = with_full_lora(model, 0.7)
    assert torch.equal(sample(patched), expected.strong)
    patched.detach()
    assert torch.equal(sample(with_full_lora(packed, 0.7)), expected.strong)
    model.streamer.close()
    assert torch.equal(sample(model), expected.plain)
    assert torch.equal(sample(patched), expected.strong)


@ONE_FILE
def test_it_is_split_over_two_devices(packed: ModelPatcher, expected: Expected, machine: Machine) -> None:
    machine(2, 7 * MB)
    model = place(packed, split="equal")[0]
    assert model.parts
    check(model, expected)


@ONE_FILE
def test_a_gpus_dtype_for_lora_is_not_the_packs(
    packed: ModelPatcher,
    expected: Expected,
    virtual_device: Callable[[int], VirtualMemory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    virtual_device(9 * MB)
    monkeypatch.setattr(mm, "lora_compute_dtype", lambda device: torch.float16)
    model = with_settings(packed, OffloadSettings())
    assert torch.equal(sample(with_full_lora(model, 0.7)), expected.strong)


@ONE_FILE
@pytest.mark.parametrize("settings", [False, True], ids=["", "behind the settings"])
@pytest.mark.parametrize("devices", ["gpu:1", "gpu:0,gpu:1"])
def test_a_model_of_packed_weights_is_placed(
    packed: ModelPatcher, machine: Machine, settings: bool, devices: str
) -> None:
    """No loader of such files leaves word how to load one once more."""
    expected, expected_with_lora = sample(packed), sample(with_lora(packed, 0.7))
    memories = machine(2, 9 * MB)
    model = place(with_settings(packed, OffloadSettings()) if settings else packed, devices=devices, split="equal")[0]
    for _ in range(2):
        assert torch.equal(sample(model), expected)
        assert torch.equal(sample(with_lora(model, 0.7)), expected_with_lora)
    assert [memory.allocated > 0 for memory in memories] == [devices != "gpu:1", True]
    back = with_settings(model, OffloadSettings(Mode.OFF))
    assert torch.equal(sample(back), expected)
    assert torch.equal(sample(packed), expected), "what came in is as it was"
