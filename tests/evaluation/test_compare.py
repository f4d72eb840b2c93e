import pytest
import torch

from vaescale.evaluation import compare, metrics
from vaescale.evaluation.compare import NAMES, Gathering, Refused, Request, check, chosen, compared, key_of
from vaescale.evaluation.feature_statistics import Statistics
from vaescale.evaluation.metrics.kernel_distance import kernel_distance
from vaescale.nn import features

LITE = "FD (EfficientNet-Lite0)"


def test_names_are_those_of_the_table() -> None:
    assert chosen(["gpr", "rfd"], ["random"]) == {"random": [("r", "fd"), ("g", "pr")]}
    assert {name for _, name in chosen(NAMES, ["random"])["random"]} == set(metrics.COMPARISONS)


def test_other_names_mean_these_and_may_choose_the_network() -> None:
    words = ["psnr", "ssim", "lpips", "rfid", "gfid", "kid", "is", "pr", "fd-dinov2"]
    asked = {"inception": [("r", "fd"), ("r", "kid"), ("r", "pr"), ("g", "fd"), ("g", "is")], "dinov2": [("r", "fd")]}
    assert chosen(words, ["inception"]) == asked
    assert chosen(["rfid", "rfd", "kid", "rkid"], ["random"]) == {
        "random": [("r", "fd"), ("r", "kid")],
        "inception": [("r", "fd")],
    }
    assert chosen(["fd-dinov2", "rfd"], ["dinov2"]) == {"dinov2": [("r", "fd")]}
    assert chosen(["psnr", "ssim", "lpips"], ["inception"]) == chosen([], ["inception"]) == {}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(Refused, match=r"--metrics fid is not one of rfd, rkid, rpr,.* psnr, .* fd-dinov2"):
        chosen(["fid"], ["inception"])


def test_only_the_published_inception_is_called_fid() -> None:
    assert [key_of("r", name, "FID") for name in ("fd", "kid", "precision")] == ["rfid", "rkid", "rprecision"]
    assert key_of("g", "fd", LITE) == "gfd_efficientnet_lite0"
    numbers = compare.numbers(["FID", LITE])
    assert numbers["rfid"].column == "rFID"
    assert numbers["rfd_efficientnet_lite0"].words == "rFD (EfficientNet-Lite0)"
    assert numbers["gprecision"].words == "g-precision"
    assert not any("FID" in number.words for key, number in numbers.items() if key.endswith("lite0"))
    assert "ris" not in numbers


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_numbers_are_those_of_the_statistics_of_both_sides() -> None:
    """Whatever the order and size of the batches."""
    net = features.drawn("random")
    x, y = images(20, 0), images(20, 1)
    known = []
    for rows in (x, y):
        gathering = Gathering([net], len(rows), rows[:1])
        for numbers in torch.arange(len(rows)).flip(0).split(7):
            gathering.add(numbers, rows[numbers])
        known.append(gathering.result())
        one = known[-1][net.words]
        assert torch.equal(one.rows, net(rows)[0])
    both = [one[net.words] for one in known]
    found = {
        side: compared([Request(side, name, net.words) for name in metrics.COMPARISONS], *known) for side in ("r", "g")
    }
    for name, comparison in metrics.COMPARISONS.items():
        for key, value in comparison.result(*both).items():
            assert found["g"][f"g{key}_random"] == value, name
            if name != "kid":
                assert found["r"][f"r{key}_random"] == value, name
    paired = kernel_distance(both[0].rows, both[1].rows, paired=True)
    assert (found["r"]["rkid_random"], found["r"]["rkid_std_random"]) == paired
    assert paired[0] != found["g"]["gkid_random"]


@pytest.mark.parametrize("micro", [1, 7, 64])
def test_evenly_spaced_images_stand_for_all(micro: int) -> None:
    """Whatever the order and size of the batches."""
    net = features.drawn("random")
    x = images(50, 0)
    gathering = Gathering([net], 50, x[:1], 36)
    for numbers in torch.arange(50).flip(0).split(micro):
        gathering.add(numbers, x[numbers])
    chosen = Gathering([net], 36, x[:1])
    chosen.add(torch.arange(36), x[[number * 50 // 36 for number in range(36)]])
    found, expected = (one.result()[net.words] for one in (gathering, chosen))
    assert found.count == 36
    assert torch.equal(found.rows, expected.rows)
    assert Gathering([net], 50, x[:1], 51).count == 50


def test_what_cannot_be_measured_is_refused_before() -> None:
    net = features.drawn("random")
    words = net.words
    gathering = Gathering([net], 6, images(1, 0))
    moments = Statistics(50_000, torch.zeros(64), torch.eye(64), torch.zeros(0, 64))
    check([Request("g", name, words) for name in metrics.COMPARISONS], gathering, gathering.by_net)
    check([Request("g", name, words) for name in ("fd", "is")], gathering, {words: moments})
    with pytest.raises(Refused, match="gkid needs features of single images, which the reference does not have"):
        check([Request("g", "kid", words)], gathering, {words: moments})
    few = Gathering([net], 5, images(1, 0))
    with pytest.raises(Refused, match="rpr needs at least 6 images on each side, not 5 and 6"):
        check([Request("r", "pr", words)], few, gathering.by_net)
    gathering.by_net[words].classes = None
    with pytest.raises(Refused, match="gis needs classes, which random does not have"):
        check([Request("g", "is", words)], gathering, gathering.by_net)
