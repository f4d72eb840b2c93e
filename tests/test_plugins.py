"""Python files of the command line."""

import sys
from pathlib import Path

import pytest

from vaescale import models, plugins, settings
from vaescale.config import ConfigError


@pytest.mark.parametrize("name", ["none.py", "folder.py", "model.txt"])
def test_what_is_no_python_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "model.txt").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match=f"^--plugin .*: .*{name} is not a Python file: give the path of one$"):
        plugins.load([tmp_path / name])


def test_errors_of_a_plugin_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        plugins.load([tmp_path / "broken.py"])


@pytest.mark.parametrize("kind", ["patches", "plugin_patches:Family", "os:system", "/tmp/patches.py"])
def test_settings_cannot_name_code(tmp_path: Path, kind: str) -> None:
    """Neither a config file, nor that of a run; the sentence says how a plug-in is given."""
    assert "patches" not in models.MODELS
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{kind: '{kind}'}}\nrun: none\n")
    sentence = f"model.kind={kind} is not one of the models: .*; one that a plug-in adds needs --plugin FILE.py"
    for read in (settings.load, settings.load_saved):
        with pytest.raises(ConfigError, match=sentence):
            read(file, [])
