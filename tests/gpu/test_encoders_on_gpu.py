from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FLAGS = {"static": ["--disable-dynamic-vram"], "dynamic": []}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_what_encoders_say_is_the_hosts_with_and_without_patches(
    differences: Callable[[str, list[str]], list[str]], flags: list[str]
) -> None:
    assert differences("encoders_program.py", flags) == []
