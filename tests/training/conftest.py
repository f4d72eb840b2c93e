from collections.abc import Iterator

import pytest

from vaescale import distributed


@pytest.fixture(scope="session")
def group() -> Iterator[None]:
    """One process group for all tests of this process, because DeepSpeed caches values derived from the first one. It
    leaves traces in the process (environment, malloc), so only the last folder of tests has it."""
    distributed.init()
    yield
    distributed.finish()
