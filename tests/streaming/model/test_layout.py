from __future__ import annotations

import pytest
import torch
from torch import nn
from weightstream.streaming.devices.copies import ALIGNMENT
from weightstream.streaming.model.layout import Layout, NamedTensor, Place, make_layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


def layout_of(module: nn.Module) -> Layout:
    named = []
    for holder, is_parameter in ((module._parameters, True), (module._buffers, False)):
        for name, tensor in holder.items():
            named.append(NamedTensor((name,), tensor, tensor.dtype, (Place(holder, name, is_parameter),)))
    return make_layout(named)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype) -> None:
    module = nn.Module()
    shapes = [(), (0, 3), (1,), (5, 7), (2, 3, 4)]
    for index, shape in enumerate(shapes):
        module.register_buffer(f"b{index}", torch.randint(0, 2, shape).to(dtype))
    layout = layout_of(module)
    buffer = torch.full((layout.nbytes,), 7, dtype=torch.uint8)
    for spec, view in zip(layout.specs, layout.views(buffer), strict=True):
        view.copy_(spec.original)
    for spec, view in zip(layout.specs, layout.views(buffer), strict=True):
        assert view.shape == spec.original.shape
        assert torch.equal(view.float(), spec.original.float())
        assert spec.offset % ALIGNMENT == 0


def test_dense_strides_are_kept() -> None:
    module = nn.Module()
    module.register_buffer("image", torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last))
    module.register_buffer("transposed", torch.rand(4, 6).t())
    module.register_buffer("expanded", torch.rand(4, 1).expand(4, 6))
    layout = layout_of(module)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    image, transposed, expanded = layout.views(buffer)
    assert image.stride() == module.image.stride()
    assert transposed.stride() == module.transposed.stride()
    assert expanded.is_contiguous()


def test_binding_points_all_places_at_one_tensor_and_back() -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.rand(3), requires_grad=False)
    module.b = module.a
    places = tuple(Place(module._parameters, name, True) for name in "ab")
    layout = make_layout([NamedTensor(("a", "b"), module.a, torch.float32, places)])
    original = module.a
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.binding(buffer).apply()
    assert module.a is module.b
    assert isinstance(module.a, nn.Parameter)
    assert module.a.data_ptr() == buffer.data_ptr()
    layout.original_binding().apply()
    assert module.a is module.b is original
