"""Which precision torch is told to compute in. What hardware makes of it shows on a GPU only."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vaescale import numerics, settings
from vaescale.evaluation.drawing import decoded, from_prior
from vaescale.evaluation.evaluate import reconstruct
from vaescale.library import Trained
from vaescale.numerics import PRODUCTS


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = [part.fp32_precision for part in PRODUCTS]
    yield
    numerics.choose(tf32=False, deterministic=False)
    for part, allowed in zip(PRODUCTS, before, strict=True):
        part.fp32_precision = allowed
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_matrices_and_convolutions_are_computed_alike(tf32: bool, precision: str) -> None:
    numerics.choose(tf32, deterministic=False)
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == precision
    # Inductor reads the older flags, and reading them raises an error where they contradict the newer ones.
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_are_neither_searched_for_nor_left() -> None:
    numerics.choose(tf32=False, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("tf32", [False, True])
def test_exact_holds_inside_and_what_was_chosen_afterwards(tf32: bool) -> None:
    numerics.choose(tf32, deterministic=False)
    chosen = [part.fp32_precision for part in PRODUCTS]
    for error in (False, True):
        try:
            with numerics.exact():
                assert {part.fp32_precision for part in PRODUCTS} <= {"ieee", "none"}
                if error:
                    raise KeyError
        except KeyError:
            pass
        assert [part.fp32_precision for part in PRODUCTS] == chosen


@pytest.mark.parametrize("deterministic", [True, False])
def test_algorithms_are_repeatable_inside_and_as_chosen_afterwards(deterministic: bool) -> None:
    numerics.choose(tf32=False, deterministic=deterministic)
    cudnn = torch.backends.cudnn
    with numerics.repeatable():
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert (cudnn.benchmark, cudnn.deterministic) == (not deterministic, deterministic)


def test_whatever_encodes_and_decodes_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also outside a training, where torch's own default lets convolutions round."""
    for part in PRODUCTS[:2]:
        part.fp32_precision = "tf32"
    config = settings.load("tests/integration/tiny_vae.yaml", ["run=none", "data.root=none"])
    model = settings.build(config).eval()
    seen: list[str] = []

    def recorded(whole: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*given: Any) -> Any:
            seen.extend(part.fp32_precision for part in PRODUCTS)
            return whole(*given)

        return recording

    monkeypatch.setattr(model, "encode", recorded(model.encode))
    monkeypatch.setattr(model, "decode", recorded(model.decode))
    batch = settings.blank(config, 2)
    _, latents = reconstruct(model, batch)
    decoded(model, latents, batch.condition)
    from_prior(model, batch.condition, seed=0)
    Trained(model, config, 0, torch.device("cpu")).encode(batch.x.permute(0, 2, 3, 1).numpy())
    assert len(seen) == 5 * len(PRODUCTS)
    assert set(seen) <= {"ieee", "none"}
