"""The perceptual distance of reconstructions, if one is given. Its kind decides the name of the number."""

from ...interfaces import Tensors
from ...nn.perceptual import KINDS
from .metric import Metric, Number, Seen


def sums(seen: Seen) -> Tensors:
    if seen.distance is None:
        return {}
    values = seen.distance(seen.reconstruction / 255, seen.batch.x / 255)
    return {seen.distance.kind: values.double().sum()}


PERCEPTUAL = Metric(
    numbers={name: Number(kind.words, ".4f", kind.words) for name, kind in KINDS.items()},
    protocol={
        "lpips_vgg": "version 0.1 of Zhang et al. 2018 with the published VGG16 and heads, of reconstructions rounded "
        "to 8 bits, at the size of the model's images; mean over images",
        "lpips_alex": "the same with the published AlexNet and heads",
        "perceptual_hed": "not LPIPS: mean over five stages and positions of 1 - cos of the features of a VGG16 that "
        "was trained on ImageNet and BSDS500, without trained heads",
        "perceptual_random": "the same with a random VGG16: for tests only",
    },
    sums=sums,
)
