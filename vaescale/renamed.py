"""Settings that had other names in earlier versions.

A config file or an override with an old name is refused with the new one. The config.yaml of a run that was begun with
old names is read with the new ones.
"""

from typing import Any

VERSION = 3  # of the names; version 1 did not record its number
MOVED = {  # since version 3, for model.kind=vqvae
    "model.downsample_factor": "model.network.downsample_factor",
    "model.width": "model.network.width",
    "model.residual_blocks": "model.network.residual_blocks",
    "model.residual_width": "model.network.residual_width",
}
RENAMED = {
    "batch": "global_batch",
    "zero": "zero_stage",
    "ema": "ema_decay",
    "keep": "keep_last",
    "model.latents": "model.latent_dim",
    "model.top_latents": "model.top_latent_dim",
    "model.warmup": "model.beta_warmup_steps",
    "model.embedding": "model.embedding_dim",
    "model.likelihood.learned": "model.likelihood.learned_variance",
    "model.downsampling": "model.network.downsample_factor",
    "model.quantizer.codes": "model.quantizer.codebook_size",
    "model.quantizer.project": "model.quantizer.codebook_dim",
    "model.quantizer.entropy": "model.quantizer.entropy_weight",
    "model.quantizer.temperature": "model.quantizer.entropy_temperature",
    "model.quantizer.decay": "model.quantizer.ema_decay",
    "data.least_area": "data.min_crop_area",
    "data.most_megapixels": "data.max_megapixels",
    "data.damaged_share": "data.max_damaged_ratio",
    "data.damaged_free": "data.damaged_allowance",
    "optimizer.clip": "optimizer.grad_clip",
    "optimizer.warmup": "optimizer.warmup_steps",
    "optimizer.final": "optimizer.final_lr_ratio",
    "optimizer.patience": "optimizer.max_skipped_steps",
    **MOVED,
}


def rename(raw: dict[str, Any]) -> None:
    """Gives the settings in `raw` (nested sections) of an earlier version their new names, in place."""
    version, model = str(raw.get("version", "1")), raw.get("model")
    quantized = isinstance(model, dict) and model.get("kind") == "vqvae"
    if version not in ("1", "2"):
        return
    for old, new in RENAMED.items():
        if quantized if old in MOVED else version == "1":
            _move(raw, old.split("."), new.split("."))
    if "version" in raw:
        raw["version"] = str(VERSION)


def _move(raw: dict[str, Any], old: list[str], new: list[str]) -> None:
    section: Any = raw
    for part in old[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or old[-1] not in section:
        return
    value, section = section.pop(old[-1]), raw
    for part in new[:-1]:
        section = section.setdefault(part, {})
    section[new[-1]] = value
