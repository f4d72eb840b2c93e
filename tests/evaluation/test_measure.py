import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.evaluation.test_metrics import Halves
from vaescale.data import stream
from vaescale.evaluation import measure as module
from vaescale.evaluation import reference as references
from vaescale.evaluation.compare import Gathering, Refused, Request, chosen, compared
from vaescale.evaluation.drawing import Unsupported
from vaescale.evaluation.evaluate import evaluate, reconstruct
from vaescale.evaluation.feature_statistics import Statistics
from vaescale.evaluation.generation import Generated
from vaescale.evaluation.measure import Comparer, Drawing, measure
from vaescale.evaluation.record import read
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

    def generate(count: int, rank: int, world: int) -> Iterator[Generated]:
        for number in torch.arange(count).split(5):
            yield Generated(number, number, drawn[number])

    requests = [Request(*one, net.words) for one in chosen(["rfd", "rpr", "gfd"], ["random"])["random"]]
    known: dict[str, Statistics] = {}
    found = measure(Halves(), slices, CPU, requests, [net], 9, generate, known=known, micro=4)
    expected = compared(requests[:2], gathered(batch.x), gathered(y))
    expected |= compared(requests[2:], gathered(batch.x), gathered(drawn))
    plain = evaluate(Halves(), slices, CPU, 4)
    assert found == {**plain, **expected}
    assert torch.equal(known[net.words].rows, gathered(batch.x)[net.words].rows)

    reference = gathered(y)
    other = measure(Halves(), slices, CPU, requests, [net], 9, generate, reference, known, micro=4)
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
    for images in (11 + 11, 11):  # of both sides
        seen = 0
        found.append(measure(Halves(), slices, CPU, [Request("r", "fd", net.words)], [net], known=known))
        assert seen == images
    assert found[0] == found[1]


def test_a_comparison_of_the_same_protocol_is_not_measured_again(
    slices: stream.ValidationSlices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"weights_hash": "a", "settings_hash": "s", "step": 3, "images": 11, "data": "f", "size": 16, "channels": 3}
    record = tmp_path / "evaluation.json"
    first = Comparer(["rfd", "rpr"], ["random"]).measure(Halves(), slices, CPU, base, read([record]))
    record.write_text(json.dumps(first))
    assert first["comparisons"].keys() == {"rfd_random", "rpr_random"}
    assert "not measured again" not in capsys.readouterr().err

    left: list[list[Request]] = []
    whole = module.measure

    def watched(*arguments: object, **options: object) -> object:
        left.append(list(arguments[3]))  # type: ignore[call-overload]
        return whole(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure", watched)
    both = Comparer(["rfd", "rkid"], ["random"]).measure(Halves(), slices, CPU, base, read([record]))
    assert [request.name for request in left[-1]] == ["kid"]
    assert "the protocol is the same: rfd_random" in capsys.readouterr().err
    assert {name: both[name] for name in first if name != "comparisons"} == {
        name: value for name, value in first.items() if name != "comparisons"
    }
    assert both["comparisons"].keys() == {"rfd_random", "rpr_random", "rkid_random"}
    assert both["rkid_random"] > 0

    without = Comparer([], ["random"]).measure(Halves(), slices, CPU, base, read([record]))
    assert without == first  # a quick evaluation throws nothing away
    for changed in ({"weights_hash": "b"}, {"settings_hash": "t"}, {"step": 4}, {"data": "g"}, {"size": 8}):
        other = Comparer(["rfd"], ["random"]).measure(Halves(), slices, CPU, base | changed, read([record]))
        assert [request.name for request in left[-1]] == ["fd"]
        assert other["comparisons"].keys() == {"rfd_random"}
        assert "rprecision_random" not in other
    drawn = features.drawn
    monkeypatch.setattr(features, "read", lambda name: drawn(name, seed=1))
    other = Comparer(["rfd"], ["random"]).measure(Halves(), slices, CPU, base, read([record]))
    assert [request.name for request in left[-1]] == ["fd"]
    assert other["rfd_random"] != first["rfd_random"]


def test_a_network_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> features.Features:
        raise ValueError(f"{name}.pth does not exist: fetch it")

    monkeypatch.setattr(features, "read", missing)
    assert Comparer([], ["random"]).nets == []
    with pytest.raises(Refused, match=r"random.pth does not exist: fetch it"):
        Comparer(["rfd"], ["random"])


def test_other_ways_of_generating_are_other_protocols(slices: stream.ValidationSlices, tmp_path: Path) -> None:
    base = {"weights_hash": "a", "settings_hash": "s", "step": 3, "images": 11, "data": "f", "size": 16, "channels": 3}
    record, asked = tmp_path / "evaluation.json", []

    def generate(count: int, rank: int, world: int) -> Iterator[Generated]:
        asked.append(count)
        x = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        yield Generated(torch.arange(count), torch.arange(count), x)

    def measured(drawing: Drawing, *names: str, reference: Path | None = None) -> dict[str, object]:
        comparer = Comparer(names, ["random"], drawing, reference)
        found = comparer.measure(Halves(), slices, CPU, base, read([record]), generate)
        record.write_text(json.dumps(found))
        return found

    first = measured(Drawing(20), "gfd", "rfd")
    assert first["comparisons"]["gfd_random"].items() >= {  # type: ignore[index]
        "count": 20, "labels": "equal", "seed": 0, "temperature": 1.0, "reference": "the validation images",
    }.items()  # fmt: skip
    assert "count" not in first["comparisons"]["rfd_random"]  # type: ignore[index]
    assert asked == [1, 20]  # the first is a trial
    assert measured(Drawing(20), "gfd", "rfd") == first
    assert asked == [1, 20]
    file = tmp_path / "x.safetensors"
    net = features.drawn("random")
    images = {"data": "x", "fingerprint": "0", "size": 16, "channels": 3}
    references.write(file, gathered(slices[range(11)].batch.x)[net.words], net, images)
    for changed in (Drawing(21), Drawing(20, seed=1), Drawing(20, temperature=0.5), Drawing(20, labels="random")):
        asked.clear()
        assert measured(changed, "gfd", "rfd")["rfd_random"] == first["rfd_random"]
        assert asked == [1, changed.count]
    asked.clear()
    again = measured(Drawing(20), "gfd", reference=file)
    assert asked == [1, 20]
    assert again["gfd_random"] == pytest.approx(first["gfd_random"], rel=1e-12)
    assert "x.safetensors, xxh3" in again["comparisons"]["gfd_random"]["reference"]  # type: ignore[index]


def test_a_reference_that_nothing_is_compared_with_is_refused(tmp_path: Path) -> None:
    for names in ([], ["rfd", "rkid"]):
        with pytest.raises(Refused, match=r"x\.npz is for comparisons of generated images"):
            Comparer(names, ["random"], reference=tmp_path / "x.npz")


def test_a_model_without_a_prior_is_refused_before(slices: stream.ValidationSlices) -> None:
    def generate(count: int, rank: int, world: int) -> Iterator[Generated]:
        raise Unsupported("the model has no prior")
        yield

    net = features.drawn("random")
    with pytest.raises(Refused, match="no images can be generated: the model has no prior"):
        measure(Halves(), slices, CPU, [Request("g", "fd", net.words)], [net], 20, generate)
