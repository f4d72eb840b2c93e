"""Model FLOPs, and the share of a device's peak that they are (MFU, Chowdhery et al. 2022, "PaLM", appendix B): what is
computed again in the backward pass, by checkpointing, does not count."""

from contextlib import suppress

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..settings import Config, blank, build

# FLOP/s of dense products of 16-bit numbers, from NVIDIA's data sheets, by the device's name.
PEAKS = {
    "A100": 312e12,
    "H100 80GB": 989e12,  # SXM; the PCIe card is another
    "H200": 989e12,
}


def peak(config: Config, device: torch.device) -> float:
    """FLOP/s; 0 where it is not known: of other devices, and in fp32, whose products may or may not be TF32."""
    if device.type != "cuda" or config.precision == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAKS.items() if key in name), 0.0)


def per_image(config: Config) -> int:
    """FLOPs of one image's forward and backward pass: those of products and convolutions. 0 for a closed form, which
    has no backward pass, and for a model whose course depends on values. Nothing is computed; for the shapes alone very
    deep models take some seconds."""
    with suppress(RuntimeError), FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = build(config).eval()  # a training forward would wait for an update that never comes
        model(blank(config, 1), 0).loss.backward()
        return counter.get_total_flops()
    return 0
