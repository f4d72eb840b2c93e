"""Results as text: one run in full, or several runs side by side. A result is the content of an evaluation.json.

METRICS and COMPARISONS define the numbers, their descriptions and their formats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..interfaces import Sampling
from ..nn import features
from . import compare, metrics
from .evaluate import IMAGES
from .metrics.metric import Number
from .record import OF_RUN

Result = dict[str, Any]
DEFAULTS = asdict(Sampling())

ABOUT = {  # columns of the comparison before the metrics: key → format
    "run": "",
    "model": "",
    "parameters": ",",
    "latents": "",
}
TEXT = {"run", "model", "latents"}  # left-aligned
TEX = str.maketrans({
    **{mark: f"\\{mark}" for mark in "&%$#_{}"}, "…": r"\ldots{}", "–": "--", "×": r"$\times$",
})  # fmt: skip
OTHERS = {  # rows of the listing after the metrics: key → words
    "usage_ever": "codes ever used in training",
    "images": "images",
}


def line(result: Result) -> str:
    """Returns the main numbers in one line; for several codebooks, the lowest and the highest."""
    numbers = [*_numbers([]), *compare.numbers(net.words for net in features.NETS.values()).items()]
    found = {number.column: _ends(result, name, number.form) for name, number in numbers if number.logged}
    return "  ".join(f"{column} {'–'.join(dict.fromkeys(ends))}" for column, ends in found.items() if column and ends)


def listing(result: Result) -> str:
    """Returns all numbers of one run, one per line, and their protocol. Those of one codebook or level among several
    include its name."""
    words = {name: number.words for name, number in _numbers([result])} | OTHERS
    rows = [(text.format(**result), _number(result[key])) for key, text in words.items() if key in result]
    for key in result:
        group, slash, part = key.partition("/")  # codebook0/usage, rate/level0
        if slash:
            measure, name = (part, group) if part in words else (group, part)
            rows.append((f"{words[measure]}, {name}", _number(result[key])))
    rows += [(number.words.format(draws="K"), number.absent) for number in _absent([result])]
    width = max(len(text) for text, _ in rows)
    at = "" if result["step"] is None else f" at step {result['step']}"
    lines = [f"{result['run']}{at}, {_held_out(result)}"]
    lines += [f"  {text:<{width}}  {value:>8}" for text, value in rows]
    return "\n".join([*lines, *(f"  {line}" for line in protocol_lines([result])[1:])])


def measured(result: Result) -> dict[str, str]:
    """Returns the names of a result's numbers with their words. Those of one codebook or level among several, and
    those without words, are left out."""
    return {name: number.words.format(**result) for name, number in _numbers([result]) if name in result}


def comparison(results: Sequence[Result], form: str = "markdown") -> str:
    """Returns tables with one row per run, and under each the protocol of its numbers. form: markdown or latex.

    Results of unlike protocols have separate tables, and a line names the difference to the first one. A column that no
    run has is left out.
    """
    found: list[str] = []
    for group in alike(results):
        lines = []
        if found:
            differences = difference(results[0], group[0]) or ["the protocol differs from that of another table"]
            lines = [f"Not comparable with the first table: {'; '.join(differences)}.", ""]
        notes = [f"{number.words.format(draws='K')}: {number.absent}." for number in _absent(group)]
        binarised = [result["run"] for result in group if result["likelihood"] == "bernoulli"]
        if binarised:
            notes.append(f"Bits of binarised images are comparable only with each other: {', '.join(binarised)}.")
        notes += protocol_lines(group)
        found.append("\n".join([*lines, *FORMS[form](*_cells(group)), "", *_notes(notes, form)]))
    return "\n\n".join(found)


def alike(results: Sequence[Result]) -> list[list[Result]]:
    """Returns the results in groups, each of which has one protocol for the numbers that its results share."""
    groups: list[list[Result]] = []
    for result in results:
        group = next((group for group in groups if not any(difference(one, result) for one in group)), None)
        if group is None:
            groups.append([result])
        else:
            group.append(result)
    return groups


def difference(one: Result, other: Result) -> list[str]:
    """Returns in words how the protocols of numbers that both results have differ; [] if they do not."""
    before, after = _protocol(one), _protocol(other)
    return [
        f"{name} {after[name]} instead of {before[name]}"
        for name in before
        if name in after and after[name] != before[name]
    ]


def protocol_lines(results: Sequence[Result]) -> list[str]:
    """Returns how the results, which have one protocol, were measured: the images, the features of comparisons, and the
    generated images."""
    lines = [f"Measured on {_held_out(results[0])}; {IMAGES}; reconstructions rounded to 8 bits."]
    protocols = {key: one for result in results for key, one in result.get("comparisons", {}).items()}
    features = {one["features"]["words"]: one["features"] for one in protocols.values()}
    if features:
        lines.append("; ".join(_features(words, one) for words, one in features.items()) + ".")
    drawn = {_drawn(one): None for one in protocols.values() if "count" in one}
    return [*lines, *drawn]


def _features(words: str, protocol: dict[str, str]) -> str:
    parts = [protocol[name] for name in ("layer", "resize", "range") if name in protocol]
    digest = f", sha256 {protocol['sha256'][:8]}" if protocol.get("sha256") else ""
    return f"{words}: {', '.join(parts)}; weights {protocol['file']}{digest}"


def _drawn(protocol: dict[str, Any]) -> str:
    changed = {name: protocol[name] for name, value in DEFAULTS.items() if protocol.get(name, value) != value}
    how = "".join(f", {name.replace('_', '-')} {value}" for name, value in changed.items())
    return (
        f"{protocol['count']:,} generated images, labels {protocol['labels']}, seed {protocol['seed']}, temperature "
        f"{protocol['temperature']:g}{how}, against {protocol['reference']}."
    )


def _protocol(result: Result) -> dict[str, Any]:
    """What results must have in common to be compared, by words."""
    found = {"images of index": result["fingerprint"][:8]}
    found |= {name: result[name] for name in ("size", "channels")}
    source = result.get("perceptual") or {}
    found |= {f"{source['kind']}: {name}": value for name, value in source.items()}
    for key, protocol in result.get("comparisons", {}).items():
        for name in sorted(protocol.keys() - {"numbers", "data", "size", "channels", "images", *OF_RUN}):
            parts = protocol[name] if isinstance(protocol[name], dict) else {"": protocol[name]}
            found |= {" ".join([f"{key}: {name}", part]).strip(): value for part, value in parts.items()}
    return found


def _cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]], list[bool]]:
    """(headings, rows, whether each column is aligned left)."""
    columns = {key: (key, form) for key, form in ABOUT.items()}
    columns |= {number.column: (name, number.form) for name, number in _numbers(results) if number.column}
    columns = {
        heading.format(**results[0]): (key, form)  # all results have the same number of draws
        for heading, (key, form) in columns.items()
        if any(_ends(result, key, form) for result in results)
    }
    rows = [[" … ".join(_ends(result, *column)) or "–" for column in columns.values()] for result in results]
    return list(columns), rows, [name in TEXT for name in columns]


def _markdown(names: list[str], rows: list[list[str]], left: list[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, left, strict=True)
        return "| " + " | ".join(f"{cell:{'<' if text else '>'}{width}}" for cell, width, text in parts) + " |"

    rule = [("-" * width if text else "-" * (width - 1) + ":") for width, text in zip(widths, left, strict=True)]
    return [line(names), line(rule), *map(line, rows)]


def _latex(names: list[str], rows: list[list[str]], left: list[bool]) -> list[str]:
    """A tabular with the rules of the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(TEX) for cell in cells) + r" \\"

    columns = "".join("l" if text else "r" for text in left)
    return [
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(names), r"\midrule", *map(line, rows), r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip


def _notes(lines: Sequence[str], form: str) -> list[str]:
    return [f"% {line}" for line in lines] if form == "latex" else [*lines]


FORMS = {"markdown": _markdown, "latex": _latex}


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


def _numbers(results: Sequence[Result]) -> Iterator[tuple[str, Number]]:
    """The numbers of METRICS, and of the comparisons that the results have."""
    for metric in metrics.METRICS:
        yield from metric.numbers.items()
    protocols = [one for result in results for one in result.get("comparisons", {}).values()]
    yield from compare.numbers(dict.fromkeys(one["features"]["words"] for one in protocols)).items()


def _absent(results: Sequence[Result]) -> list[Number]:
    """Numbers that no result has although their metric was measured, if they come with an explanation. Of codes, which
    are not drawn, more draws would give the same bounds."""
    results = [result for result in results if "bits_per_code" not in result]
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
