"""Loads the kernels of a first step onto a GPU while the model is being loaded.

[Note: kernels come with their first launch]
CUDA loads a kernel when it is first launched. Of a process's first step of FLUX that is about a second (H200), in which
neither the GPU nor the disk has anything to do, one kernel after another on the thread that runs the model. Many are
the same in every diffusion transformer, so another thread launches them on a few numbers while that thread loads the
model. Other kernels are loaded later, as usual, and if a text encoder has run before there is little to do. Attention
must not be among them: torch has the first attention of a process computed by cuDNN and all others by its own kernel
(README, The same picture), so an early call changes the first picture. Matrix products do not: with them called early
the first picture is the one that ComfyUI makes, bit by bit, and so is the second (FLUX, H200).
"""

from __future__ import annotations

import logging
import threading

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

# The size of one layer's activations, kept small.
TOKENS, WIDTH = 16, 3072

_begun: set[tuple[torch.device, torch.dtype]] = set()


def warm_up(device: torch.device, dtype: torch.dtype) -> threading.Thread | None:
    """Begin to load the kernels of a transformer that computes in ``dtype``, once in a process for each GPU and dtype.

    Returns the thread that does it, which need not be waited for; None if there is nothing to do.
    """
    if device.type != "cuda" or (device, dtype) in _begun:
        return None
    _begun.add((device, dtype))
    thread = threading.Thread(target=_try, args=(device, dtype), name="weightstream-kernels", daemon=True)
    thread.start()
    return thread


def _try(device: torch.device, dtype: torch.dtype) -> None:
    try:
        launch_all(device, dtype)
    except Exception as error:  # No memory, or a GPU without this dtype: the step will say so, if it matters.
        logger.debug("kernels of %s are not loaded ahead: %s", device, str(error))


@torch.inference_mode()
def launch_all(device: torch.device, dtype: torch.dtype) -> None:
    """Launch what a transformer in ``dtype`` and the sampler around it launch, in the order in which they begin."""
    for wide in (torch.float32, torch.float64):
        _elementwise(torch.zeros(TOKENS, 8, dtype=wide, device=device), dtype)
    x = torch.zeros(1, TOKENS, WIDTH, dtype=dtype, device=device)
    weight = torch.zeros(WIDTH, WIDTH, dtype=dtype, device=device)
    functional.linear(x, weight, weight[0])
    functional.linear(x, weight)
    functional.layer_norm(x, (WIDTH,), None, None, 1e-6)
    functional.rms_norm(x, (WIDTH,), x[0, 0])
    functional.gelu(x, approximate="tanh")
    functional.silu(x)
    torch.addcmul(x, x, x)
    torch.cat((x, x), dim=1)
    _elementwise(x, torch.float32)


def _elementwise(x: torch.Tensor, other: torch.dtype) -> None:
    """Arithmetic of time steps, positions and modulation, and of the sampler."""
    x.to(other).to(x.dtype)
    (-x + x * 2.0) / (1.0 + x) - (1.0 - x)
    x * x + 1.0 / (x + 1.0)
    x.exp(), x.cos(), x.sin(), x**2, 2.0**x
    torch.arange(8, dtype=x.dtype, device=x.device)
    torch.stack((x, x), dim=-1).sum()
    torch.cat((x, x), dim=-1)
