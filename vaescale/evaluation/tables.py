"""What was measured, for people: one run in full, or several side by side. A result is what evaluation.json holds.

The numbers of metrics, their words and formats are those that METRICS give.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from . import metrics
from .metrics.metric import Number

Result = dict[str, Any]

ABOUT = {  # of the comparison, before the metrics: key → format
    "run": "",
    "model": "",
    "parameters": ",",
    "latents": "",
}
TEXT = {"run", "model", "latents"}  # set to the left
OTHERS = {  # in the listing, after the metrics: key → words
    "usage_ever": "codes ever used in training",
    "images": "images",
}


def line(result: Result) -> str:
    """The numbers that one looks at first; of several codebooks the lowest and the highest."""
    found = {number.column: _ends(result, name, number.form) for name, number in _numbers() if number.logged}
    return "  ".join(f"{column} {'–'.join(dict.fromkeys(ends))}" for column, ends in found.items() if column and ends)


def listing(result: Result) -> str:
    """All numbers of one run, one a line; those of one codebook or level among several carry its name."""
    words = {name: number.words for name, number in _numbers()} | OTHERS
    rows = [(text.format(**result), _number(result[key])) for key, text in words.items() if key in result]
    for key in result:
        group, slash, part = key.partition("/")  # codebook0/usage, rate/level0
        if slash:
            measure, name = (part, group) if part in words else (group, part)
            rows.append((f"{words[measure]}, {name}", _number(result[key])))
    rows += [(number.words.format(draws="K"), number.absent) for number in _absent([result])]
    width = max(len(text) for text, _ in rows)
    lines = [f"{result['run']} at step {result['step']}, {_held_out(result)}"]
    return "\n".join([*lines, *(f"  {text:<{width}}  {value:>8}" for text, value in rows)])


def comparison(results: Sequence[Result]) -> str:
    """A Markdown table, a row a run, and a plain word where rows do not compare. A column that no run has is left
    out."""
    columns = {key: (key, form) for key, form in ABOUT.items()}
    columns |= {number.column: (name, number.form) for name, number in _numbers() if number.column}
    columns = {
        heading.format(**results[0]): (key, form)  # one command, one number of draws
        for heading, (key, form) in columns.items()
        if any(_ends(result, key, form) for result in results)
    }
    rows = [[" … ".join(_ends(result, *column)) or "–" for column in columns.values()] for result in results]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    left = [name in TEXT for name in columns]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, left, strict=True)
        return "| " + " | ".join(f"{cell:{'<' if text else '>'}{width}}" for cell, width, text in parts) + " |"

    rule = [("-" * width if text else "-" * (width - 1) + ":") for width, text in zip(widths, left, strict=True)]
    lines = [line(list(columns)), line(rule), *map(line, rows)]
    if absent := [f"{number.words.format(draws='K')}: {number.absent}." for number in _absent(results)]:
        lines += ["", *absent]
    if len({(result["fingerprint"], result["size"], result["channels"]) for result in results}) > 1:
        lines += ["", "These rows do not compare: the runs were measured on different images."]
        lines += [f"  {result['run']}: {_held_out(result)}" for result in results]
    binarised = [result["run"] for result in results if result["likelihood"] == "bernoulli"]
    if binarised:
        lines += ["", f"Bits of binarised images compare with no others: {', '.join(binarised)}."]
    return "\n".join(lines)


def describe(latents: Sequence[Tensor], sizes: Sequence[int]) -> str:
    """What one image becomes: "16", "32 × 32, K = 512", "2 × (32 × 32, K = 512)".

    latents: [B, …] a level; sizes: those of the codebooks, none where latents are not codes.
    """
    texts = [" × ".join(map(str, level.shape[1:])) for level in latents]
    if sizes:
        texts = [f"{text}, K = {size}" for text, size in zip(texts, sizes, strict=True)]
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"{len(texts)} × ({texts[0]})"
    return " + ".join(texts)


def _held_out(result: Result) -> str:
    return (
        f"{result['images']} images of {result['data']} at {result['size']} px, {result['channels']} channel(s), index "
        f"{result['fingerprint'][:8]}"
    )


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _numbers() -> Iterator[tuple[str, Number]]:
    return (item for metric in metrics.METRICS for item in metric.numbers.items())


def _absent(results: Sequence[Result]) -> list[Number]:
    """What none of the results has, though its metric was measured."""
    return [
        number
        for metric in metrics.METRICS
        if any(_ends(result, name, "") for name in metric.numbers for result in results)
        for name, number in metric.numbers.items()
        if number.absent and not any(_ends(result, name, "") for result in results)
    ]


def _ends(result: Result, key: str, form: str) -> list[str]:
    """The number, or of several codebooks the least and the greatest; [] where a family has none."""
    if key in result:
        return [f"{result[key]:{form}}"]
    several = [value for name, value in result.items() if name.partition("/")[2] == key]
    return [f"{min(several):{form}}", f"{max(several):{form}}"] if several else []
