"""Losses: two ``(B, D)`` embeddings in, a scalar out.

All are computed in ``float32`` whatever the embeddings' dtype (in ``float64`` for ``float64``). They see the batch
they are given: across processes, gather it first (`amimv.models.distributed`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amimv import InputError


def _similarities(za: Tensor, zb: Tensor) -> Tensor:
    """Cosine similarities of all rows of both, ``(2B, 2B)``; a zero row's are 0 and give it no gradient."""
    if za.shape != zb.shape or za.ndim != 2:
        raise InputError(f"embeddings have shapes {tuple(za.shape)} and {tuple(zb.shape)}, expected two equal (B, D)")
    rows = torch.cat([za, zb])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    # Else the gradient of a zero row would be 1 / eps of the normalisation.
    rows = rows.masked_fill(~rows.any(dim=1, keepdim=True), 0)
    with torch.autocast(rows.device.type, enabled=False):  # it would round similarities to 2 or 3 digits
        rows = F.normalize(rows, dim=1)
        return rows @ rows.T


def _positives(batch: int, device: torch.device) -> Tensor:
    """Row of each row's positive in a ``2B`` batch, ``(2B,)``."""
    return torch.arange(2 * batch, device=device).roll(batch)


def _same_image(ids: Tensor, positive: Tensor) -> Tensor:
    """``(2B, 2B)`` bool: pairs of rows that show the same image without being each other's positive."""
    twice = ids.repeat(2)
    same = twice[:, None] == twice
    return same.scatter(1, positive[:, None], False)


def nt_xent(za: Tensor, zb: Tensor, *, temperature: float = 0.2, ids: Tensor | None = None) -> Tensor:
    """SimCLR's normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1), mean over the 2B rows.

    Args:
        za, zb: ``(B, D)``, row i of one is the positive of row i of the other; any scale.
        temperature: of the cosine similarities.
        ids: ``(B,)`` image of each row; other rows of the same image are left out of the negatives.
    """
    logits = _similarities(za, zb) / temperature
    positive = _positives(len(za), logits.device)
    dropped = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    if ids is not None:
        dropped = dropped | _same_image(ids, positive)
    return F.cross_entropy(logits.masked_fill(dropped, -torch.inf), positive)


def mimv_loss(
    za: Tensor,
    zb: Tensor,
    *,
    temperature: float = 0.3,
    self_term: str = "once",
    high: float | None = 0.9,
    low: float | None = -0.9,
    near_zero: float | None = 0.1,
    ids: Tensor | None = None,
) -> Tensor:
    """MIMV's loss (arXiv 2509.08469 and its published code): the negative logarithm of a mean of ratios.

    With cosine similarities ``s`` between all 2B rows and ``P = exp(s / temperature)``, entries of extreme similarity
    are set to 0 (positives among them), ``r_j = P[positive of j, j] / sum_i P[i, j]``, loss ``-log(mean_j r_j)``.

    The published code removes the similarity of a row with itself twice: as an extreme value, and by subtracting
    ``exp(1 / temperature)`` from the denominator, which can make it zero or negative and the loss NaN in small
    batches. ``self_term="once"`` leaves it out exactly once.

    With ``"once"`` the loss is finite and differentiable whatever is eliminated: a column without any entry left has
    ``r_j = 0``, and a mean below the smallest normal number counts as that number (a loss of 87.3 in ``float32``,
    without a gradient).

    Args:
        za, zb: ``(B, D)``, row i of one is the positive of row i of the other; any scale.
        temperature: of the cosine similarities.
        self_term: ``"once"``, or ``"published"`` to reproduce the published code.
        high, low: similarities above, below are eliminated; None keeps them (as published for ImageNet).
        near_zero: similarities smaller in absolute value are eliminated; None keeps them.
        ids: ``(B,)`` image of each row; entries between other rows of the same image are left out.
    """
    if self_term not in ("once", "published"):
        raise InputError(f"self_term is '{self_term}', expected 'once' or 'published'")
    similarity = _similarities(za, zb)
    positive = _positives(len(za), similarity.device)
    dropped = torch.zeros_like(similarity, dtype=torch.bool)
    if high is not None:
        dropped = dropped | (similarity > high)
    if low is not None:
        dropped = dropped | (similarity < low)
    if near_zero is not None:
        dropped = dropped | (similarity.abs() < near_zero)
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if ids is not None:
        dropped = dropped | (_same_image(ids, positive) & ~itself)
    if self_term == "published":
        weights = torch.exp(similarity / temperature).masked_fill(dropped, 0)
        denominator = weights.sum(dim=0) - torch.exp(torch.ones_like(weights[0]) / temperature)
        return -(weights.gather(0, positive[None])[0] / denominator).mean().log()
    logits = (similarity / temperature).masked_fill(dropped | itself, -torch.inf)
    # A column's ratio does not change when the column shifts; with its largest entry at 0 no temperature over- or
    # underflows, and the denominator is at least 1 unless the column is empty.
    largest = logits.detach().amax(dim=0)
    weights = torch.exp(logits - largest.masked_fill(largest == -torch.inf, 0))
    denominator = weights.sum(dim=0)
    ratio = weights.gather(0, positive[None])[0] / torch.where(denominator > 0, denominator, 1)
    return -ratio.mean().clamp(min=torch.finfo(ratio.dtype).tiny).log()
