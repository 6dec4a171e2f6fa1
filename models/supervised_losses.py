"""Losses of a classifier under a long tail: ``(B, C)`` logits and ``(B,)`` classes in, a scalar out.

`logit_adjusted_loss` and `balanced_softmax_loss` are for batches in which classes are as frequent as ``counts`` says;
of class-balanced batches there is nothing left to correct.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from amimv import InputError


def cross_entropy_loss(logits: Tensor, labels: Tensor, counts: Sequence[int], *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, whatever the counts; ``smoothing`` is the share of the target that all classes have alike
    (Szegedy et al. 2016, section 7).
    """
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def logit_adjusted_loss(
    logits: Tensor, labels: Tensor, counts: Sequence[int], *, tau: float = 1.0, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of ``logits + tau * log(prior)`` (Menon et al. 2021, equation 10): what it makes largest for the
    balanced error are the logits without it, by which a network then classifies.

    Args:
        logits: ``(B, C)``.
        labels: ``(B,)`` ``int64`` classes.
        counts: training images of each class; a class without any counts as one of one.
        tau: how much of the prior; 0 is plain cross-entropy.
        smoothing: of the target, as for `cross_entropy_loss`.

    Raises:
        InputError: not a count for each class.
    """
    if len(counts) != logits.shape[1]:
        raise InputError(f"there are {len(counts)} counts for {logits.shape[1]} classes, expected one for each")
    known = logits.new_tensor(counts).clamp(min=1)
    return F.cross_entropy(logits + tau * (known / known.sum()).log(), labels, label_smoothing=smoothing)


def balanced_softmax_loss(logits: Tensor, labels: Tensor, counts: Sequence[int], *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy by a softmax whose terms are weighted by the classes' counts (Ren et al. 2020, equation 4), which
    is `logit_adjusted_loss` with ``tau`` 1; arguments as there.
    """
    return logit_adjusted_loss(logits, labels, counts, tau=1.0, smoothing=smoothing)
