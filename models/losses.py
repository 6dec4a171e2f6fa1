"""Losses: two ``(B, D)`` embeddings in, a scalar out.

All are computed in ``float32`` whatever the embeddings' dtype (in ``float64`` for ``float64``). They see the batch
they are given: across processes, gather it first (`amimv.models.distributed`). Targets get a gradient too, unless
they come without one, from a teacher or detached.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amimv import InputError, check_choice


def _precise(za: Tensor, zb: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``float32`` at least; raises an `InputError` unless they are two equal ``(B, D)``."""
    if za.shape != zb.shape or za.ndim != 2:
        raise InputError(f"embeddings have shapes {tuple(za.shape)} and {tuple(zb.shape)}, expected two equal (B, D)")
    dtype = torch.float64 if za.dtype == torch.float64 else torch.float32
    return za.to(dtype), zb.to(dtype)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; a zero row stays one and gets no gradient, which would be 1 / eps of the normalisation."""
    return F.normalize(rows.masked_fill(~rows.any(dim=1, keepdim=True), 0), dim=1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` as precise as its arguments: autocast would round similarities to 2 or 3 digits."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.to(a.dtype).T


def _similarities(za: Tensor, zb: Tensor) -> Tensor:
    """Cosine similarities of all rows of both, ``(2B, 2B)``; a zero row's are 0."""
    rows = _unit(torch.cat(_precise(za, zb)))
    return _products(rows, rows)


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


def _extreme(similarity: Tensor, high: float | None, low: float | None, near_zero: float | None) -> Tensor:
    """Where similarities are above, below or nearer to 0 than the bounds, of which None is none; bool."""
    dropped = torch.zeros_like(similarity, dtype=torch.bool)
    if high is not None:
        dropped = dropped | (similarity > high)
    if low is not None:
        dropped = dropped | (similarity < low)
    if near_zero is not None:
        dropped = dropped | (similarity.abs() < near_zero)
    return dropped


def _mean_of_logs(log_numerator: Tensor, denominator: Tensor, kept: Tensor) -> Tensor:
    """Mean of ``log(denominator) - log_numerator`` over the kept columns, all ``(2B,)``; 0 where none is kept.

    The denominator of the others may be 0, whose logarithm has no gradient that a later mask could undo.
    """
    logs = torch.where(kept, denominator, 1).log() - log_numerator
    return torch.where(kept, logs, 0).sum() / kept.sum().clamp(min=1)


def _published_mimv(logits: Tensor, positive: Tensor, dropped: Tensor, average: str, temperature: float) -> Tensor:
    """As the published code has it: the similarity of a row with itself is removed twice, as an extreme value, and by
    subtracting ``exp(1 / temperature)`` from the denominator, which can make it zero or negative and the loss NaN in
    small batches.
    """
    weights = torch.exp(logits).masked_fill(dropped, 0)
    denominator = weights.sum(dim=0) - torch.exp(torch.ones_like(weights[0]) / temperature)
    if average == "logs":
        return _mean_of_logs(logits.gather(0, positive)[0], denominator, ~dropped.gather(0, positive)[0])
    return -(weights.gather(0, positive)[0] / denominator).mean().log()


def _finite_mimv(logits: Tensor, positive: Tensor, dropped: Tensor, average: str) -> Tensor:
    """Finite and differentiable whatever is dropped: a column without any entry left has the ratio 0, and a mean below
    the smallest normal number counts as that number (a loss of 87.3 in ``float32``, without a gradient).

    Args:
        logits: ``(2B, 2B)``.
        positive: ``(1, 2B)`` row of each column's positive.
        dropped: ``(2B, 2B)`` bool, here with the diagonal.
        average: ``"ratios"`` or ``"logs"``.
    """
    log_numerator = logits.gather(0, positive)[0]
    logits = logits.masked_fill(dropped, -torch.inf)
    # A column's ratio does not change when the column shifts; with its largest entry at 0 no temperature over- or
    # underflows, and the denominator is at least 1 unless the column is empty.
    largest = logits.detach().amax(dim=0)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = torch.exp(logits - largest)
    denominator = weights.sum(dim=0)
    if average == "logs":
        return _mean_of_logs(log_numerator - largest, denominator, ~dropped.gather(0, positive)[0])
    ratio = weights.gather(0, positive)[0] / torch.where(denominator > 0, denominator, 1)
    return -ratio.mean().clamp(min=torch.finfo(ratio.dtype).tiny).log()


def mimv_loss(
    za: Tensor,
    zb: Tensor,
    *,
    temperature: float = 0.3,
    self_term: str = "once",
    high: float | None = 0.9,
    low: float | None = -0.9,
    near_zero: float | None = 0.1,
    spare_positives: bool = False,
    average: str = "ratios",
    ids: Tensor | None = None,
) -> Tensor:
    """MIMV's loss (arXiv 2509.08469 and its published code): the negative logarithm of a mean of ratios.

    With cosine similarities ``s`` between all 2B rows and ``P = exp(s / temperature)``, entries of extreme similarity
    are set to 0 (positives among them), ``r_j = P[positive of j, j] / sum_i P[i, j]``, loss ``-log(mean_j r_j)``.

    Args:
        za, zb: ``(B, D)``, row i of one is the positive of row i of the other; any scale.
        temperature: of the cosine similarities.
        self_term: how often a row's similarity with itself is left out: ``"once"``, which keeps the loss finite and
            differentiable, or ``"published"``: twice, as in the published code, which can make it NaN.
        high, low: similarities above, below are eliminated; None keeps them (as published for ImageNet).
        near_zero: similarities smaller in absolute value are eliminated; None keeps them.
        spare_positives: never eliminate positives, however extreme (the published code does).
        average: ``"ratios"`` as published, or ``"logs"``: the mean of ``-log r_j`` over the columns whose positive is
            left; where none is, the loss is 0 with a gradient of 0.
        ids: ``(B,)`` image of each row; entries between other rows of the same image are left out.
    """
    if self_term not in ("once", "published"):
        raise InputError(f"self_term is '{self_term}', expected 'once' or 'published'")
    check_choice("average", average, ("ratios", "logs"))
    similarity = _similarities(za, zb)
    positive = _positives(len(za), similarity.device)[None]
    dropped = _extreme(similarity, high, low, near_zero)
    if spare_positives:
        dropped = dropped.scatter(0, positive, False)
    itself = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if ids is not None:
        dropped = dropped | (_same_image(ids, positive[0]) & ~itself)
    logits = similarity / temperature
    if self_term == "published":
        return _published_mimv(logits, positive, dropped, average, temperature)
    return _finite_mimv(logits, positive, dropped | itself, average)


def _same_id(ids: Tensor) -> Tensor:
    """``(B, B)`` bool: other rows of the same image."""
    same = ids[:, None] == ids
    return same & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)


def info_nce(queries: Tensor, keys: Tensor, /, *, temperature: float = 0.2, ids: Tensor | None = None) -> Tensor:
    """InfoNCE of queries against keys (van den Oord et al. 2018, equation 4, as in MoCo v3, Chen et al. 2021,
    equation 1): the cross entropy of each query's cosine similarities to all keys, mean over the queries.

    MoCo v3 multiplies it by ``2 * temperature`` and adds it with the roles swapped.

    Args:
        queries, keys: ``(B, D)``, key i is the positive of query i; any scale.
        temperature: of the cosine similarities.
        ids: ``(B,)`` image of each row; other rows of the same image are left out of the negatives.
    """
    queries, keys = _precise(queries, keys)
    logits = _products(_unit(queries), _unit(keys)) / temperature
    if ids is not None:
        logits = logits.masked_fill(_same_id(ids), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def byol_loss(predictions: Tensor, targets: Tensor, /) -> Tensor:
    """BYOL's mean squared error of normalised rows, ``2 - 2 cos`` (Grill et al. 2020, equation 2), mean over rows.

    BYOL adds it with the roles swapped.

    Args:
        predictions, targets: ``(B, D)``, any scale; in [0, 4], a zero row gives 2.
    """
    predictions, targets = _precise(predictions, targets)
    return 2 - 2 * (_unit(predictions) * _unit(targets)).sum(dim=1).mean()


def simsiam_loss(predictions: Tensor, targets: Tensor, /) -> Tensor:
    """SimSiam's negative cosine similarity (Chen and He 2021, equation 1), mean over rows.

    SimSiam detaches the targets, and averages it with the roles swapped.

    Args:
        predictions, targets: ``(B, D)``, any scale.
    """
    predictions, targets = _precise(predictions, targets)
    return -(_unit(predictions) * _unit(targets)).sum(dim=1).mean()


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    /,
    *,
    centre: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.07,
) -> Tensor:
    """DINO's cross entropy of the student under the centred, sharpened teacher (Caron et al. 2021, equation 1 and
    algorithm 1), mean over rows.

    Args:
        student, teacher: ``(B, K)`` scores of K prototypes.
        centre: ``(K,)``, a running mean of the teacher's scores.
        student_temperature, teacher_temperature: of the two softmaxes.
    """
    student, teacher = _precise(student, teacher)
    targets = F.softmax((teacher - centre) / teacher_temperature, dim=1)
    return -(targets * F.log_softmax(student / student_temperature, dim=1)).sum(dim=1).mean()


def ressl_loss(
    student: Tensor,
    teacher: Tensor,
    /,
    *,
    queue: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """ReSSL's cross entropy between relations to other images (Zheng et al. 2021, equations 3 to 5), mean over rows:
    the softmax of the cosine similarities to the queue, of the teacher as target and of the student.

    Args:
        student, teacher: ``(B, D)``, any scale.
        queue: ``(Q, D)`` earlier embeddings of the teacher, of length one.
        student_temperature, teacher_temperature: of the two softmaxes.
    """
    student, teacher = _precise(student, teacher)
    targets = F.softmax(_products(_unit(teacher), queue) / teacher_temperature, dim=1)
    relations = F.log_softmax(_products(_unit(student), queue) / student_temperature, dim=1)
    return -(targets * relations).sum(dim=1).mean()


def nnclr_loss(
    projections: Tensor,
    predictions: Tensor,
    /,
    *,
    queue: Tensor,
    temperature: float = 0.2,
    ids: Tensor | None = None,
) -> Tensor:
    """NNCLR's contrastive loss of nearest neighbours (Dwibedi et al. 2021, equations 2 and 4), mean over rows: each
    projection's nearest neighbour in the queue against the other side's predictions.

    NNCLR averages it with the roles swapped.

    Args:
        projections: ``(B, D)`` of one side, any scale; they choose neighbours and get no gradient.
        predictions: ``(B, D)`` of the other side, any scale.
        queue: ``(Q, D)`` earlier projections, of length one.
        temperature: of the cosine similarities.
        ids: ``(B,)`` image of each row; other rows of the same image are left out of the negatives.
    """
    projections, predictions = _precise(projections.detach(), predictions)
    nearest = _products(_unit(projections), queue).argmax(dim=1)
    return info_nce(queue[nearest].to(predictions.dtype), predictions, temperature=temperature, ids=ids)


def _off_diagonal_square_sum(matrix: Tensor) -> Tensor:
    return matrix.square().sum() - matrix.diagonal().square().sum()


def vicreg_loss(
    za: Tensor,
    zb: Tensor,
    /,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """VICReg's invariance, variance and covariance (Bardes et al. 2022, equations 1 to 6).

    Squared distance, mean over rows and, as in the authors' code, dimensions; hinge of each dimension's standard
    deviation at 1 (epsilon 1e-4), added over both sides (the authors' code halves this term); squared off-diagonal
    covariances over D, added over both sides.

    Args:
        za, zb: ``(B, D)``, B at least 2.
        invariance, variance, covariance: weights of the three terms.
    """
    za, zb = _precise(za, zb)
    batch, width = za.shape
    loss = invariance * F.mse_loss(za, zb)
    for z in (za, zb):
        centred = z - z.mean(dim=0)
        spread = torch.sqrt(centred.square().sum(dim=0) / (batch - 1) + 1e-4)
        loss = loss + variance * F.relu(1 - spread).mean()
        products = _products(centred.T, centred.T) / (batch - 1)
        loss = loss + covariance * _off_diagonal_square_sum(products) / width
    return loss


def barlow_twins_loss(
    za: Tensor, zb: Tensor, /, *, redundancy: float = 0.0051, scale: float = 0.1, eps: float = 1e-5
) -> Tensor:
    """Barlow Twins (Zbontar et al. 2021, equations 1 and 2): the cross-correlation of both sides' dimensions over the
    batch, its diagonal pulled to 1 and the rest to 0.

    Args:
        za, zb: ``(B, D)``, any scale and offset.
        redundancy: lambda, the weight of the off-diagonal term.
        scale: of the whole loss (solo-learn's; 1 in the paper's equation).
        eps: added to the variances, as BatchNorm does.
    """
    za, zb = _precise(za, zb)
    standard = []
    for z in (za, zb):
        centred = z - z.mean(dim=0)
        standard.append(centred / torch.sqrt(centred.square().mean(dim=0) + eps))
    correlation = _products(standard[0].T, standard[1].T) / len(za)
    on_diagonal = (1 - correlation.diagonal()).square().sum()
    return scale * (on_diagonal + redundancy * _off_diagonal_square_sum(correlation))


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of rows to prototypes that use all prototypes alike (SwAV, Caron et al. 2020, equations 3 to
    5), by Sinkhorn-Knopp in logarithms, which neither over- nor underflow.

    Args:
        scores: ``(B, K)``.
        epsilon: smoothness.
        iterations: of normalising prototypes, then rows.

    Returns:
        ``(B, K)``, rows sum to 1.
    """
    logits = (scores if scores.dtype == torch.float64 else scores.float()) / epsilon
    for _ in range(iterations):
        logits = F.log_softmax(F.log_softmax(logits, dim=0), dim=1)
    return logits.exp()


def swav_loss(
    scores: Tensor,
    code_scores: Tensor,
    /,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queued: Tensor | None = None,
) -> Tensor:
    """SwAV's prediction of one side's code from the other side (Caron et al. 2020, equation 2), mean over rows.

    SwAV averages it with the sides swapped.

    Args:
        scores: ``(B, K)`` of the predicting side, for K prototypes.
        code_scores: ``(B, K)`` of the side whose code is predicted; it gets no gradient.
        temperature: of the prediction.
        epsilon, iterations: of the code, see `sinkhorn`.
        queued: ``(Q, K)`` scores of earlier embeddings of that side, which only help to spread the codes.
    """
    scores, code_scores = _precise(scores, code_scores)
    everything = code_scores if queued is None else torch.cat([code_scores, queued.to(code_scores.dtype)])
    codes = sinkhorn(everything, epsilon=epsilon, iterations=iterations)[: len(scores)]
    return -(codes * F.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()
