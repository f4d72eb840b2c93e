"""Numbers are the same on any number of ranks."""

import json
from pathlib import Path

import pytest

from tests.conftest import Start, finish, ranks, samples
from vaescale.data.shards import write


def test_all_numbers_are_equal_on_one_two_and_three_ranks(tmp_path: Path, start: Start) -> None:
    """With 101 images, of which the ranks have unequal shares, and micro-batches that divide no share."""
    write(tmp_path / "data" / "val", samples(101), 20, [])
    results = []
    for world, micro in ((1, 32), (1, 7), (2, 7), (3, 32)):
        out = tmp_path / f"{world}-{micro}.json"
        command = ["-m", "tests.integration.comparing", str(tmp_path / "data"), str(micro), str(out)]
        for process in ranks(start, world, command):
            code, output = finish(process)
            assert code == 0, output
        results.append(json.loads(out.read_text()))
    assert len(results[0]) == 4 + 7 + 9
    assert results[0]["images"] == 101
    assert results[0]["rfd_random"] < results[0]["gfd_random"]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-9)
