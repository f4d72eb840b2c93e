"""The buffers of a model in one tensor, so that one kernel copies or restores all of them."""

import torch
from torch import Tensor, nn

ALIGNED = 16  # words of 8 bytes between the places of two buffers: kernels read aligned memory faster


def joined(module: nn.Module) -> Tensor:
    """Turns the module's buffers into views of one tensor, which is returned: int64 [words], on the device of its
    parameters, also without buffers.

    The module must change them in place from now on, and must not be moved or converted.
    """
    places: list[tuple[dict[str, Tensor | None], str, Tensor, int]] = []
    end = 0
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                places.append((part._buffers, name, buffer, end))
                end += -(-buffer.nbytes // (8 * ALIGNED)) * ALIGNED
    words = torch.zeros(end, dtype=torch.int64, device=next(module.parameters()).device)
    for owner, name, buffer, start in places:
        held = words[start:].view(torch.uint8)[: buffer.nbytes].view(buffer.dtype).view(buffer.shape)
        owner[name] = held.copy_(buffer)
    return words
