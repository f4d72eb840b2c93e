"""Labels must mean the same classes in training and in validation."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import samples
from vaescale.config import ConfigError
from vaescale.data import shards
from vaescale.data.codes import Header
from vaescale.matching import absent_classes, check_classes, check_codes
from vaescale.settings import Config

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


def test_classes_without_validation_samples_are_named(tmp_path: Path) -> None:
    names = [f"c{label}" for label in range(12)]
    one = shards.write(tmp_path / "train", samples(12), 12, names)
    two = shards.write(tmp_path / "val", samples(4), 4, names)  # labels 0 to 3
    few = shards.write(tmp_path / "few", samples(4), 4, names[:5])
    conditioned, plain = Config(model=SimpleNamespace(classes=12)), Config(model=SimpleNamespace(classes=0))
    words = "8 of 12 classes are not in the validation data: c4, c5, c6, c7, c8, …"
    assert absent_classes(conditioned, one, two) == words
    assert absent_classes(conditioned, few, two) == "1 of 5 classes are not in the validation data: c4"
    assert absent_classes(plain, one, two) == ""
    assert absent_classes(conditioned, one, one).startswith("5 of 12")


def test_codes_must_be_those_of_the_tokenizer_at_the_models_size() -> None:
    header = Header("a" * 16, [64], [1, 4, 4], "center", 1, "b" * 16)
    index = SimpleNamespace(codes=header, folder=Path("codes"))
    prior = Config(model=SimpleNamespace(kind="code_prior", tokenizer="runs/x"))
    check_codes(prior, index, "a" * 16, (1, 4, 4))  # type: ignore[arg-type]
    for codec, shape, sentence in (
        (None, (), "holds codes, which a model of kind code_prior does not read"),
        ("c" * 16, (1, 4, 4), "another tokenizer .weights a{16}. than model.tokenizer=runs/x .weights c{16}"),
        ("a" * 16, (1, 8, 8), "an image in codes has 1 × 4 × 4 codes, but one of data.size=128 has 1 × 8 × 8"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            check_codes(prior, index, codec, shape)  # type: ignore[arg-type]
