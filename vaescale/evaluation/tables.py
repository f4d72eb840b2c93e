"""Results as text: one run in full, or several runs side by side. A result is the content of an evaluation.json.

METRICS define the numbers, their descriptions and their formats.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from . import metrics
from .metrics.metric import Number

Result = dict[str, Any]

ABOUT = {  # columns of the comparison before the metrics: key → format
    "run": "",
    "model": "",
    "parameters": ",",
    "latents": "",
}
TEXT = {"run", "model", "latents"}  # left-aligned
OTHERS = {  # rows of the listing after the metrics: key → words
    "usage_ever": "codes ever used in training",
    "images": "images",
}


def line(result: Result) -> str:
    """Returns the main numbers in one line; for several codebooks, the lowest and the highest."""
    found = {number.column: _ends(result, name, number.form) for name, number in _numbers() if number.logged}
    return "  ".join(f"{column} {'–'.join(dict.fromkeys(ends))}" for column, ends in found.items() if column and ends)


def listing(result: Result) -> str:
    """Returns all numbers of one run, one per line. Those of one codebook or level among several include its name."""
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
    """Returns a Markdown table with one row per run, and a note if rows are not comparable. A column that no run has is
    left out."""
    columns = {key: (key, form) for key, form in ABOUT.items()}
    columns |= {number.column: (name, number.form) for name, number in _numbers() if number.column}
    columns = {
        heading.format(**results[0]): (key, form)  # all results have the same number of draws
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
        lines += ["", "These rows are not comparable: the runs were measured on different images."]
        lines += [f"  {result['run']}: {_held_out(result)}" for result in results]
    binarised = [result["run"] for result in results if result["likelihood"] == "bernoulli"]
    if binarised:
        lines += ["", f"Bits of binarised images are comparable only with each other: {', '.join(binarised)}."]
    return "\n".join(lines)


def latents_in_words(latents: Sequence[Tensor], sizes: Sequence[int]) -> str:
    """Describes the latents of one image, as in "16", "32 × 32, K = 512", "2 × (32 × 32, K = 512)".

    latents: [B, …] of each level; sizes: K of each codebook, empty if the latents are not codes.
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
    """Numbers that no result has although their metric was measured, if they come with an explanation."""
    return [
        number
        for metric in metrics.METRICS
        if any(_ends(result, name, "") for name in metric.numbers for result in results)
        for name, number in metric.numbers.items()
        if number.absent and not any(_ends(result, name, "") for result in results)
    ]


def _ends(result: Result, key: str, form: str) -> list[str]:
    """The formatted number, or the lowest and highest of several codebooks; [] if the result has none."""
    if key in result:
        return [f"{result[key]:{form}}"]
    several = [value for name, value in result.items() if name.partition("/")[2] == key]
    return [f"{min(several):{form}}", f"{max(several):{form}}"] if several else []
