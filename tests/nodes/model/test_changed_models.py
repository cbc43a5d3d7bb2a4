"""What somebody has written to a model, exchanged in it or hung on it counts, as with the host's own loader."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from placing import Machine, place
from prompts import output
from sampling import MB, MODEL, SIDE, TOKENS, with_lora
from sampling import sample as sample_in_steps
from torch import nn
from weightstream.nodes.loader import WEIGHT_DTYPES, load_streamed
from weightstream.nodes.model import following
from weightstream.nodes.model.patches import HostPatches
from weightstream.nodes.settings import AsyncOffloadSettings
from weightstream.streaming import GradientError, State
from writes import WRITES, Write, scale, take_bias_away, weights

import nodes as host_nodes

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[], Any]
Moment = Callable[[Make, Write], list[torch.Tensor]]


def sample(model: Any) -> torch.Tensor:
    """In two steps: the first after loading, and one that follows another. Most tests sample a MODEL several times."""
    return sample_in_steps(model, steps=2)


def from_host() -> Any:
    with torch.inference_mode():
        return host_nodes.UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture(scope="module")
def plain(native: Any) -> torch.Tensor:
    return sample(native)


@functools.cache
def written(write: Write) -> torch.Tensor:
    """What the host's own MODEL gives after this, whenever that was. Needs the fixture ``plain``, or any behind
    ``native``: the host's first sampling is thrown away."""
    model = from_host()
    change(model, write)
    return sample(model)


@pytest.fixture
def ways(models: Any, plain: torch.Tensor, machine: Machine) -> dict[str, Make]:
    """Every way to a streamed MODEL of the tiny FLUX."""

    def loader() -> Any:
        machine(1)
        with torch.inference_mode():
            return load_streamed(str(models / MODEL), {})

    def settings() -> Any:
        machine(1)
        with torch.inference_mode():
            return AsyncOffloadSettings.execute(from_host()).result[0]

    def split() -> Any:
        machine(2, 14 * MB)
        with torch.inference_mode():
            return place(load_streamed(str(models / MODEL), {}), split="equal")[0]

    return {"loader": loader, "settings": settings, "split": split}


def change(model: Any, write: Write) -> None:
    with torch.inference_mode():
        write(model)


def before_loading(make: Make, write: Write) -> list[torch.Tensor]:
    model = make()
    change(model, write)
    return [sample(model), sample(model)]


def while_loaded(make: Make, write: Write) -> list[torch.Tensor]:
    """Then for the next run, and when it was unloaded."""
    model = make()
    sample_in_steps(model, steps=3)  # From the third step on it has the plan that stays.
    change(model, write)
    latents = [sample(model)]
    mm.unload_all_models()
    return [*latents, sample(model), sample(model)]


def unloaded_at_once(make: Make, write: Write) -> list[torch.Tensor]:
    model = make()
    sample(model)
    change(model, write)
    mm.unload_all_models()
    return [sample(model), sample(model)]


def when_unloaded(make: Make, write: Write) -> list[torch.Tensor]:
    model = make()
    sample(model)
    mm.unload_all_models()
    return before_loading(lambda: model, write)


def with_patches_in(make: Make, write: Write) -> list[torch.Tensor]:
    """Patches go with what was written to the weights that they are in."""
    model = make()
    patched = with_lora(model, 0.8)
    sample(patched)
    change(model, write)
    latents = [sample(patched)]
    mm.unload_all_models()
    return [*latents, sample(patched), sample(model)]


CASES = [(write, moment) for moment in (before_loading, while_loaded) for write in WRITES]
CASES += [(write, unloaded_at_once) for write in ("scale", "change_one_number_by_data", "set_parameters")]
CASES += [(write, when_unloaded) for write in ("write_bytes", "write_by_pointers", "wrap_parameters", "normalise")]
WAYS = ("loader", "settings", "split")


@pytest.mark.parametrize(
    ("way", "write", "moment"),
    [(WAYS[number % len(WAYS)], *case) for number, case in enumerate(CASES)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_was_written_counts(
    ways: dict[str, Make], plain: torch.Tensor, way: str, write: str, moment: Moment
) -> None:
    expected = written(WRITES[write])
    assert not torch.equal(expected, plain)
    mm.unload_all_models()
    for found in moment(ways[way], WRITES[write]):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_written_to_weights_of_before_counts(ways: dict[str, Make], plain: torch.Tensor, way: str) -> None:
    """Somebody keeps what an unloaded model shows, and writes to that while the model points at copies."""
    expected = written(scale)
    assert not torch.equal(expected, plain)
    model = ways[way]()
    kept = weights(model)
    sample(model)
    with torch.inference_mode():
        for held in kept.values():
            held.mul_(1.5)  # As scale does.
    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize(("way", "write"), [*zip(WAYS, ("scale", "set_data", "load_state_dict"), strict=True)])
def test_what_was_written_counts_with_patches_in_it(
    ways: dict[str, Make], plain: torch.Tensor, way: str, write: str
) -> None:
    expected = with_patches_in(from_host, WRITES[write])
    assert not torch.equal(expected[0], plain)
    mm.unload_all_models()
    found = with_patches_in(ways[way], WRITES[write])
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


REPLACING = ("set_data", "wrap_parameters", "normalise", "take_bias_away")


@pytest.mark.parametrize(
    ("write", "moment"),
    [
        *(("scale", moment) for moment in (before_loading, while_loaded, unloaded_at_once, when_unloaded)),
        *((write, while_loaded) for write in REPLACING),
    ],
)
def test_the_host_does_not_ask_when_it_was_written(ways: dict[str, Make], write: str, moment: Moment) -> None:
    for found in moment(from_host, WRITES[write]):
        assert torch.equal(found, written(WRITES[write]))


@pytest.mark.parametrize("way", WAYS)
def test_what_nobody_has_changed_is_not_laid_out_anew(
    ways: dict[str, Make], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = []
    model = ways[way]()
    monkeypatch.setattr(following, "cut_model", lambda *_, **__: cuts.append(1))
    for each in (model, with_lora(model, 0.8), model):
        sample(each)
        model.model.state_dict()
        mm.unload_all_models()
        sample(each)
    assert cuts == []


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_were_handed_out_and_not_written_to_are_not_laid_out_anew(
    ways: dict[str, Make], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ways[way]()
    latents = sample(model)
    monkeypatch.setattr(following, "cut_model", None)
    for held in model.model.parameters():
        assert held.data.shape == held.shape
    assert torch.equal(sample(model), latents)


def test_a_write_between_two_loads_survives_memory_that_others_needed(ways: dict[str, Make]) -> None:
    expected = written(scale)
    mm.unload_all_models()
    model = ways["loader"]()
    sample(model)
    change(model, scale)
    model.partially_unload(model.offload_device, 1 << 40)
    model.streamer.give_up_masters(1 << 40)
    assert torch.equal(sample(model), expected)


def test_a_patched_parameter_beside_layers_keeps_its_value_as_with_the_host() -> None:
    model = from_host()
    model.model.diffusion_model.double_blocks[0].register_parameter("beside", nn.Parameter(torch.ones(4), False))
    model.add_patches({"diffusion_model.double_blocks.0.beside": (torch.ones(4),)})
    model.add_patches({"diffusion_model.img_in.bias": (torch.ones(256),)})
    patches = HostPatches(model, ())
    assert patches.signature("diffusion_model.double_blocks.0.beside") is None
    assert patches.signature("diffusion_model.img_in.bias") is not None


# -- layers ------------------------------------------------------------------------------------------------------------


def layer(seed: int, width: int = 256) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(width, width).requires_grad_(False)
    made.weight.copy_(torch.randn(width, width, generator=generator) * 0.02)
    made.bias.copy_(torch.randn(width, generator=generator) * 0.02)
    return made


def exchanged_by_a_patch(model: Any) -> Any:
    """A LoRA finds the layer that is there when the model is loaded."""
    model = with_lora(model, 0.8)
    old = model.get_model_object("diffusion_model.single_blocks.1.linear1")
    new = nn.Linear(old.in_features, old.out_features).requires_grad_(False)
    new.weight.copy_(old.weight)
    new.bias.copy_(old.bias * 2)
    model.add_object_patch("diffusion_model.single_blocks.1.linear1", new)
    return model


class Wrapped(nn.Module):
    """A block of a pack around one of the model's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.added = layer(5)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        x = self.inner(x, *args, **options)
        return x + self.added(x)


def wrapped_by_a_patch(model: Any) -> Any:
    model = with_lora(model, 0.8)
    inner = model.get_model_object("diffusion_model.single_blocks.2")
    model.add_object_patch("diffusion_model.single_blocks.2", Wrapped(inner))
    return model


class Watched(nn.Linear):
    moved = 0

    def _apply(self, *args: Any, **options: Any) -> Any:
        Watched.moved += 1
        return super()._apply(*args, **options)


def hung_on_the_model(model: Any) -> Any:
    """Layers that a pack adds, as PuLID does."""
    model = model.clone()
    root = model.model.diffusion_model
    root.hung = nn.ModuleList([Watched(256, 256).requires_grad_(False)])
    root.hung[0].load_state_dict(layer(6).state_dict())
    model.set_model_patch(lambda args: {**args, "img": args["img"] + root.hung[0](args["img"])}, "post_input")
    return model


def exchanged(model: Any, exchange: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        changed = exchange(model)
    return [sample(one) for one in (changed, model, changed)]


@functools.cache
def exchanged_by_the_host(exchange: Any) -> list[torch.Tensor]:
    return exchanged(from_host(), exchange)


@pytest.mark.parametrize("exchange", [exchanged_by_a_patch, wrapped_by_a_patch, hung_on_the_model])
@pytest.mark.parametrize("way", WAYS)
def test_layers_that_others_have_brought_run_with_their_patches(
    ways: dict[str, Make], plain: torch.Tensor, way: str, exchange: Any
) -> None:
    expected = exchanged_by_the_host(exchange)
    assert torch.equal(expected[1], plain)
    assert not torch.equal(expected[0], plain)
    mm.unload_all_models()
    Watched.moved = 0
    model = ways[way]()
    found = exchanged(model, exchange)
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * 3
    assert Watched.moved > 0 or exchange is not hung_on_the_model
    mm.unload_all_models()
    assert all(streamer.device_bytes == 0 for streamer in model.streamers)
    assert all(held.device.type == "cpu" for held in model.model.parameters())


def test_another_sampling_of_the_model_does_not_make_it_learn_anew(ways: dict[str, Make]) -> None:
    """Object patches that bring a few numbers come and go with every sampler."""
    model = ways["loader"]()
    sample(model)
    sample(model)
    assert model.streamer.profile.learned
    shifted = output(ModelSamplingFlux().patch(model, 1.3, 0.4, 1024, 1024))
    for each in (shifted, model):
        sample(each)
        assert model.streamer.profile.learned
        assert model.streamer.state is State.LOADED


# -- blocks that share weights -----------------------------------------------------------------------------------------


def tie_weights(model: Any) -> None:
    blocks = model.model.diffusion_model.single_blocks
    blocks[0].linear1.weight = blocks[3].linear1.weight


def tie_layers(model: Any) -> None:
    blocks = model.model.diffusion_model.single_blocks
    blocks[0].linear2 = blocks[3].linear2


@pytest.mark.parametrize(
    ("write", "moment"), [(tie_weights, before_loading), (tie_layers, before_loading), (tie_layers, while_loaded)]
)
def test_blocks_on_several_devices_that_come_to_share_weights_run_on_one(
    ways: dict[str, Make], plain: torch.Tensor, caplog: pytest.LogCaptureFixture, write: Write, moment: Moment
) -> None:
    expected = written(write)
    assert not torch.equal(expected, plain)
    mm.unload_all_models()
    model = ways["split"]()
    with caplog.at_level("INFO"):
        found = moment(lambda: model, write)
    assert all(torch.equal(one, expected) for one in found)
    assert "all blocks run on gpu:0: single_blocks.0 shares weights" in caplog.text.replace("diffusion_model.", "")
    assert [bool(streamer.blocks.blocks) for streamer in model.streamers] == [True, False]


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_in_the_place_of_another_does_not_go_with_the_copy_that_it_was_of(
    ways: dict[str, Make], way: str
) -> None:
    expected = written(tie_weights)
    mm.unload_all_models()
    model = ways[way]()
    sample(model)
    change(model, tie_weights)
    for _ in range(3):
        assert torch.equal(sample(model), expected)
        for streamer in model.streamers:
            streamer.give_up_masters(1 << 40)
        mm.unload_all_models()


def test_blocks_that_share_no_weights_any_more_run_on_several_devices(
    ways: dict[str, Make], plain: torch.Tensor
) -> None:
    model = ways["split"]()
    block = model.model.diffusion_model.single_blocks[0]
    before = block.linear2
    change(model, tie_layers)
    sample(model)
    block.linear2 = before
    for _ in range(3):
        mm.unload_all_models()
        assert torch.equal(sample(model), plain)
    assert all(streamer.blocks.blocks for streamer in model.streamers)


# -- before the first load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
def test_an_unloaded_model_shows_what_the_host_shows(models: Any, machine: Machine, weight_dtype: str) -> None:
    machine(1)
    with torch.inference_mode():
        theirs = host_nodes.UNETLoader().load_unet(MODEL, weight_dtype)[0].model.state_dict()
        model = load_streamed(str(models / MODEL), WEIGHT_DTYPES[weight_dtype])
    for _ in range(2):
        ours = model.model.state_dict()
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            found = ours[name]
            assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device), name
            assert torch.equal(found.float(), expected.float()), name
        sample(model)
        mm.unload_all_models()


def test_layers_of_an_unloaded_model_run_and_are_copied(ways: dict[str, Make], native: Any) -> None:
    mm.unload_all_models()
    root, theirs = ways["loader"]().model.diffusion_model, native.model.diffusion_model
    with torch.inference_mode():
        context = torch.ones(1, 4, 768)
        assert torch.equal(root.txt_in(context), theirs.txt_in(context))
        block = copy.deepcopy(root.single_blocks[1])
        assert type(block.linear1.weight) is nn.Parameter
        assert torch.equal(block.linear1.weight, theirs.single_blocks[1].linear1.weight)


# -- training ----------------------------------------------------------------------------------------------------------


def test_gradients_through_what_streams_are_refused(ways: dict[str, Make]) -> None:
    model = ways["loader"]()
    latents = sample(model)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 16, SIDE, SIDE, generator=generator).requires_grad_()
    inputs = {"context": torch.randn(1, TOKENS, 768, generator=generator), "y": torch.zeros(1, 768)}
    with torch.inference_mode():
        mm.load_models_gpu([model])
    with pytest.raises(GradientError, match=r"recorded through diffusion_model\.double_blocks\.\d, which streams"):
        model.model.diffusion_model(x, torch.tensor([0.5]), **inputs)
    assert torch.equal(sample(model), latents)


def weight_exchanged_by_a_patch(model: Any) -> Any:
    name = "diffusion_model.single_blocks.1.linear2.weight"
    model = with_lora(model, 0.8)
    other = model.get_model_object(name).detach().clone() * 1.5
    model.add_object_patch(name, nn.Parameter(other, requires_grad=False))
    return model


def in_this_order(model: Any, order: str) -> list[torch.Tensor]:
    with torch.inference_mode():
        exchanged = weight_exchanged_by_a_patch(model)
    return [sample(exchanged if one == "x" else model) for one in order]


@functools.cache
def in_this_order_by_the_host(order: str) -> list[torch.Tensor]:
    return in_this_order(from_host(), order)


@pytest.mark.parametrize("order", ["xx-x-", "-x-xx"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_an_object_patch_exchanges_has_patches_while_it_is_there(
    ways: dict[str, Make], way: str, order: str
) -> None:
    """ComfyUI patches it when it loads these patches, and not where the same MODEL runs twice without a break."""
    expected = in_this_order_by_the_host(order)
    mm.unload_all_models()
    found = in_this_order(ways[way](), order)
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(order)


# -- before the first run, and then on another device ------------------------------------------------------------------


def set_parameter(model: Any) -> None:
    layer = model.model.diffusion_model.single_blocks[1].linear2
    layer.weight = nn.Parameter(layer.weight.detach().clone() * 1.5, requires_grad=False)


def swap_weights(model: Any) -> None:
    one, other = (model.model.diffusion_model.single_blocks[number].linear2 for number in (0, 3))
    one.weight, other.weight = other.weight, one.weight


def tie_neighbours(model: Any) -> None:
    one, other = (model.model.diffusion_model.single_blocks[number].linear2 for number in (1, 2))
    one.weight = other.weight


@pytest.mark.parametrize("write", [set_parameter, swap_weights, tie_neighbours, take_bias_away, scale])
@pytest.mark.parametrize("inputs", [{"devices": "gpu:1"}, {"split": "equal"}], ids=["other", "split"])
def test_what_was_changed_before_it_was_placed_counts(
    models: Any, plain: torch.Tensor, machine: Machine, write: Write, inputs: dict[str, str]
) -> None:
    expected = written(write)
    assert not torch.equal(expected, plain)
    mm.unload_all_models()
    machine(2, 30 * MB)
    with torch.inference_mode():
        model = load_streamed(str(models / MODEL), {})
        write(model)
        placed = place(model, **inputs)[0]
    assert torch.equal(sample(placed), expected)
