"""The arguments of the commands in launch/, parsed before slow imports."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vaescale import arguments

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").rglob("*.py"))
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "-h"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("code", end.code or 0, "torch" in sys.modules)
"""


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_help_does_not_wait_for_torch(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage: "), done.stderr
    assert done.stdout.endswith("code 0 False\n"), done.stdout


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="x")
    made.add_argument("--run", required=True)
    made.add_argument("--iw", type=int, default=1)
    made.add_argument("--dry-run", action="store_true")
    made.add_argument("overrides", nargs="*")
    return made


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("--run a", []),
        ("b=1 --run a --iw 3", ["b=1"]),
        ("--run a --steps 10", ["--steps=10"]),
        ("--steps 10 --run a b=1", ["b=1", "--steps=10"]),
        ("--run a --steps=10 b=1", ["b=1", "--steps=10"]),
        ("--run a --lr -1 b=1", ["b=1", "--lr=-1"]),
        ("--run a --data.root x --data.size 64", ["--data.root=x", "--data.size=64"]),
        ("--run a --data.flip --iw 3", ["--data.flip="]),
        ("--run a --data.flip b=1", ["b=1", "--data.flip="]),
        ("--run a --data.root=b=c", ["--data.root=b=c"]),
        ("--run a --data.flip", ["--data.flip="]),
    ],
)
def test_an_unknown_option_may_be_a_setting(words: str, overrides: list[str]) -> None:
    given = arguments.parse(parser(), words.split())
    assert (given.run, given.overrides) == ("a", overrides)
    assert given.iw == (3 if "--iw" in words else 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--steps 10", "the following arguments are required: --run"),
        ("--run a -steps 10", "unrecognized arguments: -steps"),
        ("--run a --dryrun", "unrecognized argument --dryrun: did you mean --dry-run?"),
        ("--run a --dry_run=1", "unrecognized argument --dry_run: did you mean --dry-run?"),
        ("--run a --iw x", "argument --iw: invalid int value: 'x'"),
    ],
)
def test_other_wrong_words_are_refused(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        arguments.parse(parser(), words.split())
    assert capsys.readouterr().err.endswith(f"x: error: {sentence}\n")


def test_options_and_settings_come_in_any_order() -> None:
    given = arguments.parse(arguments.training(None), ["--config", "c", "a=1", "--take-over", "b=2"])
    assert (given.config, given.overrides, given.take_over) == ("c", ["a=1", "b=2"], True)


RANKED = ["doctor.py --run a", "evaluate.py --run a", "evaluate.py statistics a --size 8 --out b", "sample.py --run a",
          "export.py codes --run a --out b", "train.py --config a"]  # fmt: skip


@pytest.mark.parametrize("command", RANKED)
def test_the_rank_that_deepspeed_adds_is_no_setting(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes first, before the name of a subcommand."""
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, "--local_rank=1", *words])
    module = importlib.import_module(f"launch.{script.removesuffix('.py')}")
    given = module.parse() if hasattr(module, "parse") else arguments.parse(arguments.training(""))
    assert not any("local_rank" in str(value) for value in vars(given).values())
