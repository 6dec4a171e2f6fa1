"""Losses of classifiers against loops in Python's floats."""

import math

import pytest
import torch

from amimv import InputError
from amimv.models.supervised_losses import balanced_softmax_loss, cross_entropy_loss, logit_adjusted_loss

COUNTS = (500, 40, 7, 1)


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 4, generator=generator, dtype=torch.float64) * 3, torch.arange(9) % 4


def loop(logits: list[list[float]], labels: list[int], weights: list[float], smoothing: float) -> float:
    """Mean of ``-sum_c target_c * log(w_c e^l_c / sum_j w_j e^l_j)``."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        terms = [w * math.exp(value) for w, value in zip(weights, row, strict=True)]
        for c, term in enumerate(terms):
            target = smoothing / len(row) + (1 - smoothing) * (c == label)
            total -= target * math.log(term / sum(terms))
    return total / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_is_its_formula(smoothing: float) -> None:
    logits, labels = draw()
    given = logits.tolist(), labels.tolist()
    plain = cross_entropy_loss(logits, labels, COUNTS, smoothing=smoothing)
    assert float(plain) == pytest.approx(loop(*given, [1.0] * 4, smoothing), rel=1e-12)
    for tau in (0.5, 1.0, 2.0):
        prior = [(n / sum(COUNTS)) ** tau for n in COUNTS]
        found = logit_adjusted_loss(logits, labels, COUNTS, tau=tau, smoothing=smoothing)
        assert float(found) == pytest.approx(loop(*given, prior, smoothing), rel=1e-12)
    balanced = balanced_softmax_loss(logits, labels, COUNTS, smoothing=smoothing)
    assert float(balanced) == pytest.approx(loop(*given, [float(n) for n in COUNTS], smoothing), rel=1e-12)


def test_logits_that_are_the_log_counts_are_no_better_than_none() -> None:
    """The adjusted classifier has to tell classes apart beyond their frequency: of equal logits the loss is that of
    always answering by the prior."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    prior = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    equal = torch.zeros(len(labels), 4, dtype=torch.float64)
    found = float(balanced_softmax_loss(equal, labels, COUNTS))
    assert found == pytest.approx(float(-(prior * prior.log()).sum()), rel=1e-12)


def test_a_class_without_images_gives_no_infinity() -> None:
    logits, labels = draw()
    logits.requires_grad_()
    loss = logit_adjusted_loss(logits, labels % 3, (5, 4, 3, 0), smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_counts_of_other_classes_are_refused() -> None:
    with pytest.raises(InputError, match="3 counts for 4 classes"):
        balanced_softmax_loss(*draw(), (1, 2, 3))
