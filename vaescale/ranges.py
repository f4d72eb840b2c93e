"""Ranges of the numbers in a Config, declared with each field, and the check of types and ranges.

    lr: float = ranged(3e-4, above=0)
    betas: tuple[float, float] = ranged((0.9, 0.99), least=0, below=1)

A Config is a frozen dataclass of numbers, texts, Literals, lists, tuples and other such dataclasses. Each number is
declared with `ranged`, which a test checks.
"""

import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .files import printable

KEY = "range"
LARGEST = 2**63  # bound of whole numbers, as in an int64 tensor


@dataclass(frozen=True)
class Range:
    """The bounds of a finite number, or of each number in a list; None: no such bound."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def missed(self, value: Any) -> str:
        """Returns the bound that `value` violates, as in "at least 1", or "" if it is in the range."""
        if self.least is not None and not value >= self.least:
            return f"at least {self.least}"
        if self.above is not None and not value > self.above:
            return f"above {self.above}"
        if self.most is not None and not value <= self.most:
            return f"at most {self.most}"
        if self.below is not None and not value < self.below:
            return f"below {self.below}"
        return "" if isinstance(value, float) or -LARGEST <= value < LARGEST else f"below {LARGEST}"


def ranged(
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """Returns a dataclass field for a number, or a list of numbers, with these bounds. A test requires a lower one."""
    metadata = {KEY: Range(least, above, most, below)}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def require(config: Any, where: str = "") -> None:
    """Checks every value of a config. where: the section's dotted name, a prefix of the keys in messages.

    Raises ValueError, one sentence with the key, for a value of the wrong type, outside its Literal or out of range.
    NaN and infinities are outside every range.
    """
    hints = get_type_hints(type(config))
    for one in fields(config):
        key = f"{where}.{one.name}" if where else one.name
        _require(getattr(config, one.name), hints[one.name], one.metadata.get(KEY, Range()), key)


def _require(value: Any, hint: Any, within: Range, key: str) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    said = f"{key}={printable(value, 60)}"
    if is_dataclass(hint if hint is not Any else value):
        if not is_dataclass(value):
            raise ValueError(f"{said} must be a section")
        require(value, key)
    elif origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise ValueError(f"{said} must be one of {', '.join(map(str, arguments))}")
    elif origin in (list, tuple):
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(arguments)):
            raise ValueError(f"{said} must be a list{f' of {len(arguments)} values' if origin is tuple else ''}")
        for one in value:
            _require(one, arguments[0], within, key)
    elif hint in (int, float):
        _require_number(value, hint, within, said)
    elif hint in (bool, str) and not isinstance(value, hint):
        raise ValueError(f"{said} must be {'true or false' if hint is bool else 'text'}")


def _require_number(value: Any, hint: Any, within: Range, said: str) -> None:
    kind = Integral if hint is int else Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{said} must be a {'whole number' if hint is int else 'number'}")
    if hint is float:
        try:
            value = float(value)
        except OverflowError:  # a whole number beyond the largest float
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"{said} must be a finite number")
    if missed := within.missed(value):
        raise ValueError(f"{said} must be {missed}")
