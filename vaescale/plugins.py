"""Runs Python files that the command line names. A file of settings can name none: reading a run never runs code.

A plug-in adds to the package's tables by plain assignment, such as `MODELS["patches"] = Family(Config, Patches)`
(models/__init__.py), `METRICS.append(…)` (evaluation/metrics/__init__.py), or `NETS["mine"] = Net(…)` (nn/features.py).
"""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from .config import ConfigError


def load(files: Iterable[Path]) -> None:
    """Runs the files of --plugin in this process, in their order. Raises ConfigError. What their code raises is passed
    on."""
    for file in files:
        try:
            run(file)
        except FileNotFoundError as error:
            raise ConfigError(f"--plugin {file}: {error}: give the path of one") from None


def run(file: Path) -> ModuleType:
    """Runs a file as a module, which may import the files beside it. Raises FileNotFoundError, a clause, if it is not a
    Python file. What its code raises is passed on."""
    if not file.is_file() or file.suffix != ".py":
        raise FileNotFoundError(f"{file} is not a Python file")
    spec = importlib.util.spec_from_file_location(f"plugin_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # as dataclasses need it
    sys.path.insert(0, str(file.parent.resolve()))
    spec.loader.exec_module(module)
    return module
