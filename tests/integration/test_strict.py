"""The process group that tests run on refuses what NCCL refuses."""

from pathlib import Path

import pytest

from tests.integration.conftest import forked

BREACHES = {
    "type": "all_reduce of torch.int16, which NCCL does not know",
    "stride": "all_reduce of a tensor that is not contiguous",
    "shape": "another rank elsewhere",
    "order": "another rank elsewhere",
}


@pytest.mark.parametrize("how", BREACHES)
def test_what_nccl_refuses_is_refused(tmp_path: Path, how: str) -> None:
    job = {"task": "violate", "world": 2, "out": str(tmp_path), "how": how, "code": 1}
    assert BREACHES[how] in forked(tmp_path, [job])


def test_what_nccl_takes_is_taken(tmp_path: Path) -> None:
    forked(tmp_path, [{"task": "violate", "world": 2, "out": str(tmp_path), "how": "none"}])
