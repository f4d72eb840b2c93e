"""What was measured, for people: one run in full, or several side by side. A result is what evaluation.json holds."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Result = dict[str, Any]

# key → its words in the listing of one run
SHOWN = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "mse": "MSE",
    "bits_per_dim": "bits/dim, ELBO",
    "bits_per_dim_iw": "bits/dim, IW-{draws}",
    "rate": "rate (bits/dim)",
    "distortion": "distortion (bits/dim)",
    "active_units": "active units",
    "active_share": "active units, share",
    "usage": "codes used",
    "usage_ever": "codes ever used in training",
    "perplexity": "perplexity",
    "images": "images",
}
# column → (key, format) of the comparison
COLUMNS = {
    "run": ("run", ""),
    "model": ("model", ""),
    "parameters": ("parameters", ","),
    "latents": ("latents", ""),
    "bits/dim": ("bits_per_dim", ".4f"),
    "bits/dim, IW-{draws}": ("bits_per_dim_iw", ".4f"),
    "rate": ("rate", ".4f"),
    "distortion": ("distortion", ".4f"),
    "MSE": ("mse", ".6f"),
    "PSNR": ("psnr", ".2f"),
    "SSIM": ("ssim", ".4f"),
    "active units": ("active_units", ""),
    "usage": ("usage", ".3f"),
    "perplexity": ("perplexity", ".1f"),
}
TEXT = {"run", "model", "latents"}  # set to the left


def listing(result: Result) -> str:
    """All numbers of one run, one a line; those of one codebook or level among several carry its name."""
    rows = [(text.format(**result), _number(result[key])) for key, text in SHOWN.items() if key in result]
    for key in result:
        group, slash, part = key.partition("/")  # codebook0/usage, rate/level0
        if slash:
            measure, name = (part, group) if part in SHOWN else (group, part)
            rows.append((f"{SHOWN[measure]}, {name}", _number(result[key])))
    if "ssim" not in result:
        rows.append(("SSIM", "left out: its window is wider than the images"))
    width = max(len(text) for text, _ in rows)
    lines = [f"{result['run']} at step {result['step']}, {_held_out(result)}"]
    return "\n".join([*lines, *(f"  {text:<{width}}  {value:>8}" for text, value in rows)])


def comparison(results: Sequence[Result]) -> str:
    """A Markdown table, a row a run, and a plain word where rows do not compare."""
    rows = [[_cell(result, key, form) for key, form in COLUMNS.values()] for result in results]
    names = [name.format(**results[0]) for name in COLUMNS]  # one command, one number of draws
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    left = [name in TEXT for name in names]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, left, strict=True)
        return "| " + " | ".join(f"{cell:{'<' if text else '>'}{width}}" for cell, width, text in parts) + " |"

    rule = [("-" * width if text else "-" * (width - 1) + ":") for width, text in zip(widths, left, strict=True)]
    lines = [line(names), line(rule), *map(line, rows)]
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


def _cell(result: Result, key: str, form: str) -> str:
    """Of several codebooks, from the least to the greatest; "–" where a family has none."""
    if key in result:
        return f"{result[key]:{form}}"
    several = [value for name, value in result.items() if name.partition("/")[2] == key]
    return f"{min(several):{form}} … {max(several):{form}}" if several else "–"
