"""The interface between bytes and models: a training on two ranks with a reader for other data than pictures.

The samples are arrays of codes, int64 [2, 4, 4], as a tokenizer writes them. The model is not a Codec: it predicts the
second map from the first. `python -m tests.integration.test_reader ROOT RUN` runs this file as one rank.
"""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Start, finish, ranks
from vaescale import distributed, models, settings
from vaescale.data import decode, index, shards, stream, tar
from vaescale.interfaces import Batch, Model, Output
from vaescale.models import Family

CODES, STEPS = 8, 6


class Arrays:
    """A Reader of .npy files. Training adds 1 modulo CODES if seed + g is odd."""

    def require(self) -> None: ...

    def training(self, data: bytes, seed: int, g: int) -> np.ndarray:
        return (self.validation(data) + (seed + g) % 2) % CODES

    def validation(self, data: bytes) -> np.ndarray:
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except ValueError:
            raise decode.Damaged("cut or corrupt") from None

    def stack(self, samples: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(samples))

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, 2, 4, 4, dtype=torch.int64)


@dataclass(frozen=True)
class Config:
    kind: str = "teller"


class Teller(Model):
    def __init__(self, config: Config, shape: object, seed: int) -> None:
        super().__init__()
        self.table = nn.Embedding(CODES, CODES)

    def forward(self, batch: Batch, step: int) -> Output:
        scores = self.table(batch.x[:, 0]).movedim(-1, 1)
        return Output(nn.functional.cross_entropy(scores, batch.x[:, 1]), {}, None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training arrays in three shards, of which one array is damaged, and 5 validation arrays."""
    root = tmp_path_factory.mktemp("arrays")
    random = np.random.default_rng(0)
    for split, counts in (("train", (15, 15, 10)), ("val", (5,))):
        (root / split).mkdir()
        for number, count in enumerate(counts):
            samples = []
            for sample in range(count):
                first = random.integers(0, CODES, (1, 4, 4))
                file = io.BytesIO()
                np.save(file, np.concatenate([first, (first + 3) % CODES]))
                data = file.getvalue() if (split, number, sample) != ("train", 1, 4) else file.getvalue()[:200]
                samples.append(shards.Sample(f"{number}-{sample:02d}", data, 0, "codes.npy"))
            shards.write_shard(root / split / f"{number}.tar", samples)
        names = [f"{number}.tar" for number in range(len(counts))]
        fields = tar.Fields(extensions=("codes.npy",))
        index.build(root / split, str(root / split), names, fields, [], processes=1)
    return root


def test_arrays_train_a_model_that_is_no_codec(root: Path, tmp_path: Path, start: Start) -> None:
    """Two ranks have the same losses as one, up to rounding. The damaged sample is replaced and counted, and the loss
    falls because the second map follows from the first."""
    for world in (1, 2):
        for process in ranks(start, world, ["-m", __name__, str(root), str(tmp_path / str(world))]):
            code, output = finish(process)
            assert code == 0, output
    lines = [
        [json.loads(line) for line in (tmp_path / world / "metrics.jsonl").read_text().splitlines()]
        for world in ("1", "2")
    ]
    losses = [[line["train/loss"] for line in one] for one in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.5
    assert lines[0][-1]["data/damaged_cut_or_corrupt"] == lines[1][-1]["data/damaged_cut_or_corrupt"] >= 1


def test_the_workers_hand_over_what_the_reader_gives(root: Path) -> None:
    config = stream.Config(root=str(root), columns=4, workers=2)
    slices = stream.TrainSlices(config, 0, Arrays())
    batch, _ = next(stream.train_loader(slices, 0, 8, 1, 0, 1, pin=False))
    assert (batch.x.shape, batch.x.dtype) == ((8, 2, 4, 4), torch.int64)
    assert torch.equal((batch.x[:, 0] + 3) % CODES, batch.x[:, 1])


if __name__ == "__main__":
    from vaescale.training.trainer import Trainer

    models.MODELS["teller"] = Family(Config, Teller)
    data = stream.Config(root=sys.argv[1], columns=4, workers=0)
    optimizer = settings.Optimizer(lr=0.5, warmup_steps=1)
    every = settings.Every(report=1, validate=3, checkpoint=3)
    given = {
        "steps": STEPS,
        "global_batch": 20,
        "precision": "fp32",
        "data": data,
        "optimizer": optimizer,
        "every": every,
    }
    Trainer(settings.Config(Config(), run=sys.argv[2], **given), reader=Arrays()).train()
    distributed.finish()
