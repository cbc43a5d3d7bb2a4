from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_a_device_that_is_late_computes_with_the_right_weights(
    differences: Callable[[str, list[str]], list[str]],
) -> None:
    assert differences("late_program.py", ["--disable-dynamic-vram"]) == []
