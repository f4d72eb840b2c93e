"""Output for the terminal and the log file."""

import sys
import time
from datetime import datetime, timedelta
from fnmatch import fnmatchcase

from tqdm import tqdm


class Console:
    """Prints one line per report, and a progress bar if stderr is a terminal. Silent unless `loud` (rank 0)."""

    def __init__(self, start: int, steps: int, loud: bool) -> None:
        self.watched = loud and sys.stderr.isatty()  # whether progress bars are shown
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.watched)
        self._loud = loud
        self._start, self._steps = start, steps
        self._begun = time.monotonic()

    def advance(self) -> None:
        self._bar.update()

    def report(self, step: int, values: dict[str, float]) -> None:
        """Prints the main numbers, the time that this process has trained, the time left, and the time of day. Missing
        numbers (of a model without a codebook) are left out. Several codebooks are shown by the lowest and highest."""
        passed = time.monotonic() - self._begun
        left = passed / max(1, step - self._start) * (self._steps - step)
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}", *_shown(values)]
        parts += [f"elapsed {_clock(passed)}", f"ETA {_clock(left)}", f"at {datetime.now():%H:%M:%S}"]
        self.say("  ".join(parts))

    def say(self, line: str) -> None:
        if self._loud:
            with tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)

    def close(self) -> None:
        self._bar.close()


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _shown(values: dict[str, float]) -> list[str]:
    parts = []
    for name, (key, form) in COLUMNS.items():
        found = [value for tag, value in values.items() if fnmatchcase(tag, key)]
        ends = dict.fromkeys(f"{end:{form}}" for end in (min(found), max(found))) if found else {}
        if ends:
            parts.append(f"{name} {'–'.join(ends)}")
    return parts


COLUMNS = {
    "loss": ("train/loss", ".4f"),
    "bits/dim": ("train/bits_per_dim", ".4f"),
    "PSNR": ("train/psnr", ".2f"),
    "usage": ("codebook*/usage_window", ".3f"),
    "perplexity": ("codebook*/perplexity", ".1f"),
    "critic": ("critic/accuracy", ".1%"),
    "|g|": ("optim/gradient_norm", ".3f"),
    "lr": ("optim/lr", ".2e"),
    "img/s": ("perf/images_per_second", ".1f"),
    "MFU": ("perf/mfu", ".1%"),
    "data wait": ("data/wait_share", ".1%"),
}
