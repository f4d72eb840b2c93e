"""Parsing a command line: options and settings in any order.

Nothing slow is imported here. A command parses its arguments before the seconds of its other imports, so it answers
`-h` and a wrong option at once.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

NEAR = 0.8  # smallest similarity (share of common letters) between an option and a misspelt one


def command(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help keeps the line breaks of the description."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def training(description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of launch/train.py. launch/run.py parses the same arguments."""
    parser = command(description)
    parser.prog = "train.py"
    parser.add_argument("--config", required=True, help="YAML file of settings; the ready ones are in configs/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the settings, batch, parameters and memory, and exit"
    )
    parser.add_argument(
        "--take-over", action="store_true", help="the training on another host that locked the run directory is gone"
    )
    add_plugin(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    return parser


def add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="first run this Python file, which adds a model, a metric or features: vaescale/models/README.md",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of samples from a prior, see interfaces.Sampling."""
    group = parser.add_argument_group("samples from a prior over codes (of a diffusion: guidance only)")
    group.add_argument(
        "--guidance", type=_from(0.0, float), default=1.0, metavar="G", help="classifier-free guidance; 1: none (1)"
    )
    group.add_argument(
        "--top-k", type=_from(0, int), default=0, metavar="K", help="draw only the K most probable codes; 0: all (0)"
    )
    group.add_argument(
        "--top-p", type=_share, default=1.0, metavar="P", help="draw only the most probable codes with this share (1)"
    )
    group.add_argument(
        "--passes", type=_from(1, int), default=12, help="in which a prior with masked order draws all codes (12)"
    )
    group.add_argument(
        "--positions",
        choices=["confidence", "halton"],
        default="confidence",
        help="what a masked prior draws first: the codes it is surest of, or evenly spread ones (confidence)",
    )


def _from(least: float, number: Callable[[str], float]) -> Callable[[str], float]:
    """Returns the type of an option: a finite number from `least` on."""

    def read(text: str) -> float:
        value = number(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be a number, {least:g} or more")
        return value

    return read


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return value


def words(given: Sequence[str] | None = None) -> list[str]:
    """Returns the words `given`, by default the arguments of this process, without the rank that deepspeed adds, which
    the environment has, too."""
    return [word for word in (sys.argv[1:] if given is None else given) if not word.startswith("--local_rank=")]


def parse_apart(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """As `parse`, for a parser with options of several values, which would swallow the overrides that follow them: all
    words of the form key=value that are no files are overrides."""
    given = words(given)
    overrides = [word for word in given if "=" in word and word[0] != "-" and not Path(word).exists()]
    found = parse(parser, [word for word in given if word not in overrides])
    found.overrides = [*overrides, *found.overrides]
    return found


def parse_command(
    description: str | None,
    parsers: Mapping[str, Callable[[], argparse.ArgumentParser]],
    parse: Callable[[argparse.ArgumentParser, Sequence[str]], argparse.Namespace],
) -> argparse.Namespace:
    """Parses the arguments of this process, of which the first one names the command. parsers: by command, which is
    `command` in the result; parse: one of these functions."""
    name, *left = words() or ["-h"]
    if name not in parsers:
        parser = command(description)
        parser.add_argument("command", choices=parsers, help="-h after it explains its options")
        parser.parse_args([name])
    found = parse(parsers[name](), left)
    found.command = name
    return found


def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the words `given`, by default the arguments of this process. The settings are in `overrides`.

    An unknown option is probably a setting, but the known keys need the slow imports. So `--steps 10` becomes the
    override `--steps=10`, which vaescale.config refuses with a hint at the right key. For other invalid arguments
    argparse exits with code 2.
    """
    left = words(given)
    options = re.findall(r"--[\w-]+", parser.format_usage())
    settings = []
    for option in parser.parse_known_intermixed_args(left)[1]:
        name, equals, _ = option.partition("=")
        if not option.startswith("--"):
            continue  # argparse refuses it below
        if near := get_close_matches(name, options, n=1, cutoff=NEAR):
            parser.error(f"unrecognized argument {name}: did you mean {near[0]}?")
        place = left.index(option)
        value = [] if equals else [word for word in left[place + 1 : place + 2] if word[:2] != "--" and "=" not in word]
        settings.append(option if equals else f"{option}={''.join(value)}")
        del left[place : place + 1 + len(value)]
    arguments = parser.parse_intermixed_args(left)
    arguments.overrides = [*getattr(arguments, "overrides", []), *settings]
    return arguments
