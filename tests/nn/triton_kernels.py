"""Triton kernels without a GPU: interpreted, and compiled for one that is not here."""

import sys
from typing import Any

import pytest

from tests.conftest import Start, finish


def interpret(start: Start, command: str) -> None:
    """Runs Python code whose kernels are interpreted, in a process of its own: Triton decides once whether it
    interprets."""
    pytest.importorskip("triton")
    code, output = finish(start([sys.executable, "-W", "ignore", "-c", command], TRITON_INTERPRET="1"))
    assert code == 0, output


def compile_for(kernel: Any, kinds: dict[str, str], constants: dict[str, int], capability: int, **options: int) -> Any:
    """Compiles a kernel for a CUDA GPU. kinds: the types of its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature=kinds, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options or None)
