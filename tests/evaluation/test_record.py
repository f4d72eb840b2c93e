import json
from pathlib import Path

import pytest
import torch

from vaescale.evaluation.compare import Refused, Request
from vaescale.evaluation.record import check, earlier, hash_of, protocols
from vaescale.nn import features

BASE = {"weights": "a", "step": 3}


def test_the_hash_is_that_of_all_parameters_and_buffers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = hash_of(model)
    assert hash_of(model) == before
    model[1].running_mean[0] += 1e-6  # type: ignore[index,operator]
    changed = hash_of(model)
    assert changed != before
    with torch.no_grad():
        model[0].bias[1] += 1e-6  # type: ignore[index,operator]
    assert hash_of(model) not in (before, changed)


def test_a_protocol_has_what_the_number_depends_on() -> None:
    net = features.drawn("random")
    requests = [Request("r", "fd", net.words), Request("g", "kid", net.words)]
    found = protocols(requests, [net], BASE, {"count": 50})
    assert found["rfd_random"].keys() == {"numbers", "how", "features", "weights", "step"}
    assert found["gkid_random"]["numbers"] == ["gkid_random", "gkid_std_random"]
    assert found["gkid_random"]["count"] == 50
    assert found["gkid_random"]["features"]["words"] == "FD (random)"
    assert found != protocols(requests, [features.drawn("random", 1)], BASE, {"count": 50})


def test_earlier_comparisons_are_those_of_the_same_weights_and_images(tmp_path: Path) -> None:
    one, several = tmp_path / "evaluation.json", tmp_path / "several.json"
    record = {"psnr": 3.0, "rfid": 1.5, "comparisons": {"rfid": {"numbers": ["rfid"], "step": 3, "weights": "a"}}}
    one.write_text(json.dumps(record))
    other = {"rkid": 2.0, "comparisons": {"rkid": {"numbers": ["rkid"], "step": 3, "weights": "a"}}}
    several.write_text(json.dumps([{"run": "x"}, other]))
    assert earlier([one], BASE) == {"rfid": 1.5, "comparisons": record["comparisons"]}
    assert earlier([one], BASE | {"step": 4}) == {}
    assert earlier([one, several, tmp_path / "none.json"], BASE).keys() == {"rfid", "comparisons"}
    several.write_text(json.dumps([other]))
    assert earlier([one, several], BASE).keys() == {"rfid", "rkid", "comparisons"}


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"comparisons": 3}', '{"comparisons": {"rfid": {"step": 3, "weights": "a"}}}']
)
def test_what_is_no_record_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert earlier([tmp_path / "evaluation.json"], BASE) == {}
    check(tmp_path / "evaluation.json", "f", 3, 1)


def test_a_record_of_other_images_or_more_draws_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"fingerprint": "f", "data": "a/val", "step": 3, "draws": 4, "bits_per_dim_iw": 1.0}))
    check(path, "f", 3, 4)
    check(path, "f", 4, 1)
    with pytest.raises(Refused, match="images other than the a/val"):
        check(path, "g", 3, 4)
    with pytest.raises(Refused, match="--iw 1, because it has the tighter bound of --iw 4: give --out FILE"):
        check(path, "f", 3, 1)


def test_a_record_of_more_generated_images_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    comparisons = {"gfid": {"count": 50}, "rfid": {}}
    path.write_text(json.dumps({"fingerprint": "f", "step": 3, "draws": 1, "comparisons": comparisons}))
    requests = [Request("g", "fd", "FID"), Request("g", "kid", "FID")]
    check(path, "f", 3, 1, requests, 50)
    check(path, "f", 3, 1, requests[1:], 10)
    check(path, "f", 4, 1, requests, 10)
    with pytest.raises(Refused, match="--count 49, because it has gfid of --count 50: give --out FILE"):
        check(path, "f", 3, 1, requests, 49)
