"""The alarm on quantisers that really collapse, each in its way, and on healthy ones of every kind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vaescale.monitoring import alarm
from vaescale.monitoring.alarm import Reading
from vaescale.nn.quantize import Config, build

ROWS, DIM = 512, 8
Encoder = Callable[[int, torch.Generator], Tensor]  # (step, generator) → rows [N, D]


def healthy(_: int, generator: torch.Generator) -> Tensor:
    """A mixture, so that codes are used unevenly."""
    centres = 2 * torch.randn(12, DIM, generator=torch.Generator().manual_seed(5))
    return centres[torch.randint(12, (ROWS,), generator=generator)] + torch.randn(ROWS, DIM, generator=generator)


def background(step: int, generator: torch.Generator) -> Tensor:
    """Four fifths of all rows are the same."""
    blank = torch.rand(ROWS, 1, generator=generator) < 0.8
    return torch.where(blank, 1.0, healthy(step, generator))


def point(_step: int, _generator: torch.Generator) -> Tensor:
    return torch.full((ROWS, DIM), 0.37)


def runaway(_: int, generator: torch.Generator) -> Tensor:
    """Elsewhere in every step."""
    return 3 * torch.randn(1, DIM, generator=generator) + 0.05 * torch.randn(ROWS, DIM, generator=generator)


def moved(step: int, generator: torch.Generator) -> Tensor:
    """Far away all at once, and for good."""
    return healthy(step, generator) + (2000.0 if step >= 50 else 0.0)


def broken(step: int, generator: torch.Generator) -> Tensor:
    return healthy(step, generator) * (float("nan") if step == 0 else 1.0)


def heard(config: Config, encoder: Encoder, steps: int = 400, warmup: int = 0) -> list[tuple[int, str]]:
    """(step, sentence) of all that is said in a run that reports every 20 steps."""
    torch.manual_seed(0)
    quantizer, generator = build(config, seed=0), torch.Generator().manual_seed(1)
    on: list[str] = []
    said = []
    for step in range(1, steps + 1):
        out = quantizer(encoder(step - 1, generator)[:, : config.dim])
        quantizer.update(step - 1, lr=1e-3)
        if step % 20 == 0:
            for level, usage in enumerate(quantizer.usages(clear=True)):
                reading = alarm.reading_of(usage, float(out.commitment[level]), step)
                said.append((step, alarm.watch(f"codebook{level}", reading, config, warmup, on)))
    return [(step, sentence) for step, sentence in said if sentence]


VQ = Config(codebook_size=256, dim=DIM)
GRADIENT = Config(codebook_size=256, dim=DIM, learning="gradient")
FSQ = Config(kind="fsq", codebook_size=60, dim=3, levels=[5, 4, 3])
LFQ = Config(kind="lfq", codebook_size=256, dim=DIM, entropy_weight=0.1)


@pytest.mark.parametrize("encoder", [healthy, background])
@pytest.mark.parametrize(
    "config",
    [
        VQ,
        GRADIENT,
        Config(codebook_size=256, dim=DIM, reset_every=0),
        Config(codebook_size=256, dim=DIM, metric="cosine", init="kmeans"),
        Config(codebook_size=64, dim=DIM, depth=3),
        Config(codebook_size=64, dim=DIM, groups=2),
        FSQ,
        LFQ,
    ],
    ids=str,
)
def test_there_is_no_alarm_for_healthy_codebooks(config: Config, encoder: Encoder) -> None:
    assert heard(config, encoder) == []


@pytest.mark.parametrize(
    ("config", "encoder", "cause"),
    [
        (VQ, point, "The encoder gives the same output for every input"),
        (GRADIENT, point, "The encoder gives the same output for every input"),
        (VQ, runaway, "Dead codes are replaced, and die again"),
        (GRADIENT, runaway, "Dead codes are replaced, and die again"),
        (
            Config(codebook_size=256, dim=DIM, reset_every=0),
            runaway,
            "because model.quantizer.reset_every=0: set it to 10",
        ),
        (
            Config(codebook_size=256, dim=DIM, reset_every=0),
            moved,
            "because model.quantizer.reset_every=0: set it to 10",
        ),
        (
            Config(codebook_size=256, dim=DIM, dead_after=5000),
            moved,
            "replaced after model.quantizer.dead_after=5000 steps",
        ),
        (Config(kind="simvq", codebook_size=256, dim=DIM), moved, "faster than their shared linear map could follow"),
        (FSQ, point, "The encoder uses few of the levels"),
        (LFQ, point, "raise model.quantizer.entropy_weight above 0.1"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # of functions without their addresses
)
def test_a_collapse_is_reported_once_with_its_cause(config: Config, encoder: Encoder, cause: str) -> None:
    ((step, sentence),) = heard(config, encoder)
    assert step >= alarm.GRACE
    assert sentence.startswith(f"codebook0 has collapsed at step {step}: ")
    assert cause in sentence


def test_resets_follow_a_moving_encoder_without_an_alarm() -> None:
    assert heard(VQ, moved) == []


def test_a_first_step_that_is_not_finite_only_delays_the_beginning() -> None:
    assert heard(Config(codebook_size=256, dim=DIM, reset_every=0), broken) == []


def test_each_codebook_has_its_own_alarm() -> None:
    """One group's channels are a point, the other's are not."""

    def half(step: int, generator: torch.Generator) -> Tensor:
        return torch.cat([healthy(step, generator)[:, :4], point(step, generator)[:, :4]], dim=1)

    ((_, sentence),) = heard(Config(codebook_size=256, dim=DIM, groups=2), half)
    assert sentence.startswith("codebook1 has collapsed")


def test_it_waits_for_the_warm_up() -> None:
    assert heard(VQ, point, steps=299, warmup=100) == []
    assert heard(VQ, point, steps=300, warmup=100) != []


def reading(usage: float = 1.0, entropy: float = 1.0, **others: float) -> Reading:
    return Reading(
        **{"step": 1000, "codes": 512, "rows": 512, "commitment": 0.1, **others},
        usage=usage,
        entropy=entropy,
    )  # type: ignore[arg-type]


def test_a_recovery_is_reported() -> None:
    """Once, and only well above where it began."""
    on: list[str] = []
    curve = [0.9, 0.3, 0.24, 0.2, 0.26, 0.3, 0.36, 0.3, 0.26]
    said = [alarm.watch("codebook", reading(usage), VQ, 0, on) for usage in curve]
    assert [index for index, sentence in enumerate(said) if sentence] == [2, 6]
    assert (
        said[6] == "codebook has recovered at step 1000: 36.0% of its 512 codes are in use, with a perplexity of 512.0"
    )
    assert on == []


def test_an_alarm_is_not_repeated_after_a_resume() -> None:
    assert alarm.watch("codebook", reading(0.1), VQ, 0, ["codebook"]) is None
    assert alarm.watch("codebook", reading(0.1), VQ, 0, ["codebook0"])


def test_few_rows_cannot_use_many_codes() -> None:
    """51 rows a step leave a codebook of 512 unjudged, whatever they use; 52 do not."""
    assert alarm.watch("codebook", reading(0.1, rows=51), VQ, 0, []) is None
    assert alarm.watch("codebook", reading(0.1, rows=52), VQ, 0, [])


def test_low_entropy_is_a_collapse_even_if_all_codes_are_in_use() -> None:
    assert alarm.watch("codebook", reading(entropy=0.14), VQ, 0, [])
    assert alarm.watch("codebook", reading(entropy=0.16), VQ, 0, []) is None


def test_settings_that_are_already_made_are_not_advised() -> None:
    narrow = Config(codebook_dim=8, metric="cosine")
    assert "model.quantizer.metric=cosine" in alarm.cause(reading(0.1), VQ)
    assert "model.quantizer.metric=cosine" not in alarm.cause(reading(0.1), narrow)
