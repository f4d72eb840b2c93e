"""Codecs that others trained: networks of diffusers, and objects of a user's Python file.

Reading a network of diffusers runs no code of its folder, and uses no network. Reading a Python file runs it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import files, plugins
from ..interfaces import Batch, Codec, Condition, Usage
from ..nn.frozen import weights_hash
from .compare import Refused

FORMS = "diffusers:FOLDER nor python:FILE.py:NAME"
CLASSES = ("VQModel", "AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class Foreign(NamedTuple):
    """A codec that was not trained here."""

    name: str  # as given: KIND:PATH
    codec: Codec
    model: str  # its kind, in words
    weights: str | None  # hash of all that the results depend on; None: not known


def read(text: str, device: torch.device) -> Foreign:
    """Returns the codec of `--codec TEXT`, on the device, in fp32 and eval mode. Raises Refused. What the code of a
    Python file raises is passed on."""
    kind, _, path = text.partition(":")
    file, colon, name = path.rpartition(":")
    codec: Codec
    if kind == "diffusers":
        net = _diffusers(Path(path))
        codec = DiffusersVQ(net) if type(net).__name__ == "VQModel" else Diffusers(net)
        model = f"diffusers {type(net).__name__}"
        weights = f"{weights_hash(net)} {files.file_hash(Path(path) / CONFIG)}"
    elif kind == "python" and colon:
        codec = _python(Path(file), name)
        model, weights = type(codec).__name__, None
    else:
        raise Refused(f"--codec {text} is neither {FORMS}")
    if isinstance(codec, nn.Module):
        codec.to(device).eval()
    return Foreign(text, codec, model, weights)


class Diffusers(nn.Module):
    """An autoencoder of diffusers as a Codec."""

    def __init__(self, net: Any) -> None:
        """net: one of CLASSES. Its images lie in [−1, 1]."""
        super().__init__()
        self.net = net

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns one level, fp32 [B, D, h, w]. Raises Refused for images with other channels than the network's."""
        channels = self.net.config.in_channels
        if batch.x.shape[1] != channels:
            name = type(self.net).__name__
            raise Refused(
                f"the {name} takes images of {channels} channel(s), not of {batch.x.shape[1]}: give "
                f"data.channels={channels}"
            )
        found = self.net.encode(batch.x.float() / 127.5 - 1)
        if "latent_dist" in found:
            posterior = found.latent_dist
            noise = torch.randn_like(posterior.mean) if temperature else 0.0
            return [posterior.mean + temperature * posterior.std * noise]
        return [found[0]]

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        if not latents:
            raise ValueError("an autoencoder of diffusers has no prior")
        return (self.decoded(latents[0]) + 1) / 2

    def decoded(self, latents: Tensor) -> Tensor:
        """Returns images in [−1, 1], up to overshoot."""
        images: Tensor = self.net.decode(latents).sample
        return images


class DiffusersVQ(Diffusers):
    """A VQModel of diffusers as a Codec with a codebook."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        net.register_to_config(lookup_from_codebook=True)  # its `decode` then takes codes

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns one level, int64 [B, h, w]."""
        (z,) = super().encode(batch)
        _, _, (_, _, codes) = self.net.quantize(z)
        return [codes.view(len(z), *z.shape[2:])]

    def decoded(self, latents: Tensor) -> Tensor:
        shape = (*latents.shape, self.net.quantize.vq_embed_dim)
        images: Tensor = self.net.decode(latents, force_not_quantize=True, shape=shape).sample
        return images

    def usage(self, clear: bool) -> dict[str, Usage]:
        """Returns zeros: the uses are counted in steps of a training, and there were none here."""
        weight = self.net.quantize.embedding.weight
        none = weight.new_zeros(len(weight), dtype=torch.int64)
        return {"codebook": Usage(none, none > 0, none, none.float(), none.sum(), none.sum())}

    def quantizers(self) -> dict[str, Any]:
        return {"codebook": self.net.config}


def _diffusers(folder: Path) -> Any:
    """Returns the network in a folder. Raises Refused."""
    given = f"--codec diffusers:{folder}"
    try:
        config = files.read_json(folder / CONFIG, lenient=True)
    except OSError as error:
        raise Refused(
            f"{given}: {folder / CONFIG} cannot be read ({error.strerror}): give a local folder with it and {WEIGHTS}"
        ) from None
    except ValueError as error:
        raise Refused(f"{given}: {folder / CONFIG} is damaged ({error}): copy the folder again") from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in CLASSES:
        raise Refused(f"{given} holds a network of class {files.printable(name, 60)}, not {', '.join(CLASSES)}")
    try:
        import diffusers
    except ImportError as error:
        raise Refused(f"{given} needs diffusers ({error}): pip install 'vaescale[diffusers]'") from None
    try:
        net, report = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        reason = files.printable((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise Refused(f"{given} cannot be read ({reason}): it needs {CONFIG} and {WEIGHTS}, undamaged") from None
    if report["missing_keys"]:  # diffusers would leave them at random
        raise Refused(f"{given}: {WEIGHTS} lacks {min(report['missing_keys'])}: copy the folder again")
    return net


def _python(file: Path, name: str) -> Codec:
    """Runs a file and returns its object `name`; of a class, an instance. Raises Refused."""
    try:
        found = getattr(plugins.run(file), name, None)
    except FileNotFoundError as error:
        raise Refused(f"--codec python:{file}:{name}: {error}") from None
    codec = found() if isinstance(found, type) else found
    if not isinstance(codec, Codec):
        raise Refused(
            f"--codec python:{file}:{name}: {file} has no {name} with the methods encode and decode: see Codec in "
            "vaescale/interfaces.py"
        )
    return codec
