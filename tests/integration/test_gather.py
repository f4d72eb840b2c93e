"""What a save gathers at ZeRO 1 and 2."""

import json
import math
from pathlib import Path

from tests.integration.conftest import forked
from tests.integration.gathering import BUCKET_ENTRIES, Net

TRAINED = [p.numel() for p in Net().parameters() if p.requires_grad]


def test_a_save_gathers_buckets(tmp_path: Path) -> None:
    """The values are DeepSpeed's, bit for bit, and what was saved can be loaded (see `gathered`). A collective moves a
    bucket, not a parameter, and ranks other than 0 never hold more than a bucket."""
    worlds = (1, 2, 4)
    forked(tmp_path, [{"task": "gathered", "world": world, "out": str(tmp_path / str(world))} for world in worlds])
    buckets = math.ceil(sum(TRAINED) / BUCKET_ENTRIES)
    assert max(TRAINED) > BUCKET_ENTRIES
    for world in worlds:
        for rank in range(world):
            rows = json.loads((tmp_path / str(world) / f"gathered-{rank}.json").read_text())
            assert [row[:2] for row in rows] == [["fp32", 1], ["fp32", 2], ["fp16", 1], ["fp16", 2]]
            for _, _, ours, theirs, largest in rows:
                assert ours == (3 * buckets if world > 1 else 0)
                assert theirs == 3 * len(TRAINED)
                assert largest == (BUCKET_ENTRIES if rank else sum(TRAINED))
