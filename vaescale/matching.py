"""Checks that the data have what a model was built for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError
from .data.index import Index
from .settings import Config

SHOWN = 5  # classes named in one line
# settings that decide what latents mean, with those below each
LATENTS = (
    *("data.size", "data.channels", "model.kind", "model.network", "model.latent_dim"),
    *(f"model.quantizer.{name}" for name in ("kind", "codebook_size", "dim", "codebook_dim", "levels")),
    *(f"model.quantizer.{name}" for name in ("groups", "depth", "metric")),
)


def check_labels(config: Config, index: Index) -> None:
    """Raises ConfigError for a label that the model was not built for; on a device it would cause an obscure crash."""
    classes = getattr(config.model, "classes", 0)
    if not classes:
        return  # reading 10⁷ labels takes hundreds of megabytes of the index
    labels = index.records["label"]
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        sample = int(wrong[0])
        raise ConfigError(
            f"model.classes={classes} allows the labels 0 to {classes - 1}, but sample {sample} of {index.folder} (in "
            f"{index.shards[index.locate(sample).shard].name}) has {labels[sample]}: set "
            f"model.classes={labels.max() + 1} or more, or use other data"
        )


def check_classes(config: Config, training: Index, validation: Index) -> None:
    """Raises ConfigError if a label-conditional model would see a label with different class names in training and
    validation. Indices without class names, and labels that only one of the two has, are not compared."""
    if not getattr(config.model, "classes", 0):
        return
    for label, (name, other) in enumerate(zip(training.classes, validation.classes, strict=False)):
        if name != other:
            raise ConfigError(
                f"label {label} is the class {name} in {training.folder} and {other} in "
                f"{validation.folder}: prepare the validation images again, into an empty folder, with "
                f"--classes {training.folder / 'classes.json'}"
            )


def check_codec(run: Path, begun: str, now: str) -> None:
    """Raises ConfigError if the hash of the codec that the run was built on is not that of today's."""
    if begun != now:
        raise ConfigError(
            f"the frozen model that {run} was started with has changed (weights {now}, were {begun}): restore it, or "
            f"train a new run"
        )


def check_encoder(config: Config, begun: Config, place: Path) -> None:
    """Raises ConfigError if a setting of a training of the decoder alone would give its latents another meaning than
    those of the run that it starts from. begun: the settings of that run; place: where it is, for the message."""
    wanted, given = (_flat(asdict(one)) for one in (begun, config))
    for name in LATENTS:
        for key in sorted({key for key in wanted | given if key == name or key.startswith(f"{name}.")}):
            ours, its = given.get(key), wanted.get(key)
            if ours != its:
                raise ConfigError(
                    f"{key}={ours} is not that of {place}, {its}, so that train=decoder would change the meaning of "
                    f"its latents: set {key}={its}, or set train=all"
                )


def _flat(section: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Returns the settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= _flat(value, f"{where}{name}.") if isinstance(value, Mapping) else {f"{where}{name}": value}
    return found


def check_codes(config: Config, index: Index, codec: str | None, shape: Sequence[int] = ()) -> None:
    """Raises ConfigError if the index holds codes, and the model reads none, or those of another codec or of images of
    another size. codec: the hash of the weights of the codec that the model is built on; None: it is built on none;
    shape: L, h, w of its codes."""
    made = index.codes
    if made is None:
        return
    if made.tokenizer == codec:
        if made.shape != list(shape):
            ours, theirs = (" × ".join(map(str, one)) for one in (shape, made.shape))
            raise ConfigError(
                f"an image in {index.folder} has {theirs} codes, but one of data.size={config.data.size} has {ours}: "
                f"make the codes again from images of this size"
            )
        return
    if codec is None:
        raise ConfigError(
            f"{index.folder} holds codes, which a model of kind {config.model.kind} does not read: set data.root to "
            f"pictures, such as those that the codes were made from"
        )
    raise ConfigError(
        f"the codes in {index.folder} were made by another tokenizer (weights {made.tokenizer}) than "
        f"model.tokenizer={config.model.tokenizer} (weights {codec}): name that one, or make the codes again with "
        f"`python launch/export.py codes --run {config.model.tokenizer} --out DIR`"
    )


def absent_classes(config: Config, training: Index, validation: Index) -> str:
    """Returns a sentence on the classes without validation samples; "" if there are none, or if the model is not
    label-conditional."""
    if not getattr(config.model, "classes", 0) or not validation.classes:
        return ""
    present = set(np.unique(validation.records["label"]).tolist())
    absent = [name for label, name in enumerate(training.classes) if label not in present]
    if not absent:
        return ""
    more = ", …" if len(absent) > SHOWN else ""
    return (
        f"{len(absent)} of {len(training.classes)} classes are not in the validation data: "
        f"{', '.join(absent[:SHOWN])}{more}"
    )
