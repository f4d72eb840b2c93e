import json
from pathlib import Path

import pytest
import torch

from tests.evaluation.test_metrics import Halves
from vaescale.data import stream
from vaescale.evaluation import measure as module
from vaescale.evaluation.compare import Gathering, Refused, Request, chosen, compared
from vaescale.evaluation.evaluate import evaluate, reconstruct
from vaescale.evaluation.measure import Comparer, Generated, measure
from vaescale.evaluation.statistics import Statistics
from vaescale.nn import features

CPU = torch.device("cpu")


@pytest.fixture
def slices(pictures: Path) -> stream.ValidationSlices:
    return stream.ValidationSlices(stream.Config(root=str(pictures), size=16, workers=0))


def gathered(x: torch.Tensor) -> dict[str, Statistics]:
    gathering = Gathering([features.drawn("random")], len(x), x[:1])
    gathering.add(torch.arange(len(x)), x)
    return gathering.result()


def test_each_side_is_compared_with_its_reference(slices: stream.ValidationSlices) -> None:
    """Reconstructions with the validation images, generated images with these or with what is given."""
    net = features.drawn("random")
    batch = slices[range(11)].batch
    y, _ = reconstruct(Halves(), batch)
    drawn = torch.randint(0, 256, (9, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generated = Generated(9, [(torch.arange(5), drawn[:5]), (torch.arange(5, 9), drawn[5:])])
    requests = [Request(*one, net.words) for one in chosen(["rfd", "rpr", "gfd"], ["random"])]
    known: dict[str, Statistics] = {}
    found = measure(Halves(), slices, CPU, requests, [net], generated, known=known, micro=4)
    expected = compared(requests[:2], gathered(batch.x), gathered(y))
    expected |= compared(requests[2:], gathered(batch.x), gathered(drawn))
    plain = evaluate(Halves(), slices, CPU, 4)
    assert found == {**plain, **expected}
    assert torch.equal(known[net.words].rows, gathered(batch.x)[net.words].rows)

    reference = gathered(y)
    other = measure(Halves(), slices, CPU, requests, [net], generated, reference, known, micro=4)
    assert other == {**found, **compared(requests[2:], reference, gathered(drawn))}
    assert other["gfd_random"] != found["gfd_random"]


def test_the_features_of_known_images_are_not_computed_again(
    slices: stream.ValidationSlices, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = features.drawn("random")
    seen = 0
    call = type(net).__call__

    def counting(self: features.Features, x: torch.Tensor) -> object:
        nonlocal seen
        seen += len(x)
        return call(self, x)

    monkeypatch.setattr(features.Features, "__call__", counting)
    known: dict[str, Statistics] = {}
    found = []
    for images in (11 + 11 + 2, 11 + 1):  # of both sides; one more of each for the shapes
        seen = 0
        found.append(measure(Halves(), slices, CPU, [Request("r", "fd", net.words)], [net], known=known))
        assert seen == images
    assert found[0] == found[1]


def test_a_comparison_of_the_same_protocol_is_not_measured_again(
    slices: stream.ValidationSlices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"weights": "a", "step": 3, "images": 11, "data": "f", "size": 16, "channels": 3}
    record = tmp_path / "evaluation.json"
    first = Comparer(["rfd", "rpr"], ["random"]).measure(Halves(), slices, CPU, base, [record])
    record.write_text(json.dumps(first))
    assert first["comparisons"].keys() == {"rfd_random", "rpr_random"}
    assert "not measured again" not in capsys.readouterr().err

    left: list[list[Request]] = []
    whole = module.measure

    def watched(*arguments: object, **options: object) -> object:
        left.append(list(arguments[3]))  # type: ignore[call-overload]
        return whole(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure", watched)
    both = Comparer(["rfd", "rkid"], ["random"]).measure(Halves(), slices, CPU, base, [record])
    assert [request.name for request in left[-1]] == ["kid"]
    assert "the protocol is the same: rfd_random" in capsys.readouterr().err
    assert {name: both[name] for name in first if name != "comparisons"} == {
        name: value for name, value in first.items() if name != "comparisons"
    }
    assert both["comparisons"].keys() == {"rfd_random", "rpr_random", "rkid_random"}
    assert both["rkid_random"] > 0

    without = Comparer([], ["random"]).measure(Halves(), slices, CPU, base, [record])
    assert without == first  # a quick evaluation throws nothing away
    for changed in ({"weights": "b"}, {"step": 4}, {"data": "g"}, {"size": 8}):
        other = Comparer(["rfd"], ["random"]).measure(Halves(), slices, CPU, base | changed, [record])
        assert [request.name for request in left[-1]] == ["fd"]
        assert other["comparisons"].keys() == {"rfd_random"}
        assert "rprecision_random" not in other
    drawn = features.drawn
    monkeypatch.setattr(features, "read", lambda name: drawn(name, seed=1))
    other = Comparer(["rfd"], ["random"]).measure(Halves(), slices, CPU, base, [record])
    assert [request.name for request in left[-1]] == ["fd"]
    assert other["rfd_random"] != first["rfd_random"]


def test_a_network_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> features.Features:
        raise ValueError(f"{name}.pth does not exist: fetch it")

    monkeypatch.setattr(features, "read", missing)
    assert Comparer([], ["random"]).nets == []
    with pytest.raises(Refused, match=r"random.pth does not exist: fetch it"):
        Comparer(["rfd"], ["random"])
