"""Settings that had other names in earlier versions.

A config file or an override with an old name is refused with the new one. The config.yaml of a run that was begun with
old names is read with the new ones.
"""

from typing import Any

VERSION = 2  # of the names; version 1 did not record its number
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
    "model.downsampling": "model.downsample_factor",
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
}


def rename(raw: dict[str, Any]) -> None:
    """Gives the settings in `raw` (nested sections) their new names, in place."""
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        section: Any = raw
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            section[new.rpartition(".")[2]] = section.pop(name)
