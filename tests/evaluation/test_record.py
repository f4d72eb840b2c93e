import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from vaescale.evaluation.compare import Refused, Request
from vaescale.evaluation.record import check, check_drawn, earlier, hash_of_settings, others, protocols, read
from vaescale.nn import features

BASE = {"weights_hash": "a", "step": 3}


@dataclass
class Settings:
    width: float = 1.0


def test_a_protocol_has_what_the_number_depends_on() -> None:
    net = features.drawn("random")
    requests = [Request("r", "fd", net.words), Request("g", "kid", net.words)]
    found = protocols(requests, [net], BASE, {"count": 50})
    assert found["rfd_random"].keys() == {"numbers", "how", "features", "weights_hash", "step"}
    assert found["gkid_random"]["numbers"] == ["gkid_random", "gkid_std_random"]
    assert found["gkid_random"]["count"] == 50
    assert found["gkid_random"]["features"]["words"] == "FD (random)"
    assert found != protocols(requests, [features.drawn("random", 1)], BASE, {"count": 50})


def test_the_settings_and_attributes_of_a_model_are_hashed() -> None:
    hashes = [
        hash_of_settings(*one) for one in ((Settings(), []), (Settings(0.5), []), (Settings(), ["x"]), (None, []))
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of_settings(Settings(), ()) == hashes[0]


def test_earlier_comparisons_are_those_of_the_same_weights_and_images(tmp_path: Path) -> None:
    one, several = tmp_path / "evaluation.json", tmp_path / "several.json"
    record = {"psnr": 3.0, "rfid": 1.5, "comparisons": {"rfid": {"numbers": ["rfid"], "step": 3, "weights_hash": "a"}}}
    one.write_text(json.dumps(record))
    other = {"rkid": 2.0, "comparisons": {"rkid": {"numbers": ["rkid"], "step": 3, "weights_hash": "a"}}}
    several.write_text(json.dumps([{"run": "x"}, other]))
    assert earlier(read([one]), BASE) == {"rfid": 1.5, "comparisons": record["comparisons"]}
    assert earlier(read([one]), BASE | {"step": 4}) == {}
    assert earlier(read([one, several, tmp_path / "none.json"]), BASE).keys() == {"rfid", "rkid", "comparisons"}
    several.write_text(json.dumps([other]))
    assert earlier(read([one, several]), BASE).keys() == {"rfid", "rkid", "comparisons"}


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"comparisons": 3}', '{"comparisons": {"rfid": {"step": 3, "weights_hash": "a"}}}']
)
def test_what_is_no_record_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert earlier(read([tmp_path / "evaluation.json"]), BASE) == {}
    check(tmp_path / "evaluation.json", "f", 3, 1)


def test_a_record_of_other_images_or_more_draws_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"fingerprint": "f", "data": "a/val", "step": 3, "draws": 4, "bits_per_dim_iw": 1.0}))
    check(path, "f", 3, 4)
    check(path, "f", 4, 1)
    with pytest.raises(Refused, match="images other than the a/val"):
        check(path, "g", 3, 4)
    with pytest.raises(Refused, match="--iw 1, because it has the tighter bound of --iw 4: give --out DIR"):
        check(path, "f", 3, 1)


def test_other_numbers_are_those_of_the_same_model_and_images() -> None:
    distance = {"lpips_vgg": 0.3, "perceptual": {"kind": "lpips_vgg"}}
    shares = [{"nearer": 0.5, "training": "f"}, {"nearer": 0.6, "training": "g"}]
    first = {"measured": BASE, "psnr": 3.0, "nearest": shares[0], **distance}
    second = {"measured": BASE, "perceptual": None, "nearest": shares[1]}
    records = [first, second, 3, {"measured": BASE | {"step": 4}, "nearest": {}}, {"measured": BASE, "nearest": 3}]
    assert others(records, BASE, True, "g") == others(records, BASE, True, None) == {"nearest": shares[1], **distance}
    assert others(records, BASE, True, "f") == {"nearest": shares[0], **distance}
    assert others(records, BASE, False, "h") == {}
    assert others(records, BASE | {"weights_hash": "b"}, True, "g") == {}


def test_generated_numbers_of_a_run_are_replaced_only_by_those_of_more_images(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    drawn = {"count": 50, "labels": "equal", "seed": 0, "temperature": 1.0, "reference": "the validation images"}
    path.write_text(json.dumps({"comparisons": {"gfid": {**BASE, **drawn}, "rfid": BASE}}))
    requests = [Request("g", "fd", "FID"), Request("g", "kid", "FID")]
    other = {**drawn, "count": 10, "seed": 1}
    check_drawn(path, requests, BASE, drawn)
    check_drawn(path, requests, BASE, {**drawn, "count": 51})
    check_drawn(path, requests[1:], BASE, other)
    for changed in ({"step": 4}, {"weights_hash": "b"}):
        check_drawn(path, requests, BASE | changed, other)
    check_drawn(tmp_path / "none.json", requests, BASE, other)
    for name, value in {"seed": 1, "temperature": 0.5, "labels": "random", "reference": "x", "count": 49}.items():
        said = f"--{name} {value}, because it has gfid of --{name} {drawn[name]}: give --out DIR"
        for count in ({}, {"count": 60}) if name != "count" else ({},):
            with pytest.raises(Refused, match=said):
                check_drawn(path, requests, BASE, {**drawn, name: value, **count})
    with pytest.raises(Refused, match="training images f, because it has gfid of training images None"):
        check_drawn(path, requests, BASE, {**drawn, "training": "f"})
