"""What GPUs compute at the same time is compared with what one computes, once; where bits differ one GPU works on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import comfy.controlnet
import comfy.model_management as mm
import folder_paths
import pytest
import torch
from comfy.conds import CONDConstant
from comfy.model_patcher import ModelPatcher
from comfy.multigpu import MultiGPUThreadPool
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode
from controlnets import CONTROLNET, write_controlnet
from parallel import LONG, apart, close_all, copies_of, parallel, runs_of
from placing import Machine, place
from prompts import conditioning, guided, latent, output
from sampling import MB
from steps_run import counted
from weightstream.nodes.model.streamed_model import PARALLEL_NOTICE
from weightstream.nodes.page.status import full_status
from weightstream.nodes.parallel import host_threads, step, step_kinds
from weightstream.nodes.parallel import verdicts as verdicts_file
from weightstream.nodes.parallel.verified import verdicts
from weightstream.nodes.tell.notices import describe_notices

import nodes as host_nodes

OTHER_BITS = "a step gave other bits than on one GPU (by "
KEEPS_STATE = "some node keeps state from step to step"


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    verdicts.clear()
    yield
    close_all()


def test_other_bits_are_found_in_the_first_step(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU a batch of two gives other bits than two batches of one, and so do some of the tokens."""
    expected, runs = guided(native), counted(monkeypatch)
    model = parallel(loaded)
    assert torch.equal(guided(model), expected)
    assert runs == [*["alone", "together"] * 4, "alone"], "twice by prompts, then twice by tokens"
    assert model.streamed.alone.startswith(OTHER_BITS)
    with caplog.at_level("INFO"):
        assert torch.equal(guided(model), expected)
    assert runs[9:] == ["alone"] * 3, "it is known"
    assert runs_of(model) == [3, 0]
    (notice,) = describe_notices()
    assert notice["kind"] == "fallback"
    assert notice["text"].startswith(f"tiny-flux.safetensors works on gpu:0 alone, not in parallel: {OTHER_BITS}")
    assert notice["text"] not in caplog.text, "it is said once"
    entries = [entry for entry in full_status()["models"] if entry["id"] == str(model.streamed.number)]
    assert [entry["device"] for entry in entries] == ["gpu:0", "gpu:1"]
    for entry in entries:
        assert entry["parallel"]["devices"] == ["gpu:0", "gpu:1"]
        assert entry["parallel"]["alone"].startswith(OTHER_BITS)


@pytest.mark.parametrize("device", [0, 1])
def test_what_a_gpu_computes_first_may_be_another_number(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    """As the first attention in a process is on an H200. What the first GPU gives is the step's result all the same."""
    expected, runs = apart(native), counted(monkeypatch)
    model = parallel(loaded)
    block = (model, *copies_of(model))[device].model.diffusion_model.double_blocks[0]

    def differ(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        handle.remove()
        return tuple(each + 1e-3 for each in output)

    handle = block.register_forward_hook(differ)
    first = apart(model)
    assert runs == ["alone", "together", "alone", "together", "together"]
    assert torch.equal(first, expected) is (device == 1)
    assert model.streamed.alone == ""
    assert torch.equal(apart(model), expected)
    assert runs[5:] == ["together"] * 2


def test_a_notice_is_there_while_the_node_places_it_so(loaded: Any) -> None:
    def notices() -> list[str]:
        return [notice["name"] for notice in describe_notices()]

    guided(parallel(loaded))
    assert notices() == [PARALLEL_NOTICE]
    place(loaded)
    assert notices() == []
    model = parallel(loaded)
    assert notices() == []
    guided(model)
    assert notices() == [PARALLEL_NOTICE]


def test_close_compares_nothing(loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        found = [torch.device("cpu", index) for index in range(2)]
        patch.setattr(mm, "get_torch_device", lambda: found[0])
        patch.setattr(mm, "get_all_torch_devices", lambda exclude_current=False: found[exclude_current:])
        with torch.inference_mode():
            theirs = guided(output(MultiGPUCFGSplitNode.execute(native.clone(), 2)))
    runs = counted(monkeypatch)
    model = parallel(loaded, parallel_bits="close")
    found, expected = guided(model), guided(native)
    assert torch.equal(found, theirs), "as ComfyUI's own node gives it"
    assert not torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=1e-3)
    assert runs == ["together"] * 3
    assert runs_of(model) == [3, 3]
    assert model.streamed.alone == ""


def test_each_kind_of_step_is_verified(loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = counted(monkeypatch), parallel(loaded)
    ways: list[Callable[[Any], torch.Tensor]] = [
        apart,
        lambda model: apart(model, image=latent(12)),
        lambda model: apart(model, image=latent(batch=2)),
        lambda model: guided(model, positive=conditioning(1, 9), negative=conditioning(2, 130)),
        lambda model: apart(patched(model)),
    ]
    for way in ways:
        expected = way(native)
        runs.clear()
        assert torch.equal(way(model), expected)
        assert runs[:2] == ["alone", "together"]
        runs.clear()
        assert torch.equal(way(model), expected)
        assert set(runs) == {"together"} if not model.streamed.alone else {"alone"}


def patched(model: Any) -> Any:
    """With a patch that keeps nothing."""
    model = model.clone()

    def double(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        found = extra["original_block"](args)
        return {**found, "img": found["img"] * 1.25}

    model.set_model_patch_replace(double, "dit", "double_block", 0)
    return model


def stateful(model: Any) -> tuple[Any, list[int]]:
    """With a wrapper that does another thing in each step."""
    model, steps = model.clone(), [0]

    def wrapper(apply: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
        steps[0] += 1
        return apply(args["input"], args["timestep"], **args["c"]) * (1 + 0.01 * steps[0])

    model.set_model_unet_function_wrapper(wrapper)
    return model, steps


def test_a_node_that_keeps_state_runs_once_and_on_one_gpu(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = counted(monkeypatch)
    theirs, their_steps = stateful(native)
    model, steps = stateful(parallel(loaded))
    for _ in range(2):
        assert torch.equal(apart(model), apart(theirs))
    assert steps == their_steps
    assert set(runs) == {"alone"}
    assert model.streamed.alone.startswith(KEEPS_STATE)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["a wrapper of the model", "a patch"])
def test_state_that_a_node_keeps_only_later(loaded: Any, native: ModelPatcher, kind: str, again: bool) -> None:
    """As caches do that begin to skip at some percent of the steps. The first step shows nothing of it, or a run with
    other settings, which are no part of what steps are told apart by."""
    begin = [0.0 if again else 0.9]

    def counting(model: Any) -> tuple[Any, list[int]]:
        model, calls = model.clone(), [0]

        def count(sigma: Any) -> float:
            if float(sigma.max()) > begin[0]:
                return 1.0
            calls[0] += 1
            return 1 + 0.01 * calls[0]

        def wrapper(apply: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
            return apply(args["input"], args["timestep"], **args["c"]) * count(args["timestep"])

        def patch(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            found = extra["original_block"](args)
            return {**found, "img": found["img"] * count(args["transformer_options"]["sigmas"])}

        if kind == "a patch":
            model.set_model_patch_replace(patch, "dit", "double_block", 0)
        else:
            model.set_model_unet_function_wrapper(wrapper)
        return model, calls

    theirs, their_calls = counting(native)
    model, calls = counting(parallel(loaded))
    if again:
        assert torch.equal(apart(model, steps=4), apart(theirs, steps=4))
        assert calls == [0]
        assert model.streamed.together == 4
        begin[0] = 0.9
    assert torch.equal(apart(model, steps=4), apart(theirs, steps=4))
    assert calls == their_calls
    assert calls[0] > 0
    assert model.streamed.alone.startswith(KEEPS_STATE)
    assert 0 < model.streamed.together < 4, "some steps before"


def test_a_node_that_acts_only_later_in_a_run(loaded: Any, native: ModelPatcher) -> None:
    """As patches do that look at all prompts of a batch from some percent of the steps on."""

    def wrapper(apply: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
        found = apply(args["input"], args["timestep"], **args["c"])
        apart = "multigpu_thread_device" in args["c"]["transformer_options"]
        return found * 1.5 if apart and float(args["timestep"].max()) < 0.9 else found

    model = parallel(loaded).clone()
    model.set_model_unet_function_wrapper(wrapper)
    expected = apart(native, steps=4)
    for _ in range(2):
        assert torch.equal(apart(model, steps=4), expected)
    assert "other bits" in model.streamed.alone or model.streamed.together == 4, "tokens may be divided in the others"


def test_random_numbers_are_drawn_once(loaded: Any, native: ModelPatcher) -> None:
    def noisy(model: Any) -> Any:
        model = model.clone()

        def wrapper(apply: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
            found = apply(args["input"], args["timestep"], **args["c"])
            return found + torch.rand_like(found) * 0.1

        model.set_model_unet_function_wrapper(wrapper)
        return model

    torch.manual_seed(5)
    expected = apart(noisy(native))
    model = noisy(parallel(loaded))
    torch.manual_seed(5)
    assert torch.equal(apart(model), expected)
    assert "it has drawn random numbers" in model.streamed.alone


def test_a_step_that_keeps_state_only_in_parallel_is_put_back(
    loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parallel(loaded).clone()
    threads: list[Any] = []

    def wrapper(apply: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
        options = args["c"]["transformer_options"]
        if "multigpu_thread_device" in options:
            threads.append(options["multigpu_thread_device"])
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    assert torch.equal(apart(model), apart(native))
    assert model.streamed.alone.startswith(KEEPS_STATE)
    assert threads == []


def test_a_prompt_that_ends_in_the_run(loaded: Any, native: ModelPatcher) -> None:
    """A region is there for a part of the steps, and so the work is divided in another way in the others."""

    def run(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            area = host_nodes.ConditioningSetArea().append(conditioning(3), 32, 64, 0, 0, 0.8)[0]
            late = host_nodes.ConditioningSetTimestepRange().set_range(area, 0.5, 1.0)[0]
        return guided(model, steps=4, positive=[*conditioning(1), *late], negative=conditioning(2, LONG))

    model, expected = parallel(loaded), run(native)
    for _ in range(2):
        assert torch.equal(run(model), expected)
    assert len(verdicts._found) == 2


def test_what_a_prompt_asks_of_the_model_is_part_of_its_kind() -> None:
    """A number or a name among the conditions chooses another way through a model, whatever the shapes are."""
    sigma = torch.ones(1)

    def describe(method: Any) -> Any:
        return step_kinds.describe({"model_conds": {"ref_latents_method": CONDConstant(method)}}, sigma)

    kinds = {describe(method) for method in ("index", "index_timestep_zero", 1, True, 1.5, None)}
    assert len(kinds) == 6
    assert describe("index") == describe("index")


def test_what_is_attached_is_part_of_a_kind_by_what_it_calls() -> None:
    one, other = (step_kinds.names({"override": partial(function, 1)}) for function in (divmod, max))
    assert one != other
    one, other = (step_kinds.names({"diffusion_model.default_ref_method": name}) for name in ("index", "offset"))
    assert one != other
    layers = [torch.nn.Linear(2, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    makes = [step_kinds.names({"diffusion_model.out": layer}) for layer in (*layers, torch.nn.Linear(2, 2))]
    assert makes[0] == makes[2] != makes[1]


def test_files_of_one_name_are_two_kinds(loaded: Any, native: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model, expected = counted(monkeypatch), parallel(loaded), apart(native)
    assert torch.equal(apart(model), expected)
    monkeypatch.setattr(step, "make_of", lambda model: 0)
    runs.clear()
    assert torch.equal(apart(model), expected)
    assert runs[:2] == ["alone", "together"]


def test_the_table_keeps_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts_file, "MOST_KINDS", 2)
    for kind in ("a", "b", "c"):
        verdicts.keep(kind, "")
    assert [verdicts.of(kind) for kind in ("a", "c", "b")] == [None, "", ""]
    verdicts.keep("d", "")
    assert [verdicts.of(kind) for kind in ("b", "c", "d")] == ["", None, ""]


# -- the host's threads ------------------------------------------------------------------------------------------------

DEVICES = [torch.device("cpu", index) for index in range(2)]


@pytest.fixture
def pool() -> Iterator[MultiGPUThreadPool]:
    pool = MultiGPUThreadPool(DEVICES)
    yield pool
    pool.shutdown()


def fail_beside(pool: MultiGPUThreadPool, work: Callable[[], None], error: BaseException) -> None:
    """A step in which one GPU does ``work`` while another fails."""
    with host_threads.settled({host_threads.POOL: pool}) as options:
        options[host_threads.POOL].submit(DEVICES[1], work)
        raise error


def test_a_step_that_fails_on_one_gpu_waits_for_the_others(pool: MultiGPUThreadPool) -> None:
    done = threading.Event()

    def work() -> None:
        time.sleep(0.2)
        done.set()

    with pytest.raises(RuntimeError):
        fail_beside(pool, work, RuntimeError("the first has failed"))
    assert done.is_set()
    pool.submit(DEVICES[1], lambda: 5)
    assert pool.get_result(DEVICES[1]) == (5, None), "nothing is left of the step before"


def test_an_interrupt_reaches_all_gpus(pool: MultiGPUThreadPool) -> None:
    """ComfyUI tells of it once."""

    def work() -> None:
        while True:
            mm.throw_exception_if_processing_interrupted()
            time.sleep(0.01)

    with pytest.raises(mm.InterruptProcessingException):
        fail_beside(pool, work, mm.InterruptProcessingException())
    assert not mm.processing_interrupted()


# -- ControlNet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def controlnet(tmp_path: Any) -> Any:
    write_controlnet(tmp_path / CONTROLNET)
    folder_paths.add_model_folder_path("controlnet", str(tmp_path), is_default=True)
    with torch.inference_mode():
        return comfy.controlnet.load_controlnet(str(tmp_path / CONTROLNET))


def controlled(model: Any, net: Any, start: float = 0.0) -> torch.Tensor:
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        positive, negative = host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            conditioning(1), conditioning(2, LONG), net, picture, 0.8, start, 0.8
        )
    return guided(model, steps=4, positive=positive, negative=negative)


def test_a_controlnet_works_on_both(loaded: Any, machine: Machine, native: ModelPatcher, controlnet: Any) -> None:
    expected = controlled(native, controlnet)
    assert not torch.equal(expected, apart(native, steps=4))
    machine(2, 40 * MB)
    model = parallel(loaded)
    for _ in range(2):
        assert torch.equal(controlled(model, controlnet), expected)
    assert model.streamed.alone == ""
    assert runs_of(model) == [4, 4]
    assert torch.equal(apart(model), apart(native))


def test_steps_at_which_a_controlnet_begins_are_another_kind(
    loaded: Any, machine: Machine, native: ModelPatcher, controlnet: Any
) -> None:
    def run(model: Any) -> torch.Tensor:
        return controlled(model, controlnet, 0.3)

    expected = run(native)
    machine(2, 40 * MB)
    model = parallel(loaded)
    assert torch.equal(run(model), expected)
    assert len(verdicts._found) == 2, "with it, and before it begins, which is as when it has ended"


def test_one_that_cannot_be_had_twice_leaves_the_run_to_one_gpu(
    loaded: Any, native: ModelPatcher, controlnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = controlled(native, controlnet)
    model = parallel(loaded)
    monkeypatch.setattr(type(controlnet), "deepclone_multigpu", comfy.controlnet.ControlBase.deepclone_multigpu)
    assert torch.equal(controlled(model, controlnet), expected)
    assert model.streamed.alone == f"{type(controlnet).__name__}, which its prompts use, cannot be had on another GPU"
    assert len(copies_of(model)) == 1
    assert torch.equal(apart(model), apart(native))
    assert model.streamed.alone == ""
