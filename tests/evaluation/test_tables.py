import torch

from vaescale.evaluation import tables

VAE = {
    "run": "runs/vae", "model": "vae", "parameters": 123456, "latents": "16", "bits_per_dim": 1.25, "rate": 0.25,
    "bits_per_dim_iw": 1.125, "distortion": 1.0, "mse": 0.012, "psnr": 19.5, "ssim": 0.9, "active_units": 11,
    "images": 50000, "draws": 64, "step": 7, "data": "data/digits/val", "fingerprint": "0123456789abcdef", "size": 16,
    "channels": 1, "likelihood": "gaussian",
}  # fmt: skip
BITS = ("bits_per_dim", "bits_per_dim_iw", "rate", "distortion")
VQVAE = {
    **{key: value for key, value in VAE.items() if key not in (*BITS, "active_units")},
    "run": "runs/vq", "model": "vqvae", "codebook0/usage": 0.5, "codebook1/usage": 0.75, "codebook0/perplexity": 9.0,
    "codebook1/perplexity": 30.0,
}  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_are_side_by_side_with_a_dash_for_missing_numbers() -> None:
    *lines, empty, protocol = tables.comparison([VAE, VQVAE]).splitlines()
    assert (len(lines), empty) == (4, "")
    assert protocol.startswith("Measured on 50000 images of data/digits/val at 16 px, 1 channel(s), index 01234567; ")
    assert len({len(line) for line in lines}) == 1
    names, _, vae, vqvae = map(cells, lines)
    first, second = dict(zip(names, vae, strict=True)), dict(zip(names, vqvae, strict=True))
    assert first["parameters"] == "123,456"
    assert (first["bits/dim"], first["bits/dim, IW-64"], first["active units"]) == ("1.2500", "1.1250", "11")
    assert (first["usage"], second["bits/dim"], second["active units"]) == ("–", "–", "–")
    assert (second["usage"], second["perplexity"]) == ("0.500 … 0.750", "9.0 … 30.0")


def test_a_column_that_no_run_has_is_left_out() -> None:
    names = cells(tables.comparison([VAE, VAE]).splitlines()[0])
    assert "bits/dim, IW-64" in names
    assert not {"usage", "perplexity"} & set(names)
    text = tables.comparison([VQVAE, VQVAE])
    assert "bits/dim" not in text


def test_bits_of_one_draw_are_said_to_be_the_elbo() -> None:
    one = {key: value for key, value in VAE.items() if key != "bits_per_dim_iw"} | {"draws": 1}
    word = "--iw K draws K latents per image for this bound, which is tighter than the ELBO"
    for text in (tables.listing(one), tables.comparison([one, {**VQVAE, "draws": 1}])):
        assert text.count(word) == 1
        assert "IW-1" not in text
    for text in (tables.listing(VAE), tables.comparison([VAE, VQVAE]), tables.listing({**VQVAE, "draws": 1})):
        assert "--iw" not in text


def test_results_of_other_images_have_a_table_of_their_own() -> None:
    for other, words in (
        ({"fingerprint": "fedcba9876543210"}, "images of index fedcba98 instead of 01234567"),
        ({"size": 32, "channels": 3}, "size 32 instead of 16; channels 3 instead of 1"),
    ):
        lines = tables.comparison([VAE, {**VQVAE, **other}, VAE]).splitlines()
        assert f"Not comparable with the first table: {words}." in lines
        rows = [[cells(line)[0] for line in part.splitlines() if line[0] == "|"][2:] for part in split(lines)]
        assert [one for one in rows if one] == [["runs/vae", "runs/vae"], ["runs/vq"]]
        assert sum(line.startswith("Measured on 50000 images") for line in lines) == 2
    text = tables.comparison([VAE, {**VAE, "run": "runs/binary", "likelihood": "bernoulli"}])
    assert "Bits of binarised images are comparable only with each other: runs/binary." in text


def split(lines: list[str]) -> list[str]:
    return "\n".join(lines).split("\n\n")


def test_comparisons_of_unlike_protocols_do_not_meet_in_a_row() -> None:
    """The step and the weights may differ."""
    inception = {
        "words": "FID",
        "layer": "pool3",
        "resize": "to 299",
        "file": "pt_inception.pth",
        "sha256": "6726825d0af5",
    }
    protocol = {"numbers": ["rfid"], "how": {"fd": "in float64"}, "features": inception, "weights_hash": "a", "step": 1}
    drawn = {
        **protocol,
        "count": 50_000,
        "labels": "equal",
        "seed": 0,
        "temperature": 1.0,
        "reference": "x.safetensors",
    }
    one = {**VAE, "rfid": 1.5, "gfid": 9.0, "comparisons": {"rfid": protocol, "gfid": drawn}}
    alike = {**one, "run": "b", "comparisons": {"rfid": {**protocol, "weights_hash": "b", "step": 2}, "gfid": drawn}}
    text = tables.comparison([one, alike, VQVAE])
    names, _, *rows = [cells(line) for line in text.splitlines() if line[:1] == "|"]
    assert [row[names.index("rFID")] for row in rows] == ["1.500", "1.500", "–"]
    assert text.splitlines()[-2:] == [
        "FID: pool3, to 299; weights pt_inception.pth, sha256 6726825d.",
        "50,000 generated images, labels equal, seed 0, temperature 1, against x.safetensors.",
    ]
    assert "FID: pool3, to 299; weights" in tables.listing(one)
    assert "gFID" in tables.listing(one)
    for changed, words in (
        ({"rfid": protocol, "gfid": {**drawn, "count": 5000}}, "gfid: count 5000 instead of 50000"),
        (
            {"rfid": {**protocol, "features": {**inception, "sha256": "0"}}},
            "rfid: features sha256 0 instead of 6726825d0af5",
        ),
        ({"rfid": {**protocol, "how": {"fd": "in float32"}}}, "rfid: how fd in float32 instead of in float64"),
    ):
        text = tables.comparison([one, {**one, "comparisons": changed}])
        assert f"\n\nNot comparable with the first table: {words}.\n\n|" in text
    assert "Not comparable" not in tables.comparison([one, {**one, "comparisons": {}}])


def test_perceptual_distances_of_other_files_do_not_meet_in_a_row() -> None:
    one, other = ({**VAE, "perceptual": {"kind": "lpips_vgg", "sha256": digest}} for digest in "ab")
    assert "lpips_vgg: sha256 b instead of a" in tables.comparison([one, other])
    assert "Not comparable" not in tables.comparison(
        [one, {**other, "perceptual": {"kind": "lpips_alex", "sha256": "b"}}]
    )


def test_the_latex_form_has_the_same_cells() -> None:
    results = [VAE, {**VQVAE, "run": "runs/vq_10%"}]
    lines = tables.comparison(results, "latex").splitlines()
    assert lines[0] == r"\begin{tabular}{" + "llrl" + "r" * 10 + "}"
    assert lines[-1].startswith("% Measured on 50000 images")
    rows = [line.removesuffix(r" \\").split(" & ") for line in lines if " & " in line]
    plain = [cells(line) for line in tables.comparison(results).splitlines() if line[:1] == "|"]
    marks = {"–": "--", "…": r"\ldots{}", "_": r"\_", "%": r"\%", "×": r"$\times$"}
    for ours, theirs in zip(rows, [plain[0], *plain[2:]], strict=True):
        assert ours == ["".join(marks.get(mark, mark) for mark in cell) for cell in theirs]
    assert rows[2][0] == r"runs/vq\_10\%"


def test_a_listing_holds_every_number_once() -> None:
    text = tables.listing({**VAE, "rate/level0": 0.2, "rate/level1": 0.05})
    lines = [line.split("  ") for line in text.splitlines()[1:]]
    found = {parts[1]: parts[-1].strip() for parts in lines}
    assert found["bits/dim, ELBO"] == "1.25"
    assert found["rate (bits/dim), level1"] == "0.05"
    assert found["images"] == "50000"
    assert "not measured: its window is wider" in tables.listing(
        {key: value for key, value in VAE.items() if key != "ssim"}
    )


def test_the_line_of_a_validation_has_the_available_numbers() -> None:
    measured = {"psnr": 30.0, "bits_per_dim": 1.25, "active_units": 7, "images": 11, "mse": 0.1, "rate/level0": 0.5}
    assert tables.line(measured) == "bits/dim 1.2500  PSNR 30.00  active units 7"
    usage = {f"codebook{level}/usage": share for level, share in enumerate([0.75, 0.5, 1.0])}
    several = {**usage, "codebook0/perplexity": 9.0, "codebook1/perplexity": 9.0}
    assert tables.line(several) == "usage 0.500–1.000  perplexity 9.0"


def test_latents_are_described_by_their_shape() -> None:
    grid = torch.zeros(3, 32, 24)
    assert tables.latents_in_words([torch.zeros(3, 16)], []) == "16"
    assert tables.latents_in_words([grid], [512]) == "32 × 24, K = 512"
    assert tables.latents_in_words([grid, grid], [512, 512]) == "2 × (32 × 24, K = 512)"
    assert tables.latents_in_words([grid, torch.zeros(3, 16, 12)], [512, 64]) == "32 × 24, K = 512 + 16 × 12, K = 64"
