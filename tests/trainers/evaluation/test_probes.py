"""Nearest neighbours against a plain loop, the linear probe against scikit-learn's optimum."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from amimv import InputError
from amimv.trainers.evaluation import probes
from amimv.trainers.evaluation.metrics import balanced_accuracy
from amimv.trainers.evaluation.probes import (
    KNN_KS,
    fit_knn,
    fit_linear,
    knn_probe,
    knn_scores,
    linear_probe,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many tiny operations: on busy cores a second thread costs seconds of waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw_set(n: int, d: int = 12, c: int = 4, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Overlapping Gaussian classes, long-tailed, none absent; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(c, d))
    rng = np.random.default_rng(seed)
    share = 0.5 ** np.arange(c)
    labels = np.concatenate([np.arange(c), rng.choice(c, n - c, p=share / share.sum())])
    features = centres[labels] + spread * rng.normal(size=(n, d))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def draw_multi_label(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = draw_set(n, seed=seed)
    return x, torch.stack([y == 0, x[:, 0] > 0.5, y >= 2], dim=1).long()


# Nearest neighbours


def knn_by_loop(bank: Tensor, rows: np.ndarray, queries: Tensor, k: int, temperature: float) -> np.ndarray:
    """Wu et al. 2018, one query and one neighbour at a time in double precision."""
    scores = np.zeros((len(queries), rows.shape[1]))
    for m, query in enumerate(queries.double().numpy()):
        similarities = []
        for feature in bank.double().numpy():
            similarities.append(feature @ query / (math.sqrt(feature @ feature) * math.sqrt(query @ query)))
        nearest = sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]
        weights = [math.exp(similarities[i] / temperature) for i in nearest]
        for i, weight in zip(nearest, weights, strict=True):
            scores[m] += weight / sum(weights) * rows[i]
    return scores


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (7, 0.5), (120, 0.07)])
@pytest.mark.parametrize("multi_label", [False, True])
def test_knn_equals_the_plain_loop(k: int, temperature: float, multi_label: bool) -> None:
    bank, labels = draw_multi_label(120, 1) if multi_label else draw_set(120, seed=1)
    queries, _ = draw_set(30, seed=2)
    rows = labels.numpy() if multi_label else np.eye(4)[labels]
    got = knn_scores(bank, labels, queries, rows.shape[1], k, temperature)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), knn_by_loop(bank, rows, queries, k, temperature), atol=2e-5)


def test_the_nearest_neighbour_equals_sklearn() -> None:
    bank, labels = draw_set(500, seed=3)
    queries, _ = draw_set(300, seed=4)
    reference = KNeighborsClassifier(1, metric="cosine").fit(bank.numpy(), labels.numpy())
    predicted = knn_scores(bank, labels, queries, 4, k=1).argmax(1)
    np.testing.assert_array_equal(predicted.numpy(), reference.predict(queries.numpy()))


@pytest.mark.parametrize("chunk", [1, 7, 99, 10_000])
def test_knn_does_not_depend_on_the_chunk(chunk: int) -> None:
    bank, labels = draw_set(300, seed=5)
    queries, _ = draw_set(100, seed=6)
    whole = knn_scores(bank, labels, queries, 4, k=20)
    torch.testing.assert_close(knn_scores(bank, labels, queries, 4, k=20, chunk=chunk), whole)


def test_knn_holds_no_block_above_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = draw_set(300, seed=5)
    queries, _ = draw_set(100, seed=6)
    whole = knn_scores(bank, labels, queries, 4, k=20)
    sizes = []
    topk = Tensor.topk

    def spy(self: Tensor, k: int, dim: int) -> object:
        sizes.append(self.numel())
        return topk(self, k, dim)

    monkeypatch.setattr(Tensor, "topk", spy)
    monkeypatch.setattr(probes, "_BLOCK_ELEMENTS", 3000)
    torch.testing.assert_close(knn_scores(bank, labels, queries, 4, k=20), whole)
    assert sizes == [3000] * 10


def test_knn_probe_takes_the_best_k_on_validation_and_the_smallest_of_equals() -> None:
    (train_x, train_y), (val_x, val_y), (test_x, _) = (draw_set(n, seed=n) for n in (260, 150, 80))
    scores, k = knn_probe(train_x, train_y, val_x, val_y, test_x, 4)
    accuracies = [balanced_accuracy_score(val_y, knn_scores(train_x, train_y, val_x, 4, j).argmax(1)) for j in KNN_KS]
    assert k == KNN_KS[int(np.argmax(accuracies))]
    assert k not in (KNN_KS[0], KNN_KS[-1]), "the data must make the choice matter"
    torch.testing.assert_close(scores, knn_scores(train_x, train_y, test_x, 4, k))
    easy_x, easy_y = torch.eye(4).repeat(30, 1), torch.arange(4).repeat(30)
    assert knn_probe(easy_x, easy_y, easy_x, easy_y, easy_x, 4)[1] == 1


def test_knn_probe_with_a_small_bank() -> None:
    x, y = draw_set(6)
    scores, k = knn_probe(x, y, x, y, x, 4)
    assert (k, tuple(scores.shape)) == (1, (6, 4))
    with pytest.raises(InputError, match=r"k is 7, expected between 1 and the bank's 6"):
        knn_scores(x, y, x, 4, k=7)


# Linear classifier


def sklearn_fit(
    x: Tensor, y: Tensor, penalty: float, shared: float = 1.0
) -> tuple[LogisticRegression, np.ndarray, np.ndarray]:
    """``C`` is ``shared / (N * penalty)``."""
    mean, std = x.double().mean(0).numpy(), x.double().std(0, correction=0).numpy()
    model = LogisticRegression(C=shared / (len(x) * penalty), class_weight="balanced", tol=1e-8, max_iter=20_000)
    return model.fit((x.double().numpy() - mean) / std, y.numpy()), mean, std


def probe_loss(probabilities: np.ndarray, y: Tensor) -> float:
    """Balanced cross-entropy."""
    labels = y.numpy()
    counts = np.bincount(labels)
    weights = len(labels) / (np.count_nonzero(counts) * counts[labels])
    return float(np.mean(weights * -np.log(probabilities[np.arange(len(labels)), labels])))


@pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize(("n", "d"), [(600, 12), (400, 60), (60, 150)])
def test_linear_probe_reaches_sklearns_optimum(n: int, d: int, penalty: float) -> None:
    """In the third case there are more features than images."""
    (x, y), (test_x, _) = draw_set(n, d, seed=7, spread=3.0), draw_set(300, d, seed=8, spread=3.0)
    x, test_x = x * torch.logspace(-2, 2, d) + 5, test_x * torch.logspace(-2, 2, d) + 5
    reference, mean, std = sklearn_fit(x, y, penalty)
    # Probabilities of the training images, to compare the losses, and of new ones.
    got, chosen = linear_probe(x, y, x, y, torch.cat([x, test_x]), 4, penalties=[penalty])
    want = reference.predict_proba((torch.cat([x, test_x]).double().numpy() - mean) / std)
    assert chosen == penalty
    norm = penalty / 2 * float(np.square(reference.coef_).sum())
    optimum = probe_loss(want[:n], y) + norm
    assert probe_loss(got[:n].numpy(), y) + norm == pytest.approx(optimum, rel=3e-3)
    agreement = (got[n:].argmax(1).numpy() == want[n:].argmax(1)).mean()
    assert agreement >= 0.99
    assert np.abs(got.numpy() - want).mean() < 5e-3


@pytest.mark.parametrize("penalty", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(("classes", "shared"), [(2, 2.0), (3, 1.0), (5, 1.0)])
def test_the_equivalent_of_sklearns_c_is_as_documented(classes: int, shared: float, penalty: float) -> None:
    """For two classes 2 / (N * penalty), for more 1 / (N * penalty); the other one is told apart."""
    x, y = draw_set(400, 15, classes, seed=14, spread=3.0)
    got, _ = linear_probe(x, y, x, y, x, classes, penalties=[penalty])

    def away(factor: float) -> float:
        reference, mean, std = sklearn_fit(x, y, penalty, factor)
        return float(np.abs(got.numpy() - reference.predict_proba((x.double().numpy() - mean) / std)).mean())

    assert away(shared) < 2e-3
    assert away(shared) < away(3 - shared) / 3


def fitted_objective(x: Tensor, y: Tensor, penalty: float) -> tuple[float, float]:
    """The probe's objective at the end of its path, and the same at scikit-learn's weights, in double."""
    n_classes = int(y.max()) + 1
    scaled, targets = fit_linear(x, y, x, y, n_classes, [1.0]).project(x), probes._targets(y, n_classes)
    _, weight, bias = list(probes._fit_path(scaled, targets, False, [*probes.PENALTIES[:3], penalty]))[-1]
    reference, _, _ = sklearn_fit(scaled, y, penalty)
    double = scaled.double().numpy()

    def objective(w: np.ndarray, b: np.ndarray) -> float:
        logits = double @ w + b
        logits -= logits.max(1, keepdims=True)
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return probe_loss(probabilities, y) + penalty / 2 * float(np.square(w).sum())

    ours = objective(weight.double().numpy(), bias.double().numpy())
    return ours, objective(reference.coef_.T, reference.intercept_)


@pytest.mark.parametrize("penalty", [1e-2, 1e-4])
def test_the_objective_at_the_end_of_the_path_is_sklearns(penalty: float) -> None:
    """Loss and penalty together, so that weights far off in flat directions are seen; correlated features."""
    x, y = draw_set(300, 20, seed=9, spread=3.0)
    x = x.cumsum(1)
    ours, optimum = fitted_objective(x, y, penalty)
    assert optimum * (1 - 1e-5) <= ours <= optimum * (1 + 1e-3)


def test_multi_label_probe_is_one_balanced_regression_per_label() -> None:
    (x, y), (test_x, _) = draw_multi_label(400, 10), draw_set(200, seed=11)
    got, _ = linear_probe(x, y, x, y, test_x, 3, penalties=[0.01])
    for label in range(3):
        reference, mean, std = sklearn_fit(x, y[:, label], 0.01)
        want = reference.predict_proba((test_x.double().numpy() - mean) / std)[:, 1]
        np.testing.assert_allclose(got[:, label].numpy(), want, atol=5e-3)


def test_linear_probe_takes_the_best_penalty_and_the_strongest_of_equals() -> None:
    (train_x, train_y), (val_x, val_y) = (
        draw_set(80, 40, seed=12, spread=2.5),
        draw_set(400, 40, seed=13, spread=2.5),
    )
    scores, penalty = linear_probe(train_x, train_y, val_x, val_y, val_x, 4)
    alone = {
        p: float(balanced_accuracy(linear_probe(train_x, train_y, val_x, val_y, val_x, 4, [p])[0], val_y))
        for p in probes.PENALTIES
    }
    assert len(set(alone.values())) > 2, "the data must make the choice matter"
    assert float(balanced_accuracy(scores, val_y)) == pytest.approx(max(alone.values()), abs=0.01)
    assert alone[penalty] == pytest.approx(max(alone.values()), abs=0.01)
    easy_x, easy_y = torch.eye(4).repeat(30, 1), torch.arange(4).repeat(30)
    assert linear_probe(easy_x, easy_y, easy_x, easy_y, easy_x, 4, [0.01, 0.1, 1.0])[1] == 1.0


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_a_probe_repeats_itself_and_leaves_its_input_and_the_gradient_mode_alone(probe) -> None:  # type: ignore[no-untyped-def]
    x, y = draw_set(200)
    before = x.clone()
    with torch.inference_mode():
        first = probe(x * 1, y, x * 1, y, x * 1, 4)
    again = probe(x, y, x, y, x, 4)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert torch.equal(x, before)
    assert not first[0].requires_grad


# What real label subsets and broken backbones bring


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_absent_classes_score_nothing(probe) -> None:  # type: ignore[no-untyped-def]
    """Training lacks classes 0 and 4 of 6, validation lacks more."""
    x, y = draw_set(150)
    y = torch.tensor([1, 2, 3, 5])[y]
    keep = y <= 2
    scores, _ = probe(x, y, x[keep], y[keep], x, 6)
    assert scores.shape == (150, 6)
    assert (scores[:, [0, 4]] == 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(150))
    assert float(balanced_accuracy(scores, y)) > 0.5


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_one_class_only(probe) -> None:  # type: ignore[no-untyped-def]
    x, _ = draw_set(10)
    scores, _ = probe(x, torch.full((10,), 2), x, torch.full((10,), 2), x, 3)
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.0, 1.0]).expand(10, 3))


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_labels_on_all_or_none_of_the_images(probe) -> None:  # type: ignore[no-untyped-def]
    x, y = draw_multi_label(100, 14)
    y[:, 0], y[:, 2] = 0, 1
    scores, _ = probe(x, y, x, y, x, 3)
    torch.testing.assert_close(scores[:, 0], torch.zeros(100))
    torch.testing.assert_close(scores[:, 2], torch.ones(100))
    assert len(scores[:, 1].unique()) > 1
    scores, _ = probe(x[:1], y[:1], x, y, x, 3)
    torch.testing.assert_close(scores, y[:1].float().expand(100, 3))


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_collapsed_or_extreme_features_never_give_nan(probe, scale: float) -> None:  # type: ignore[no-untyped-def]
    x, y = draw_set(60)
    x = x * scale + 3 * (scale == 0.0)
    x[::7] = 0
    scores, _ = probe(x, y, x, y, x, 4)
    assert scores.isfinite().all()
    assert probe(torch.zeros(60, 5), y, torch.zeros(9, 5), y[:9], torch.zeros(2, 5), 4)[0].isfinite().all()


def test_constant_features_change_nothing() -> None:
    """Constant exactly and constant up to the last bit, and far from that in the test images."""
    (x, y), (test_x, _) = draw_set(200), draw_set(50, seed=1)
    flat = torch.full((200, 2), 0.1)
    flat[::3, 1] = torch.nextafter(flat[::3, 1], torch.ones(()))
    wide, test_wide = torch.cat([x, flat], 1), torch.cat([test_x, torch.full((50, 2), 9.0)], 1)
    got, _ = linear_probe(wide, y, wide, y, test_wide, 4, [0.01])
    want, _ = linear_probe(x, y, x, y, test_x, 4, [0.01])
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_half_precision_features_and_uint8_labels(probe) -> None:  # type: ignore[no-untyped-def]
    x, y = draw_set(100)
    scores, _ = probe(x.bfloat16(), y.to(torch.uint8), x.bfloat16(), y.to(torch.uint8), x.bfloat16(), 4)
    want, _ = probe(x.bfloat16().float(), y, x.bfloat16().float(), y, x.bfloat16().float(), 4)
    assert torch.equal(scores, want)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_equals_sklearn() -> None:
    x, y = draw_set(200, seed=15)
    scores = x[:, :6]
    for labels in (y, y.clamp(min=1)):
        want = balanced_accuracy_score(labels, scores.argmax(1))
        assert float(balanced_accuracy(scores, labels)) == pytest.approx(want)
    hot = (x[:, 6:] > 1).long()
    want = np.mean([balanced_accuracy_score(hot[:, i], scores[:, i] > 0.5) for i in range(6)])
    assert float(balanced_accuracy(scores, hot)) == pytest.approx(want)


@pytest.mark.parametrize("probe", [knn_probe, linear_probe])
def test_bad_input(probe) -> None:  # type: ignore[no-untyped-def]
    x, y = draw_set(20)
    broken = x.clone()
    broken[3, 3] = torch.nan
    cases = [
        ((broken, y, x, y, x, 4), "NaN or infinity"),
        ((x, y, x[:0], y[:0], x, 4), "no set empty"),
        ((x, y, x, y, x[:, :5], 4), "one D"),
        ((x, y[:, None], x, y[:, None], x, 4), "expected"),
        ((x, y, x, y, x, 3), r"labels lie in \[0, 3\], expected \[0, 2\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message) as error:
            probe(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="penalties"):
        linear_probe(x, y, x, y, x, 4, penalties=[0.0])


# Fitted once, for whatever comes


@pytest.mark.parametrize("dims", [15, 90], ids=["all coordinates", "the span of the images"])
def test_a_fitted_probe_says_of_parts_what_it_says_of_all(dims: int) -> None:
    x, y = draw_set(60, dims, seed=4)
    more, _ = draw_set(41, dims, seed=5)
    for fit, whole in (
        (fit_knn(x, y, x, y, 4), knn_probe(x, y, x, y, more, 4)),
        (fit_linear(x, y, x, y, 4), linear_probe(x, y, x, y, more, 4)),
    ):
        parts = torch.cat([fit.scores(part) for part in more.split(7)])
        torch.testing.assert_close(parts, whole[0], rtol=0, atol=1e-5)
        with pytest.raises(InputError, match=r"expected \(N, D\) with one D"):
            fit.scores(more[:, 1:])
        with pytest.raises(InputError, match="NaN or infinity"):
            fit.scores(more * torch.nan)
