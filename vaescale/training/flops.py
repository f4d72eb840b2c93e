"""Model FLOPs, for the model FLOPs utilisation (MFU, Chowdhery et al. 2022, "PaLM", appendix B): what activation
checkpointing computes again in the backward pass does not count."""

from contextlib import suppress

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..settings import Config, blank, build, build_critic

# Peak FLOP/s of dense 16-bit matrix products from NVIDIA's data sheets, by device name.
PEAKS = {
    "A100": 312e12,
    "H100 80GB": 989e12,  # SXM; the PCIe card has a lower peak
    "H200": 989e12,
}


def peak(config: Config, device: torch.device) -> float:
    """Returns the device's peak FLOP/s; 0 if unknown: on other devices, and in fp32, which may or may not use TF32."""
    if device.type != "cuda" or config.precision == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAKS.items() if key in name), 0.0)


def per_image(config: Config) -> int:
    """Returns the FLOPs of matrix products and convolutions in the forward and backward pass of one image,
    with a critic those of a step with the adversarial term.

    Returns 0 for a closed form, which has no backward pass, and for models with data-dependent control flow. Only
    shapes are propagated, nothing is computed; very deep models take some seconds.
    """
    with suppress(RuntimeError), FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = build(config).eval()  # in training mode a forward pass keeps rows for `update`, not called here
        model(blank(config, 1), 0).loss.backward()
        if critic := build_critic(config):
            x = blank(config, 1).x / 255
            critic(x.repeat(2, 1, 1, 1)).sum().backward()  # its own pass, without R1
            critic.requires_grad_(False)
            critic(x.requires_grad_()).sum().backward()  # the model's
        return counter.get_total_flops()
    return 0
