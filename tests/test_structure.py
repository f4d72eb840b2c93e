"""Imports go in one direction, each costly library is imported by one file, and files and functions are short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vaescale"
BASE = {"files", "numerics", "renamed", "hints", "interfaces", "distributed", "process", "ranges", "config"}
BELOW = {*BASE, "nn", "models", "data", "settings", "matching", "trained", "monitoring", "lifecycle"}
LAYERS = {  # package or file → the others that it may import
    "arguments": set(),
    "files": set(),
    "hints": {"files", "renamed"},
    "interfaces": set(),
    "distributed": set(),
    "process": set(),
    "ranges": {"files"},
    "numerics": set(),
    "renamed": set(),
    "config": {"files", "hints", "ranges"},
    "plugins": {"config"},
    "hub": {"config"},
    "nn": {"files", "interfaces", "distributed", "numerics", "ranges"},
    "models": {"interfaces", "distributed", "ranges", "nn"},
    "weights": {"files", "nn"},
    "data": {"files", "interfaces", "distributed", "process", "ranges"},
    "settings": {"hub", "hints", "renamed", "interfaces", "config", "ranges", "models", "nn", "data"},
    "matching": {"config", "settings", "data"},
    "monitoring": {"files", "interfaces"},
    "evaluation": {"plugins", "files", "numerics", "interfaces", "distributed", "nn", "models", "data", "monitoring"},
    "lifecycle": {"hub", "files", "interfaces", "distributed", "process", "config", "settings", "data", "monitoring"},
    "trained": {
        "hub",
        "files",
        "interfaces",
        "distributed",
        "config",
        "settings",
        "matching",
        "models",
        "nn",
        "data",
        "lifecycle",
    },
    "export": {
        *("files", "numerics", "interfaces", "distributed", "config", "nn"),
        *("settings", "data", "monitoring"),
    },
    "formats": {
        *(
            "evaluation",
            "hub",
            "files",
            "interfaces",
            "distributed",
            "config",
            "nn",
            "models",
            "settings",
            "trained",
            "lifecycle",
        )
    },
    "library": {"interfaces", "numerics", "settings", "data", "monitoring", "evaluation", "trained"},
    "training": {*BELOW, "evaluation"},
    "advice": {*BELOW, "training"},
}
ONLY = {
    "deepspeed": "training/engine.py",
    "omegaconf": "config.py",
    "webdataset": "data/shards.py",
    "fsspec": "data/places.py",
}


def imports(path: Path) -> Iterator[str]:
    """Returns the absolute dotted names that a file imports."""
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
def test_imports_go_in_one_direction(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "vaescale" and rest:
            assert rest.split(".")[0] in LAYERS[layer] | {layer}, f"{path} must not import {name}"
        if top in ONLY:
            assert str(path.relative_to(PACKAGE)) == ONLY[top], f"only {ONLY[top]} imports {top}"


def classes(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}


def asked_for(path: Path) -> set[str]:
    """Returns the last parts of the class names in a file's isinstance calls and class patterns."""
    parts: list[ast.AST] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            parts += ast.walk(node.args[1])
        elif isinstance(node, ast.MatchClass):
            parts.append(node.cls)
    return {getattr(part, "attr", getattr(part, "id", "")) for part in parts}


def test_no_code_checks_the_class_of_a_model_or_learner() -> None:
    """Code asks for the capabilities of a model, see interfaces.py."""
    special = {
        name: path
        for path in (*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "training").glob("*.py"))
        for name in classes(path)
        if path.parent.name == "models" or path.stem in ("descent", "closed_form", "adversarial")
    }
    assert {"PCA", "VQVAE", "Descent", "ClosedForm", "Adversarial"} <= special.keys()
    for path in [*FILES, *(PACKAGE.parent / "launch").rglob("*.py")]:
        for name in asked_for(path) & special.keys():
            assert special[name] == path, f"{path} asks whether something is a {name}"


def test_isinstance_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("if isinstance(x, (pca.PCA, int)): pass\nmatch x:\n    case VAE(): pass\n")
    assert {"PCA", "int", "VAE"} <= asked_for(tmp_path / "x.py")


def test_files_are_short() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Returns the name and the number of lines of each function in a file, methods and nested ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    for path in [*FILES, *(PACKAGE.parent / "launch").rglob("*.py")]:
        for name, lines in functions(path):
            assert lines <= 60, f"{path}: {name} has {lines} lines"


def test_the_lines_of_functions_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "class X:\n    @x\n    def f(self):\n        def g():\n            pass\n        return g\n"
    )
    assert dict(functions(tmp_path / "x.py")) == {"f": 4, "g": 2}


def test_the_imports_are_seen() -> None:
    """The walk above finds relative imports; otherwise it could pass by finding none."""
    assert "vaescale.data.DataError" in set(imports(PACKAGE / "training" / "trainer.py"))
    assert "vaescale.training.resume" in set(imports(PACKAGE / "training" / "trainer.py"))
