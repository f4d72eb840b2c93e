"""Hints for a key or a config file that does not exist: the nearest existing ones."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_type_hints

from .files import printable
from .renamed import RENAMED

NEAR = 0.7  # smallest similarity (share of common letters) at which one name is suggested for another
TIE = 0.1  # candidates within this similarity of the best one are all suggested
MOST = 3  # candidates in a sentence
LONGEST = 100  # letters compared
SHORT = 0.8  # smallest similarity between a name and its short form
BEGINNING = 3  # letters of a name that are enough to be its short form


def known_keys(schema: Any, where: str = "") -> Iterator[str]:
    """Yields the dotted keys of `schema` (a dataclass instance), including sections."""
    for name in get_type_hints(type(schema)):
        yield f"{where}{name}"
        if is_dataclass(inner := getattr(schema, name, None)):
            yield from known_keys(inner, f"{where}{name}.")


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """Returns the keys of `known` that `key` may mean: at most MOST, the best first; [] if none is similar.

    A candidate has the same last part, or a similar spelling as a whole or in its last part. Case, `_` and `-` are
    ignored. A part may be a short form of the other (accum for accumulation, lr for learning_rate), or the reverse. A
    former name stands for the present one.
    """
    names = {name: name for name in known} | {old: new for old, new in RENAMED.items() if new in known}
    if key in names:
        return [names[key]]
    scores = {other: _likeness(key, other) for other in names}
    least = max(NEAR, max(scores.values(), default=0.0) - TIE)
    near = {other for other, score in scores.items() if score >= least}
    same = {other for other in names if _plain(_last(other)) == _plain(_last(key))}
    best = sorted(near if near & same else near | same, key=lambda other: (-scores[other], other))
    return list(dict.fromkeys(names[other] for other in best))[:MOST]


def unknown_key(key: str, value: Any, known: Sequence[str], siblings: Sequence[str]) -> str:
    """Returns a sentence about a key that is not in `known`. siblings: the names in its section.

    The key begins with `--` if it was given as an option.
    """
    while isinstance(value, dict) and len(value) == 1:  # optimiser.lr=1: extend the unknown section to the full key
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    near = nearest(key.lstrip("-"), known)
    former = near == [RENAMED.get(key.lstrip("-"))]
    if not key.startswith("--"):
        if former:
            return f"{key} is called {near[0]} now"
        hint = f"did you mean {either(near)}?" if near else f"known keys are {', '.join(siblings)}"
        return f"unknown key {printable(key, 60)}: {hint}"
    text = shlex.quote(printable(value, 60)) if isinstance(value, str) and value else "…"
    settings = [f"{name}={text}" for name in near]
    if former or (near and _plain(_last(near[0])) == _plain(_last(key))):
        hint = f"write {either(settings)}"
    elif near:
        hint = f"did you mean {either(settings)}? -h lists the options"
    else:
        hint = f"-h lists the options, and settings are written key=value: {', '.join(siblings)}"
    return f"{printable(key, 60)} is not an option: {hint}"


def nearest_file(path: Path) -> Path | None:
    """Returns the YAML file that `path`, which is no file, may mean, or None.

    It is searched in `path` as a folder, next to `path` and in configs/.
    """
    folders = {path: "config", path.parent: path.stem, Path("configs"): path.stem}
    best, share = None, 0.0
    for folder, stem in folders.items():
        with suppress(OSError):
            for other in sorted(folder.glob("*.y*ml")):
                likeness = _ratio(stem, other.stem)
                if likeness >= NEAR and likeness > share:
                    best, share = other, likeness
    return best


def either(names: Sequence[str]) -> str:
    """Joins names as in "a, b or c"."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _plain(key: str) -> str:
    return key[-LONGEST:].lower().replace("-", "").replace("_", "")


def _likeness(key: str, other: str) -> float:
    """Returns the similarity of two keys, 0 to 1. A key without a section is compared with and without one."""
    whole, last = _ratio(key, other), _ratio(_last(key), _last(other))
    return (whole + last) / 2 if "." in key else max(whole, last)


def _ratio(name: str, other: str) -> float:
    ratio = SequenceMatcher(None, _plain(name), _plain(other), autojunk=False).ratio()
    return max(ratio, SHORT) if _shortened(name, other) else ratio


def _shortened(name: str, other: str) -> bool:
    begins = len(name) >= BEGINNING and _plain(other).startswith(_plain(name))
    return begins or name.lower() == (_initials(other) or None) or other == _initials(name)


def _initials(name: str) -> str:
    """Returns the initials of a name, as lr for learning_rate; "" for a single word."""
    words = [word for word in name.lower().replace("-", "_").split("_") if word]
    return "".join(word[0] for word in words) if len(words) > 1 else ""
