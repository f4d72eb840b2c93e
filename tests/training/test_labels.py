"""Labels must mean the same classes in training and in validation."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import samples
from vaescale.config import ConfigError
from vaescale.data import shards
from vaescale.training.settings import Config, check_classes

ABC = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("training", "validation", "differs"),
    [
        (ABC, ABC, ""),
        (ABC, ["a", "b"], ""),
        (["a", "b"], ABC, ""),
        ([], ABC, ""),
        (ABC, [], ""),
        (
            ABC,
            ["a", "c"],
            "label 1 is the class b in .*train and c in .*val: prepare .* --classes .*train/classes.json",
        ),
        (["a", "c"], ABC, "label 1 is the class c in .*train and b in .*val"),
    ],
)
def test_class_names_are_compared(tmp_path: Path, training: list[str], validation: list[str], differs: str) -> None:
    one = shards.write(tmp_path / "train", samples(2), 2, training)
    two = shards.write(tmp_path / "val", samples(2), 2, validation)
    check_classes(Config(model=SimpleNamespace(kind="ae")), one, two)  # labels play no part
    check_classes(Config(model=SimpleNamespace(classes=0)), one, two)
    conditioned = Config(model=SimpleNamespace(classes=3))
    if differs:
        with pytest.raises(ConfigError, match=differs):
            check_classes(conditioned, one, two)
    else:
        check_classes(conditioned, one, two)
