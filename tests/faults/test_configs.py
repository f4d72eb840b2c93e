"""Hostile and mistaken config files. Each gets a one-sentence error before anything else happens."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.test_checkpoints import end, job, names, train
from tests.integration.conftest import TINY, forked

SOON = 10.0  # seconds, nearly all of them for the start


class Hostile(NamedTuple):
    text: str  # content of the file; {ran} is a folder that must not be created
    words: str  # expected in the error


BOMB = "\n".join(
    ["bomb0: &bomb0 [lol, lol]", *(f"bomb{i}: &bomb{i} [{', '.join([f'*bomb{i - 1}'] * 10)}]" for i in range(1, 12))]
)
TINY_TEXT = TINY.read_text()
HOSTILE = {
    "_target_": Hostile("_target_: os.mkdir\n_args_: [{ran}]\n" + TINY_TEXT, "unknown key _target_: "),
    "_target_ of a section": Hostile(
        TINY_TEXT.replace("kind: vqvae", "kind: vqvae\n  _target_: os.mkdir"), "unknown key model._target_: "
    ),
    "a tag": Hostile("run: !!python/object/apply:os.mkdir [{ran}]\n", "line 1: tags such as !!python/object"),
    "a tag of another kind": Hostile("run: !!python/name:os.mkdir\n", "line 1: tags such as !!python/name"),
    "an alias bomb": Hostile(BOMB, "line 2: aliases such as *bomb0 are not supported: "),
    "an alias of itself": Hostile("data: &data [*data]\n", "line 1: aliases such as *data are not supported: "),
    "nested without end": Hostile("data: " + "[" * 2000, "there are more than 32 levels of sections and lists"),
    "no text": Hostile("run: \0\n", "is not valid YAML: "),
    "the environment": Hostile(TINY_TEXT.replace("steps: 12", "steps: ${{oc.env:HOME}}"), "steps: resolvers such as "),
    "a typo": Hostile(TINY_TEXT.replace("steps:", "stesp:"), "unknown key stesp: did you mean steps?"),
    "a typo in a section": Hostile(
        TINY_TEXT.replace("warmup", "warmpu"),
        "unknown key optimizer.warmpu_steps: did you mean optimizer.warmup_steps?",
    ),
    "a wrong type": Hostile(TINY_TEXT.replace("steps: 12", "steps: many"), "steps=many must be a whole number"),
    "a value for a section": Hostile("model: {{kind: vqvae}}\noptimizer: here\n", "optimizer is a section, not "),
    "no mapping": Hostile("- steps\n", "holds no settings: "),
}


@pytest.fixture(scope="module")
def answered(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    jobs = []
    for name, hostile in HOSTILE.items():
        out = folder / name
        out.mkdir()
        file = out / "config.yaml"
        text = hostile.text.replace("{ran}", str(folder / "ran")).replace("{{", "{").replace("}}", "}")
        file.write_text(text)
        command = [str(file) if word == str(TINY) else word for word in train(out / "run", pictures)]
        jobs.append(job(out, command))
    forked(folder, jobs)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_one_sentence_and_nothing_runs(answered: Path, name: str) -> None:
    out = answered / name
    codes, output = end(out)
    assert codes == [2], output
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert HOSTILE[name].words in output
    assert not (answered / "ran").exists()
    assert "run" not in names(out)
    assert (out / "codes.json").stat().st_mtime - (out / "pid-0").stat().st_mtime < SOON
