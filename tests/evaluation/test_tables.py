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
    lines = tables.comparison([VAE, VQVAE]).splitlines()
    assert len(lines) == 4  # the held-out images are the same: there is nothing to say of them
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
    assert "bits" not in text


def test_bits_of_one_draw_are_said_to_be_the_elbo() -> None:
    one = {key: value for key, value in VAE.items() if key != "bits_per_dim_iw"} | {"draws": 1}
    word = "--iw K draws K latents per image for this bound, which is tighter than the ELBO"
    for text in (tables.listing(one), tables.comparison([one, {**VQVAE, "draws": 1}])):
        assert text.count(word) == 1
        assert "IW-1" not in text
    for text in (tables.listing(VAE), tables.comparison([VAE, VQVAE]), tables.listing({**VQVAE, "draws": 1})):
        assert "--iw" not in text


def test_rows_that_are_not_comparable_are_reported() -> None:
    for other in ({"fingerprint": "fedcba9876543210"}, {"size": 32}, {"channels": 3}):
        text = tables.comparison([VAE, {**VQVAE, **other}])
        assert "These rows are not comparable" in text
        assert "runs/vae: 50000 images of data/digits/val at 16 px, 1 channel(s), index 01234567" in text
    text = tables.comparison([VAE, {**VAE, "run": "runs/binary", "likelihood": "bernoulli"}])
    assert "Bits of binarised images are comparable only with each other: runs/binary." in text


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
