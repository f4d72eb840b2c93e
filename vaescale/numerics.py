"""How exactly the device computes, stated in one place, because torch's defaults differ between its parts.

On CUDA torch multiplies fp32 matrices in fp32, but convolves in TF32, which keeps 10 of 23 bits of the mantissa.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

TRITON = find_spec("triton") is not None  # comes with CUDA builds of torch
# "none" is torch's default for all but cuDNN's convolutions, and means fp32 there.
_BACKENDS: Any = torch.backends
PRODUCTS = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv)


def choose(tf32: bool, deterministic: bool) -> None:
    """Choose for this process. tf32: fp32 products and convolutions may round their inputs to TF32. deterministic: the
    same inputs give the same bits on the same GPU; operations without such an implementation raise RuntimeError. Then
    `index_add_` and `scatter_add_`, which sum the rows of codebooks, add in a fixed order on CUDA, not atomically."""
    # The older flags, too: Inductor reads them, which raises an error where they contradict the newer ones.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    for part in PRODUCTS[:2]:
        part.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.benchmark = not deterministic  # measuring may choose another algorithm each time
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used


@contextmanager
def exact() -> Iterator[None]:
    """Compute fp32 products and convolutions in fp32, whatever is chosen or was set elsewhere."""
    before = [part.fp32_precision for part in PRODUCTS]
    for part, allowed in zip(PRODUCTS, before, strict=True):
        if allowed not in ("ieee", "none"):
            part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, allowed in zip(PRODUCTS, before, strict=True):
            if part.fp32_precision != allowed:
                part.fp32_precision = allowed


@contextmanager
def repeatable() -> Iterator[None]:
    """Choose the algorithms of convolutions on CUDA by their shapes alone, so that all processes choose the same ones,
    and only such as give the same bits each time. Measuring which is fastest may come out differently."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
