"""What happens around and in a step of a model: wrappers, layers, quantised weights."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.ops
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from quantised import FORMATS, Format
from sampling import MB, sample
from small_patcher import difference
from weightstream.nodes.host import hosts
from weightstream.streaming import take_apart


def test_each_step_goes_through_the_wrappers_of_the_model(native: ModelPatcher) -> None:
    model, seen = native.clone(), []

    def wrapper(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((executor.class_obj, executor.class_obj.current_patcher, x.shape))
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
    expected = sample(native)
    assert torch.equal(sample(model, steps=3), expected)
    assert len(seen) == 3
    assert all(each is model.model for each, _, _ in seen)
    assert all(each.is_clone(model) for _, each, _ in seen)


def test_an_interrupt_is_no_exception_and_is_heard_where_it_is_asked_for() -> None:
    assert not issubclass(mm.InterruptProcessingException, Exception)
    mm.interrupt_current_processing(True)
    with pytest.raises(mm.InterruptProcessingException):
        mm.throw_exception_if_processing_interrupted()
    mm.throw_exception_if_processing_interrupted()


def test_there_are_callbacks_for_what_we_tell() -> None:
    assert {"ON_LOAD", "ON_CLONE", "ON_DETACH"} <= {name for name in vars(CallbacksMP) if name.isupper()}


def test_a_layer_uses_its_weights_as_they_are_where_it_is_told_not_to_cast() -> None:
    layer = comfy.ops.disable_weight_init.Linear(4, 4, dtype=torch.float32)
    weight, bias, x = torch.randn(4, 4), torch.randn(4), torch.randn(2, 4)
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    assert layer.comfy_cast_weights is False
    plain = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(layer(x), plain)
    layer.comfy_cast_weights = True
    assert torch.equal(layer(x), plain), "a cast to where it is already changes nothing"
    layer.weight_function = [lambda value: value + 1]
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight + 1, bias))
    hosts.wipe_lowvram_weight(layer)
    assert layer.weight_function == []


def test_patches_are_computed_by_one_function() -> None:
    weight = torch.ones(4, 4)
    entry = (0.5, difference(2.0), 1.0, None, None)
    patched = comfy.lora.calculate_weight([entry], weight.clone(), "a", intermediate_dtype=torch.float32)
    assert torch.equal(patched, weight + 1)
    assert comfy.lora.calculate_shape([entry], weight, "a") == weight.shape
    assert comfy.utils.string_to_seed("a.weight") == comfy.utils.string_to_seed("a.weight")


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_quantised_weight_tells_what_it_is_made_of(form: Format) -> None:
    weight = hosts.QuantizedTensor.from_float(torch.randn(256, 256), form.layout, **form.options)
    parts, context = weight.__tensor_flatten__()
    inner = {part: getattr(weight, part) for part in parts}
    assert all(type(part) is torch.Tensor for part in inner.values())
    again = type(weight).__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert len(take_apart("weight", weight)[0]) == len(parts)


def test_a_model_says_in_what_it_computes(native: ModelPatcher) -> None:
    assert native.model.get_dtype_inference() in (torch.float32, torch.bfloat16, torch.float16)
    assert native.get_model_object("manual_cast_dtype") in (None, torch.float32, torch.bfloat16, torch.float16)
    assert native.memory_required([1, 16, 16, 16]) > MB // 1024
