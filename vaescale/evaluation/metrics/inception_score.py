"""The inception score: Salimans et al. 2016, "Improved techniques for training GANs", section 4."""

from torch import Tensor

from ..feature_statistics import SPLITS, Statistics
from .metric import Comparison, Number


def inception_score(classes: Tensor) -> tuple[float, float]:
    """Returns the mean and the standard deviation over splits of exp(E_x KL(p(y|x) ‖ p(y))).

    classes: fp64 [S, K + 2], the sums of `feature_statistics.class_sums` over each split. Splits without images are
    left out.
    """
    classes = classes[classes[:, -1] > 0]
    shares, negative_entropy = (classes[:, :-1] / classes[:, -1:]).tensor_split([-1], dim=1)
    # E_x KL(p(y|x) ‖ p(y)) = E_x Σ_y p(y|x) log p(y|x) − Σ_y p(y) log p(y)
    scores = (negative_entropy[:, 0] - shares.xlogy(shares).sum(1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def result(reference: Statistics, other: Statistics) -> dict[str, float]:
    del reference
    assert other.classes is not None
    mean, deviation = inception_score(other.classes)
    return {"is": mean, "is_std": deviation}


INCEPTION_SCORE = Comparison(
    numbers={"is": Number("IS", ".3f", "IS"), "is_std": Number("IS, standard deviation over splits", ".3f")},
    protocol={
        "is": "inception score (Salimans et al. 2016) of all classes that the features' network knows, mean over "
        f"{SPLITS} splits in sample order; is_std: over splits",
    },
    result=result,
    rows=False,
    classes=True,
)
