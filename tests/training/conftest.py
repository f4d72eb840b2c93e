from collections.abc import Iterator

import pytest

from vaescale import distributed


@pytest.fixture(scope="session")
def group() -> Iterator[None]:
    """One for all tests of this process: DeepSpeed keeps what it derived from the first one."""
    distributed.init()
    yield
    distributed.finish()
