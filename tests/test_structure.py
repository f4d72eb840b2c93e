"""Imports point one way, and the costly libraries have one importer each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vaescale"
BASE = {"files", "interfaces", "distributed", "process", "ranges", "config"}
BELOW = {*BASE, "nn", "models", "data", "settings", "monitoring", "lifecycle"}
LAYERS = {  # package or file → those it may import beside itself
    "files": set(),
    "interfaces": set(),
    "distributed": set(),
    "process": set(),
    "ranges": {"files"},
    "config": {"files", "ranges"},
    "nn": {"interfaces", "distributed", "ranges"},
    "models": {"interfaces", "distributed", "ranges", "nn"},
    "data": {"files", "interfaces", "distributed", "process", "ranges"},
    "settings": {"interfaces", "config", "ranges", "models", "data"},
    "monitoring": {"files", "interfaces"},
    "evaluation": {"files", "interfaces", "distributed", "data", "monitoring"},
    "lifecycle": {"files", "distributed", "process", "config", "settings", "data", "monitoring"},
    "trained": {"files", "interfaces", "distributed", "config", "settings", "lifecycle"},
    "training": {*BELOW, "evaluation"},
    "advice": {*BELOW, "training"},
}
ONLY = {
    "deepspeed": "training/engine.py",
    "omegaconf": "config.py",
    "webdataset": "data/shards.py",
    "fsspec": "data/places.py",
    "torchmetrics": "evaluation/metrics.py",
}


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of what a file imports."""
    package = ("vaescale", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            yield from (f"{stem}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "vaescale" and rest:
            assert rest.split(".")[0] in LAYERS[layer] | {layer}, f"{path} must not import {name}"
        if top in ONLY:
            assert str(path.relative_to(PACKAGE)) == ONLY[top], f"only {ONLY[top]} imports {top}"


def test_files_are_short() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_imports_are_seen() -> None:
    """The walk above finds relative imports: without this it could pass by finding none."""
    assert "vaescale.data.DataError" in set(imports(PACKAGE / "training" / "trainer.py"))
    assert "vaescale.training.resume" in set(imports(PACKAGE / "training" / "trainer.py"))
