"""Parsing a command line: options and settings in any order.

Nothing slow is imported here. A command parses its arguments before the seconds of its other imports, so it answers
`-h` and a wrong option at once.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches

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
    # deepspeed passes --local_rank; it is ignored in favour of the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file's")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses `words` (default: the arguments of this process). The settings are in `overrides`.

    An unknown option is probably a setting, but the known keys need the slow imports. So `--steps 10` becomes the
    override `--steps=10`, which vaescale.config refuses with a hint at the right key. For other invalid arguments
    argparse exits with code 2.
    """
    words = list(sys.argv[1:] if words is None else words)
    options = re.findall(r"--[\w-]+", parser.format_usage())
    settings = []
    for option in parser.parse_known_intermixed_args(words)[1]:
        name, equals, _ = option.partition("=")
        if not option.startswith("--"):
            continue  # argparse refuses it below
        if near := get_close_matches(name, options, n=1, cutoff=NEAR):
            parser.error(f"unrecognized argument {name}: did you mean {near[0]}?")
        place = words.index(option)
        value = (
            [] if equals else [word for word in words[place + 1 : place + 2] if word[:2] != "--" and "=" not in word]
        )
        settings.append(option if equals else f"{option}={''.join(value)}")
        del words[place : place + 1 + len(value)]
    arguments = parser.parse_intermixed_args(words)
    arguments.overrides = [*getattr(arguments, "overrides", []), *settings]
    return arguments
