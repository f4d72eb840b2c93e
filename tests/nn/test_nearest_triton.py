"""The CUDA kernel: in Triton's interpreter, compiled for GPUs that are not here, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Start
from tests.nn.triton_kernels import compile_for, interpret
from vaescale.nn.nearest import _tiled, centre, nearest
from vaescale.numerics import exact

SHAPES = [(1, 1, 1), (3, 5, 2), (130, 200, 40), (70, 300, 16), (64, 129, 70)]


def cases() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(rows, dim), torch.randn(codes, dim)) for rows, codes, dim in SHAPES]


def check(z: Tensor, codebook: Tensor, codes: Tensor) -> None:
    exact = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert codes.dtype == torch.int64
    assert (exact.gather(1, codes[:, None]).squeeze(1) - exact.min(1).values).max() < 1e-6 * exact.max()


def check_all(device: str) -> None:
    from vaescale.nn.nearest_triton import search  # here, because TRITON_INTERPRET is read at its import

    def found(z: Tensor, codebook: Tensor) -> Tensor:
        z, codebook = z.to(device), codebook.to(device)
        c = centre(z, codebook) if len(z) else codebook[0]
        return search(z, codebook, c, (codebook - c).square().sum(1) / 2).cpu()

    for z, codebook in cases():
        check(z, codebook, found(z, codebook))
        far = 1000.0 * torch.arange(-1.0, z.shape[1] - 1)
        nearer = found(z + far, codebook + far)
        exact = torch.cdist((z + far).double(), (codebook + far).double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert (exact.gather(1, nearer[:, None]).squeeze(1) - exact.min(1).values).max() < 1e-4
    # Whole numbers, since the interpreter's product of matrices rounds equal columns differently.
    half = torch.randint(-9, 10, (70, 4)).float().unique(dim=0)
    for codebook in (half.repeat_interleave(2, 0), half.repeat(2, 1)):  # ties: within a tile and across two
        places = [(codebook == row).all(1).nonzero()[0] for row in half]
        assert torch.equal(found(half, codebook), torch.cat(places))
    z, codebook = torch.randn(9, 70).t()[:, 3:8], torch.randn(5, 10).t()  # not contiguous
    check(z, codebook, found(z, codebook))
    z[0], z[1, 0], z[2, 0], z[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    codes = found(z, codebook)
    assert ((codes >= 0) & (codes < 10)).all()
    check(z[4:], codebook, codes[4:])
    assert found(torch.empty(0, 3), torch.randn(5, 3)).shape == (0,)


def test_agrees_with_brute_force_in_the_interpreter(start: Start) -> None:
    interpret(start, "from tests.nn.test_nearest_triton import check_all; check_all('cpu')")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize(("dim", "channels"), [(8, 16), (64, 64), (256, 64)])
def test_compiles_to_fp32_products_that_fit(
    capability: int, dim: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For T4, A100 and H100: no TF32, no tensor cores, and at most 64 KiB of shared memory, which all of them have."""
    pytest.importorskip("triton")
    from vaescale.nn import nearest_triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("z", "turned", "centre", "half_norms"), "*fp32") | {"codes": "*i64"}
    kinds |= dict.fromkeys(("K", "N"), "i32") | dict.fromkeys(("D", "rows", "columns", "channels"), "constexpr")
    constants = {"D": dim, "rows": kernel.ROWS, "columns": kernel.CODES, "channels": channels}
    compiled = compile_for(kernel._search, kinds, constants, capability, num_stages=kernel.STAGES)
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "mma" not in compiled.asm["ptx"]
    assert "tf32" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 64 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_agrees_with_brute_force_on_a_gpu() -> None:
    pytest.importorskip("triton")
    check_all("cuda")
    torch.backends.cuda.matmul.fp32_precision, before = "tf32", torch.backends.cuda.matmul.fp32_precision
    try:
        for rows, codes, dim in ((5000, 8192, 64), (1000, 262144, 8), (3000, 1024, 256)):
            z, codebook = torch.randn(rows, dim, device="cuda"), torch.randn(codes, dim, device="cuda")
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            found = nearest(z, codebook)
            assert torch.cuda.max_memory_allocated() - held <= 64 * 2**20
            for part in torch.arange(rows).split(200):
                check(z[part], codebook, found[part])
            c = centre(z[:200], codebook)
            with exact():
                tiled = _tiled(z[:200], codebook, c, (codebook - c).square().sum(1) / 2)
            check(z[:200], codebook, tiled)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
