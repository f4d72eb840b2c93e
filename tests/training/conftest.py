import os
from collections.abc import Iterator

import pytest

from vaescale import distributed


@pytest.fixture(scope="session")
def begun() -> Iterator[dict[str, str]]:
    """One process group for all tests of this process, because DeepSpeed caches values derived from the first one.
    Gives the environment that it leaves, which tests without a group must not see."""
    before = dict(os.environ)
    distributed.init()
    left = {name: value for name, value in os.environ.items() if before.get(name) != value}
    for name in left:
        del os.environ[name]
    os.environ.update(before)
    yield left
    distributed.finish()


@pytest.fixture
def group(begun: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in begun.items():
        monkeypatch.setenv(name, value)
