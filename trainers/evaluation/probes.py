"""How good frozen features are: weighted nearest neighbours and a linear classifier.

Features are ``(N, D)`` tensors on one device, converted to ``float32``. Labels are ``(N,)`` class ids or, for
a multi-label set, ``(N, L)`` zeros and ones with ``L = n_classes``. Nothing here is random. The training set
may lack some of the classes (they then score 0), and so may the validation set (those it has count).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, normalize, one_hot

from amimv import InputError
from amimv.trainers.evaluation.metrics import balanced_accuracy

KNN_KS = (1, 5, 20, 50, 200)
#: Weights of the L2 penalty tried by `linear_probe`, on features of unit variance.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)

#: A fit ends when a round of iterations lowers the objective by less than this share of it.
_ROUND, _MAX_ROUNDS, _MIN_GAIN = 10, 20, 1e-4
_BLOCK_ELEMENTS = 2**26  # 256 MiB of float32: the largest block of similarities held at once


# Nearest neighbours


def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    n_classes: int,
    k: int,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> Tensor:
    """Class scores from the ``k`` most similar features of a bank.

    Similarity is the cosine ``s``, a neighbour's weight ``exp(s / temperature)``, normalised to sum to one:
    Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018).

    Args:
        bank: ``(N, D)`` features with known labels; a zero vector has similarity 0 to everything.
        bank_labels: ``(N,)`` ids or ``(N, n_classes)`` zeros and ones.
        queries: ``(M, D)``.
        n_classes: columns of the result.
        k: neighbours, at most N.
        temperature: above 0; the smaller, the more the nearest decide.
        chunk: queries handled at once, fewer where the bank is large: memory stays bounded.

    Returns:
        ``(M, n_classes)`` ``float32`` in [0, 1]: the weighted mean of the labels (of one-hot rows for ids).

    Raises:
        InputError: ``k`` outside [1, N], or shapes, labels or values that cannot be used.
    """
    _check_features(bank, queries)
    _check_labels(bank_labels, len(bank), n_classes)
    if not 1 <= k <= len(bank):
        raise InputError(f"k is {k}, expected between 1 and the bank's {len(bank)} features")
    if temperature <= 0 or chunk < 1:
        raise InputError(f"temperature is {temperature} and chunk {chunk}, expected both to be positive")
    bank = normalize(bank.float(), dim=1)
    return _knn_for_each(bank, _targets(bank_labels, n_classes), queries, (k,), temperature, chunk)[0]


@dataclass(frozen=True, eq=False)
class KnnProbe:
    """What `fit_knn` chose, for any features of the same network.

    Attributes:
        bank: ``(N, D)`` training features, of length one.
        targets: ``(N, C)`` zeros and ones.
        k: neighbours.
    """

    bank: Tensor
    targets: Tensor
    k: int

    def scores(self, x: Tensor) -> Tensor:
        """Class scores ``(M, C)`` of features ``(M, D)``, as from `knn_scores`.

        Raises:
            InputError: features that are not finite, or of another width.
        """
        _check_features(self.bank[:1], x)
        return _knn_for_each(self.bank, self.targets, x, (self.k,))[0]

    def nearest(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The ``n`` most similar rows of the bank: cosine similarities ``(M, n)``, falling, and places ``(M, n)``."""
        _check_features(self.bank[:1], x)
        similarity, place = (normalize(x.float(), dim=1) @ self.bank.T).topk(n, dim=1)
        return similarity, place


def knn_probe(
    train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, test_x: Tensor, n_classes: int
) -> tuple[Tensor, int]:
    """What `fit_knn` says of test features: ``(M, n_classes)`` scores, and ``k``.

    Raises:
        InputError: an empty set, or shapes, labels or values that cannot be used.
    """
    _check_features(train_x, val_x, test_x)
    probe = fit_knn(train_x, train_y, val_x, val_y, n_classes)
    return probe.scores(test_x), probe.k


def fit_knn(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, n_classes: int) -> KnnProbe:
    """Weighted nearest neighbours with the ``k`` of ``KNN_KS`` that is best on validation data.

    Best is by `balanced_accuracy`; among equals the smaller ``k``; none above the bank's size.

    Raises:
        InputError: an empty set, or shapes, labels or values that cannot be used.
    """
    _check_probe(train_x, train_y, val_x, val_y, n_classes)
    ks = tuple(k for k in KNN_KS if k <= len(train_x))
    bank, targets = normalize(train_x.float(), dim=1), _targets(train_y, n_classes)
    val_scores = _knn_for_each(bank, targets, val_x, ks)
    accuracies = torch.stack([balanced_accuracy(scores, val_y) for scores in val_scores])
    return KnnProbe(bank, targets, ks[int(accuracies.argmax())])


def _knn_for_each(
    bank: Tensor,
    targets: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    temperature: float = 0.1,
    chunk: int = 1024,
) -> list[Tensor]:
    """`knn_scores` for several ``k`` from one search; ``bank`` of length one, ``targets`` ``(N, C)``."""
    queries = normalize(queries.float(), dim=1)
    k_max = max(ks)
    chunk = max(1, min(chunk, _BLOCK_ELEMENTS // max(len(bank), k_max * targets.shape[1])))
    scores: list[list[Tensor]] = [[] for _ in ks]
    for block in queries.split(chunk):
        similarity, index = (block @ bank.T).topk(k_max, dim=1)
        # (chunk, k, C), for a matrix product: scatter_add does not fix its order on a GPU.
        neighbours = targets[index]
        for i, k in enumerate(ks):
            weights = (similarity[:, :k] / temperature).softmax(dim=1)
            scores[i].append(torch.bmm(weights.unsqueeze(1), neighbours[:, :k]).squeeze(1))
    return [torch.cat(parts) for parts in scores]


# Linear classifier


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """What `fit_linear` found, for any features of the same network.

    Attributes:
        mean, std: ``(D,)`` of the training features; a constant one has an infinite ``std``.
        basis: ``(D, R)`` orthonormal, of the space that the training features span; None: all of it.
        weight, bias: ``(R, K)`` and ``(K,)``, for the K classes or labels that could be fitted.
        fitted: ``(C,)`` ``bool``, which ones these are.
        constant: ``(C,)`` scores of the others.
        multi_label: whether each column is a label of its own.
        penalty: that of the fit.
    """

    mean: Tensor
    std: Tensor
    basis: Tensor | None
    weight: Tensor
    bias: Tensor
    fitted: Tensor
    constant: Tensor
    multi_label: bool
    penalty: float

    def project(self, x: Tensor) -> Tensor:
        """Features ``(M, D)`` as the fit sees them, ``(M, R)``."""
        scaled = (x.float() - self.mean) / self.std
        return scaled if self.basis is None else scaled @ self.basis

    def score(self, projected: Tensor) -> Tensor:
        """Probabilities ``(M, C)`` of what `project` gave."""
        scores = self.constant.expand(len(projected), -1).clone()
        if self.weight.shape[1]:
            logits = projected @ self.weight + self.bias
            scores[:, self.fitted] = logits.sigmoid() if self.multi_label else logits.softmax(dim=1)
        return scores

    def scores(self, x: Tensor) -> Tensor:
        """Probabilities ``(M, C)`` of features ``(M, D)``.

        Raises:
            InputError: features that are not finite, or of another width.
        """
        _check_features(self.mean[None], x)
        return self.score(self.project(x))


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    test_x: Tensor,
    n_classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Tensor, float]:
    """What `fit_linear` says of test features: ``(M, n_classes)`` ``float32`` probabilities, and the penalty.

    Raises:
        InputError: as `fit_linear`.
    """
    _check_features(train_x, val_x, test_x)
    probe = fit_linear(train_x, train_y, val_x, val_y, n_classes, penalties)
    return probe.scores(test_x), probe.penalty


@torch.inference_mode(False)  # it needs gradients, also where features are extracted without
def fit_linear(
    train_x: Tensor,
    train_y: Tensor,
    val_x: Tensor,
    val_y: Tensor,
    n_classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> LinearProbe:
    """Logistic regression on standardised features, its L2 penalty chosen on validation data.

    Minimises ``mean_i(w_i * loss_i) + penalty / 2 * ||W||^2``, the bias free. The loss is the cross-entropy
    (multi-label: binary cross-entropies, summed over the labels). Every class has the same total weight
    (``w_i = N / (K * count of i's class)``, K classes present; multi-label: with and without each label),
    because the score that leads the tables is balanced accuracy. scikit-learn's
    ``LogisticRegression(class_weight="balanced", C=1 / (N * penalty))`` has the same optimum for three or more
    classes, and for each label of a multi-label set. For two classes it is ``C=2 / (N * penalty)``: each has weights
    of its own here, which share the difference that scikit-learn fits.

    Fitted by L-BFGS from the strongest penalty to the weakest, each starting where the last ended. The one
    with the best `balanced_accuracy` on validation data is taken; among equals the strongest. A feature that
    is constant over the training set is ignored. A class without training images has a score of exactly 0, a label
    on all or none of them 1 or 0.

    Raises:
        InputError: an empty set, a penalty not above 0, or shapes, labels or values that cannot be used.
    """
    _check_probe(train_x, train_y, val_x, val_y, n_classes)
    if not penalties or min(penalties) <= 0:
        raise InputError(f"penalties are {tuple(penalties)}, expected at least one, all above 0")
    best, best_accuracy = _unfitted(train_x, _targets(train_y, n_classes), train_y.ndim == 2, max(penalties)), -1.0
    if not bool(best.fitted.any()):
        return best
    train, val = best.project(train_x), best.project(val_x)
    targets = _targets(train_y, n_classes)[:, best.fitted]
    for penalty, weight, bias in _fit_path(train, targets, best.multi_label, penalties):
        probe = replace(best, weight=weight, bias=bias, penalty=penalty)
        accuracy = float(balanced_accuracy(probe.score(val), val_y))
        if accuracy > best_accuracy:
            best, best_accuracy = probe, accuracy
    return best


def _unfitted(train_x: Tensor, targets: Tensor, multi_label: bool, penalty: float) -> LinearProbe:
    """Without weights: what the training features say of their coordinates, and the labels of what can be fitted."""
    train = train_x.float()
    std, mean = torch.std_mean(train, dim=0, correction=0)
    # Rounding leaves a constant feature with a spread of about 1e-7 of its value.
    std = torch.where(std > 1e-6 * train.abs().amax(0), std, torch.inf)
    # The optimal weights lie in the span of the training images (representer theorem), so an orthonormal
    # basis of it loses nothing, penalty included.
    basis = torch.linalg.qr(((train - mean) / std).T).Q if train.shape[1] > len(train) else None
    fitted = targets.amax(0) > 0 if not multi_label else targets.amax(0) != targets.amin(0)
    constant, none = torch.where(fitted, 0.0, targets[0]), train.new_zeros(0)
    return LinearProbe(mean, std, basis, none[None, :0], none, fitted, constant, multi_label, penalty)


def _fit_path(
    x: Tensor, targets: Tensor, multi_label: bool, penalties: Sequence[float]
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Fits ``(penalty, weight (D, K), bias (K,))`` from the strongest penalty to the weakest.

    ``targets`` are ``(N, K)`` zeros and ones; every column has both (one label: or there is only one column).
    """
    n, k = targets.shape
    counts = targets.sum(0)
    if multi_label:
        present, absent = targets * (n / (2 * counts)), (1 - targets) * (n / (2 * (n - counts)))
        sample_weight, curvature = (present + absent).mean(1), 0.25
    else:
        present, absent = targets * (n / (k * counts)), None
        sample_weight, curvature = present.sum(1), 1 / k
    # The Hessian at zero weights, for each class apart, is this plus the penalty. It need not be exact.
    hessian = curvature / n * ((x * sample_weight[:, None]).T @ x).double()
    floor = 1e-6 * hessian.trace()  # float32 rounding must not make it indefinite
    weight, bias = x.new_zeros(x.shape[1], k), x.new_zeros(k)
    for penalty in sorted(penalties, reverse=True):
        diagonal = torch.full_like(hessian.diagonal(), penalty) + floor
        root = torch.linalg.cholesky(hessian + diagonal.diag()).float()
        weight, bias = _fit(x, present, absent, root, penalty, weight, bias)
        yield penalty, weight, bias


def _fit(
    x: Tensor,
    present: Tensor,
    absent: Tensor | None,
    root: Tensor,
    penalty: float,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Minimise the weighted loss by L-BFGS over ``v = root.T @ weight``.

    ``root`` is a lower-triangular root of roughly the Hessian. In these coordinates strongly correlated
    features (raw pixels) need some hundred iterations, not thousands. The optimum is the same for any root.
    """
    v = (root.T @ weight).requires_grad_()
    b = bias.clone().requires_grad_()

    def recover(v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root.T, v, upper=True)

    def objective() -> Tensor:
        w = recover(v)
        logits = x @ w + b
        if absent is None:
            fit = (present * log_softmax(logits, dim=1)).sum()
        else:
            fit = (present * logsigmoid(logits) + absent * logsigmoid(-logits)).sum()
        return penalty / 2 * w.square().sum() - fit / len(x)

    def closure() -> float:
        optimiser.zero_grad()
        with torch.enable_grad():
            loss = objective()
        loss.backward()
        return float(loss.detach())

    optimiser = torch.optim.LBFGS([v, b], max_iter=_ROUND, history_size=20, line_search_fn="strong_wolfe")
    # torch's own tolerances are absolute, and the objective falls to thousandths where the penalty is weak.
    before = float("inf")
    for _ in range(_MAX_ROUNDS):
        optimiser.step(closure)
        with torch.no_grad():
            after = float(objective())
        if after >= (1 - _MIN_GAIN) * before:
            break
        before = after
    return recover(v.detach()), b.detach()


# Input


def _targets(labels: Tensor, n_classes: int) -> Tensor:
    """``(N, n_classes)`` ``float32`` zeros and ones."""
    return (labels if labels.ndim == 2 else one_hot(labels.long(), n_classes)).float()


def _check_probe(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor, n_classes: int) -> None:
    _check_features(train_x, val_x)
    _check_labels(train_y, len(train_x), n_classes)
    _check_labels(val_y, len(val_x), n_classes)
    if train_y.ndim != val_y.ndim:
        raise InputError(f"labels are {train_y.ndim}-d for training, {val_y.ndim}-d for validation, expected alike")


def _check_features(*sets: Tensor) -> None:
    for x in sets:
        if x.ndim != 2 or x.shape[1] != sets[0].shape[1] or 0 in x.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in sets)
            raise InputError(f"features have shapes {shapes}, expected (N, D) with one D and no set empty")
        if not bool(x.isfinite().all()):
            raise InputError("features contain NaN or infinity, expected finite values: check the backbone")


def _check_labels(labels: Tensor, n: int, n_classes: int) -> None:
    shape = tuple(labels.shape)
    if shape not in ((n,), (n, n_classes)):
        raise InputError(f"labels have shape {shape}, expected ({n},), or ({n}, {n_classes}) if multi-label")
    largest = n_classes - 1 if labels.ndim == 1 else 1
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > largest:
        raise InputError(f"labels lie in [{low}, {high}], expected [0, {largest}]")
