"""The methods' losses against plain Python loops written from the papers, and against lightly; every way to break."""

import decimal
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amimv import InputError
from amimv.models.losses import (
    barlow_twins_loss,
    byol_loss,
    dino_loss,
    info_nce,
    nnclr_loss,
    ressl_loss,
    simsiam_loss,
    sinkhorn,
    swav_loss,
    vicreg_loss,
)

Row = list[float]
Rows = list[Row]
NO_LIGHTLY = "lightly, which has a published implementation, is not installed"


def draw_pair(batch: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two ``(batch, width)`` in float64: positives from nearly equal to unrelated, rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    za, noise = torch.randn(2, batch, width, generator=generator, dtype=torch.float64)
    zb = za + noise * torch.linspace(0.05, 3, batch, dtype=torch.float64)[:, None]
    return za * torch.linspace(0.5, 4, batch, dtype=torch.float64)[:, None], zb


def draw_queue(size: int, width: int, seed: int = 7) -> Tensor:
    """``(size, width)`` in float64, rows of length one."""
    rows = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def draw_scores(batch: int, prototypes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two ``(batch, prototypes)`` in float64, between -1 and 1 as cosine similarities are."""
    a, b = torch.rand(2, batch, prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 * a - 1, 2 * b - 1


# The papers, in plain numbers


def dot(u: Row, v: Row) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True))


def unit(u: Row) -> Row:
    length = math.sqrt(dot(u, u))
    return [a / length for a in u]


def log_softmax(scores: Row) -> Row:
    largest = max(scores)
    log_total = largest + math.log(sum(math.exp(s - largest) for s in scores))
    return [s - log_total for s in scores]


def cross_entropy(target_scores: Row, scores: Row) -> float:
    return -sum(math.exp(t) * s for t, s in zip(log_softmax(target_scores), log_softmax(scores), strict=True))


def info_nce_by_loop(queries: Rows, keys: Rows, *, temperature: float = 0.2, ids: list[int] | None = None) -> float:
    """Chen et al. 2021 (MoCo v3), equation 1, without its factor: one query and one candidate at a time."""
    total = 0.0
    for i, query in enumerate(queries):
        positive = math.exp(dot(unit(query), unit(keys[i])) / temperature)
        candidates = positive
        for j, key in enumerate(keys):
            if j != i and (ids is None or ids[j] != ids[i]):
                candidates += math.exp(dot(unit(query), unit(key)) / temperature)
        total -= math.log(positive / candidates)
    return total / len(queries)


def byol_by_loop(predictions: Rows, targets: Rows) -> float:
    """Grill et al. 2020, equation 2, as the squared distance on the left of it."""
    distances = [
        sum((a - b) ** 2 for a, b in zip(unit(p), unit(t), strict=True))
        for p, t in zip(predictions, targets, strict=True)
    ]
    return sum(distances) / len(distances)


def simsiam_by_loop(predictions: Rows, targets: Rows) -> float:
    """Chen and He 2021, equation 1."""
    cosines = [dot(p, t) / math.hypot(*p) / math.hypot(*t) for p, t in zip(predictions, targets, strict=True)]
    return -sum(cosines) / len(cosines)


def dino_by_loop(
    student: Rows,
    teacher: Rows,
    *,
    centre: Row,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.07,
) -> float:
    """Caron et al. 2021, equation 1 and algorithm 1: H(t, s) = -sum t log s, only the teacher centred."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        centred = [(a - c) / teacher_temperature for a, c in zip(t, centre, strict=True)]
        total += cross_entropy(centred, [a / student_temperature for a in s])
    return total / len(student)


def ressl_by_loop(
    student: Rows,
    teacher: Rows,
    *,
    queue: Rows,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> float:
    """Zheng et al. 2021, equations 3 to 5."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        relations_of_teacher = [dot(unit(t), other) / teacher_temperature for other in queue]
        relations_of_student = [dot(unit(s), other) / student_temperature for other in queue]
        total += cross_entropy(relations_of_teacher, relations_of_student)
    return total / len(student)


def nnclr_by_loop(
    projections: Rows,
    predictions: Rows,
    *,
    queue: Rows,
    temperature: float = 0.2,
    ids: list[int] | None = None,
) -> float:
    """Dwibedi et al. 2021, equations 2 to 4: the neighbour has the least distance to the normalised projection."""
    total = 0.0
    for i, projection in enumerate(projections):
        neighbour = min(queue, key=lambda other: math.dist(unit(projection), other))
        likeness = [math.exp(dot(neighbour, unit(p)) / temperature) for p in predictions]
        kept = [e for j, e in enumerate(likeness) if j == i or ids is None or ids[j] != ids[i]]
        total -= math.log(likeness[i] / sum(kept))
    return total / len(projections)


def covary(x: Row, y: Row, divisor: int) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / divisor


def vicreg_by_loop(
    za: Rows,
    zb: Rows,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> float:
    """Bardes et al. 2022, equations 1 to 6, but the squared distance over D too, as in the authors' code."""
    batch, width = len(za), len(za[0])
    distance = sum(math.dist(a, b) ** 2 for a, b in zip(za, zb, strict=True)) / (batch * width)
    loss = invariance * distance
    for z in (za, zb):
        dimensions = [list(column) for column in zip(*z, strict=True)]
        for j, x in enumerate(dimensions):
            loss += variance * max(0.0, 1 - math.sqrt(covary(x, x, batch - 1) + 0.0001)) / width
            for k, y in enumerate(dimensions):
                if k != j:
                    loss += covariance * covary(x, y, batch - 1) ** 2 / width
    return loss


def barlow_twins_by_loop(
    za: Rows, zb: Rows, *, redundancy: float = 0.0051, scale: float = 0.1, eps: float = 1e-5
) -> float:
    """Zbontar et al. 2021, equations 1 and 2: Pearson's correlations, all but the epsilon."""
    batch = len(za)
    of_a, of_b = ([list(column) for column in zip(*z, strict=True)] for z in (za, zb))
    loss = 0.0
    for i, x in enumerate(of_a):
        for j, y in enumerate(of_b):
            deviations = math.sqrt(covary(x, x, batch) + eps) * math.sqrt(covary(y, y, batch) + eps)
            correlation = covary(x, y, batch) / deviations
            loss += (1 - correlation) ** 2 if i == j else redundancy * correlation**2
    return scale * loss


def sinkhorn_by_loop(scores: Rows, *, epsilon: float = 0.05, iterations: int = 3) -> Rows:
    """Caron et al. 2020, equation 5: Q = diag(u) exp(scores / epsilon) diag(v) with marginals of 1 / K for
    prototypes and 1 / B for rows, as codes: times B. In decimals, whose exponents reach 10 ** 999999."""
    with decimal.localcontext(prec=30):
        kernel = [[(decimal.Decimal(s) / decimal.Decimal(epsilon)).exp() for s in row] for row in scores]
        batch, prototypes = len(scores), len(scores[0])
        zero, v = decimal.Decimal(0), [decimal.Decimal(1)] * batch
        for _ in range(iterations):
            u = [1 / (prototypes * sum((kernel[b][k] * v[b] for b in range(batch)), zero)) for k in range(prototypes)]
            v = [1 / (batch * sum((kernel[b][k] * u[k] for k in range(prototypes)), zero)) for b in range(batch)]
        return [[float(batch * u[k] * kernel[b][k] * v[b]) for k in range(prototypes)] for b in range(batch)]


def swav_by_loop(
    scores: Rows,
    code_scores: Rows,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queued: Rows | None = None,
) -> float:
    """Caron et al. 2020, equation 2: -sum q log p, the codes of batch and queue computed together."""
    codes = sinkhorn_by_loop(code_scores + (queued or []), epsilon=epsilon, iterations=iterations)
    total = 0.0
    for row, code in zip(scores, codes[: len(scores)], strict=True):
        total -= dot(code, log_softmax([s / temperature for s in row]))
    return total / len(scores)


# Comparing


def gradients(
    loss: Callable[..., Tensor], za: Tensor, zb: Tensor, **settings: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and the gradient of each embedding, None where it gets none."""
    za, zb = za.clone().requires_grad_(), zb.clone().requires_grad_()
    value = loss(za, zb, **settings)
    value.backward()
    assert value.shape == ()
    for z in (za, zb):
        assert z.grad is None or z.grad.dtype == z.dtype
    return value.detach(), za.grad, zb.grad


def slopes_of(loss: Callable[[Rows], float], rows: Rows, h: float = 1e-6) -> Tensor:
    """Central differences of a function of plain numbers, ``(B, D)``."""
    slopes = []
    for row in rows:
        for d, value in enumerate(row):
            row[d] = value + h
            above = loss(rows)
            row[d] = value - h
            slopes.append((above - loss(rows)) / (2 * h))
            row[d] = value
    return torch.tensor(slopes, dtype=torch.float64).view(len(rows), -1)


def plain(setting: Any) -> Any:
    return setting.tolist() if isinstance(setting, Tensor) else setting


def assert_as_loop(
    loss: Callable[..., Tensor],
    by_loop: Callable[..., float],
    za: Tensor,
    zb: Tensor,
    **settings: Any,
) -> None:
    """Value and gradients as the loop's; `nnclr_loss` gives its first and `swav_loss` its second argument none."""
    rows_a, rows_b = za.tolist(), zb.tolist()
    of_loop = {name: plain(setting) for name, setting in settings.items()}
    value, gradient_a, gradient_b = gradients(loss, za, zb, **settings)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(by_loop(rows_a, rows_b, **of_loop), rel=1e-10)
    assert (gradient_a is None) == (loss is nnclr_loss)
    assert (gradient_b is None) == (loss is swav_loss)
    if gradient_a is not None:
        slopes = slopes_of(lambda rows: by_loop(rows, rows_b, **of_loop), rows_a)
        assert slopes.abs().max() > 1e-3  # else the comparison below would be one of zeros
        torch.testing.assert_close(gradient_a, slopes, rtol=1e-5, atol=1e-7)
    if gradient_b is not None:
        slopes = slopes_of(lambda rows: by_loop(rows_a, rows, **of_loop), rows_b)
        assert slopes.abs().max() > 1e-3
        torch.testing.assert_close(gradient_b, slopes, rtol=1e-5, atol=1e-7)


def drawn(**more: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Sizes, and what else is given, drawn by hypothesis."""
    return lambda test: settings(max_examples=12)(
        given(batch=st.integers(2, 8), width=st.integers(3, 12), **more)(test)
    )


IDS = pytest.mark.parametrize("ids", [None, [0, 1, 2, 0, 1, 1], [3, 3, 3, 3, 3, 3], [5, 4, 3, 2, 1, 0]])


@drawn(temperature=st.floats(0.07, 1))
def test_info_nce_equals_a_loop(batch: int, width: int, temperature: float) -> None:
    assert_as_loop(info_nce, info_nce_by_loop, *draw_pair(batch, width), temperature=temperature)


@IDS
def test_info_nce_ids_leave_out_other_rows_of_the_same_image(ids: list[int] | None) -> None:
    pair = draw_pair(6, 4, seed=3)
    if ids is not None and len(set(ids)) == 1:  # only the positive is left
        value, gradient_a, gradient_b = gradients(info_nce, *pair, ids=torch.tensor(ids))
        assert value == 0
        assert gradient_a is not None
        assert gradient_b is not None
        assert not gradient_a.any()
        assert not gradient_b.any()
        return
    assert_as_loop(info_nce, info_nce_by_loop, *pair, ids=None if ids is None else torch.tensor(ids))


@drawn()
def test_byol_equals_a_loop(batch: int, width: int) -> None:
    assert_as_loop(byol_loss, byol_by_loop, *draw_pair(batch, width, seed=1))


@drawn()
def test_simsiam_equals_a_loop(batch: int, width: int) -> None:
    assert_as_loop(simsiam_loss, simsiam_by_loop, *draw_pair(batch, width, seed=1))


@drawn(student_temperature=st.floats(0.07, 0.5), teacher_temperature=st.floats(0.04, 1))
def test_dino_equals_a_loop(batch: int, width: int, student_temperature: float, teacher_temperature: float) -> None:
    assert_as_loop(
        dino_loss,
        dino_by_loop,
        *draw_scores(batch, width),
        centre=torch.linspace(-0.3, 0.5, width, dtype=torch.float64),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


@drawn(size=st.integers(1, 20), student_temperature=st.floats(0.1, 0.5), teacher_temperature=st.floats(0.04, 1))
def test_ressl_equals_a_loop(
    batch: int, width: int, size: int, student_temperature: float, teacher_temperature: float
) -> None:
    pair, queue = draw_pair(batch, width, seed=2), draw_queue(size, width)
    temperatures: dict[str, Any] = {
        "student_temperature": student_temperature,
        "teacher_temperature": teacher_temperature,
    }
    if size == 1:  # one relation is certain whatever it is
        assert float(ressl_loss(*pair, queue=queue, **temperatures)) == 0
        return
    assert_as_loop(ressl_loss, ressl_by_loop, *pair, queue=queue, **temperatures)


@drawn(size=st.integers(1, 20), temperature=st.floats(0.07, 1))
def test_nnclr_equals_a_loop(batch: int, width: int, size: int, temperature: float) -> None:
    queue = draw_queue(size, width)
    assert_as_loop(nnclr_loss, nnclr_by_loop, *draw_pair(batch, width), queue=queue, temperature=temperature)


@IDS
def test_nnclr_ids_leave_out_other_rows_of_the_same_image(ids: list[int] | None) -> None:
    pair, queue = draw_pair(6, 4, seed=3), draw_queue(9, 4)
    if ids is not None and len(set(ids)) == 1:
        assert float(nnclr_loss(*pair, queue=queue, ids=torch.tensor(ids))) == 0
        return
    assert_as_loop(nnclr_loss, nnclr_by_loop, *pair, queue=queue, ids=None if ids is None else torch.tensor(ids))


@pytest.mark.parametrize(("batch", "width"), [(2, 3), (5, 4), (8, 6)])
@pytest.mark.parametrize(
    "settings",
    [
        {"invariance": 1.0, "variance": 0.0, "covariance": 0.0},
        {"invariance": 0.0, "variance": 1.0, "covariance": 0.0},
        {"invariance": 0.0, "variance": 0.0, "covariance": 1.0},
        {"invariance": 3.0, "variance": 5.0, "covariance": 7.0},
    ],
)
def test_vicreg_equals_a_loop(batch: int, width: int, settings: dict[str, float]) -> None:
    spreads = torch.linspace(0.1, 1.2, width, dtype=torch.float64)  # dimensions on both sides of the hinge
    za, zb = (z * spreads for z in draw_pair(batch, width, seed=4))
    hinges = torch.cat([1 - torch.sqrt(z.var(dim=0) + 1e-4) for z in (za, zb)])
    assert (hinges.abs() > 1e-3).all()  # finite differences must not step over one
    assert (hinges < 0).any()
    assert (hinges > 0).any()
    assert_as_loop(vicreg_loss, vicreg_by_loop, za, zb, **settings)


@pytest.mark.parametrize(("batch", "width"), [(3, 3), (5, 4), (8, 6)])
@pytest.mark.parametrize(
    "settings",
    [
        {"redundancy": 0.0051, "scale": 0.1},
        {"redundancy": 0.0, "scale": 1.0},
        {"redundancy": 2.0, "scale": 1.0},
        {"redundancy": 1.0, "scale": 0.5, "eps": 0.1},
        {"redundancy": 1.0, "scale": 1.0, "eps": 0.0},
    ],
)
def test_barlow_twins_equals_a_loop(batch: int, width: int, settings: dict[str, float]) -> None:
    za, zb = draw_pair(batch, width, seed=5)
    assert_as_loop(barlow_twins_loss, barlow_twins_by_loop, za + 3, zb - 1, **settings)


@drawn(
    queue=st.integers(0, 4), temperature=st.floats(0.1, 1), epsilon=st.floats(0.05, 1), iterations=st.integers(1, 3)
)
def test_swav_equals_a_loop(
    batch: int, width: int, queue: int, temperature: float, epsilon: float, iterations: int
) -> None:
    queued = draw_scores(queue, width, seed=9)[0] if queue else None
    settings: dict[str, Any] = {
        "temperature": temperature,
        "epsilon": epsilon,
        "iterations": iterations,
        "queued": queued,
    }
    scores, code_scores = draw_scores(batch, width)
    assert_as_loop(swav_loss, swav_by_loop, scores, code_scores, **settings)


def test_defaults_are_those_of_the_loops() -> None:
    za, zb = draw_pair(6, 4, seed=6)
    queue, centre = draw_queue(9, 4), torch.linspace(-1, 1, 4, dtype=torch.float64)
    cases: list[tuple[Callable[..., Tensor], Callable[..., float], dict[str, Tensor]]] = [
        (info_nce, info_nce_by_loop, {}),
        (dino_loss, dino_by_loop, {"centre": centre}),
        (ressl_loss, ressl_by_loop, {"queue": queue}),
        (nnclr_loss, nnclr_by_loop, {"queue": queue}),
        (vicreg_loss, vicreg_by_loop, {}),
        (barlow_twins_loss, barlow_twins_by_loop, {}),
        (swav_loss, swav_by_loop, {}),
    ]
    for loss, by_loop, tensors in cases:
        expected = by_loop(za.tolist(), zb.tolist(), **{name: plain(t) for name, t in tensors.items()})
        assert float(loss(za, zb, **tensors)) == pytest.approx(expected, rel=1e-10), loss.__name__


# lightly


def assert_same_pull(mine: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("batch", "width"), [(2, 4), (16, 32)])
def test_negative_cosines_equal_lightly(batch: int, width: int) -> None:
    published = pytest.importorskip("lightly.loss", reason=NO_LIGHTLY).NegativeCosineSimilarity()
    pair = draw_pair(batch, width)
    assert_same_pull(gradients(simsiam_loss, *pair), gradients(published, *pair))
    assert_same_pull(gradients(byol_loss, *pair), gradients(lambda a, b: 2 + 2 * published(a, b), *pair))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_equals_lightly_with_the_other_keys_as_memory(temperature: float) -> None:
    """Its MoCo loss: one query, its key, and a memory bank of the other keys (which gets no gradient there)."""
    lightly = pytest.importorskip("lightly.loss", reason=NO_LIGHTLY)
    queries, keys = draw_pair(7, 5)

    def published(queries: Tensor, keys: Tensor) -> Tensor:
        losses = []
        for i in range(len(keys)):
            loss = lightly.NTXentLoss(temperature=temperature, memory_bank_size=(len(keys) - 1, keys.shape[1]))
            others = torch.cat([keys[:i], keys[i + 1 :]]).detach()
            loss.memory_bank.bank = others / others.norm(dim=1, keepdim=True)
            losses.append(loss(queries[i : i + 1], keys[i : i + 1]))
        return torch.stack(losses).mean()

    value, of_queries, _ = gradients(info_nce, queries, keys, temperature=temperature)
    expected, of_published, _ = gradients(published, queries, keys)
    assert_same_pull((value, of_queries), (expected, of_published))


def test_nnclr_finds_the_neighbours_that_lightly_finds() -> None:
    modules = pytest.importorskip("lightly.models.modules", reason=NO_LIGHTLY)
    projections, predictions = draw_pair(7, 5)
    queue = draw_queue(30, 5)
    memory = modules.NNMemoryBankModule(size=(30, 5))
    memory.bank = queue
    neighbours = memory(projections, update=False)
    expected = info_nce_by_loop(neighbours.tolist(), predictions.tolist())
    assert float(nnclr_loss(projections, predictions, queue=queue)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("teacher_temperature", [0.0625, 0.03125])
def test_dino_equals_lightly(teacher_temperature: float) -> None:
    """It takes both directions at once, updates its own centre, and rounds the temperature to float32: a power of 2
    survives that."""
    published = pytest.importorskip("lightly.loss", reason=NO_LIGHTLY).DINOLoss
    other_student, other_teacher = draw_scores(6, 12, seed=8)
    centre = torch.linspace(-0.4, 0.7, 12, dtype=torch.float64)

    def mine(student: Tensor, teacher: Tensor) -> Tensor:
        settings: dict[str, Any] = {"centre": centre, "teacher_temperature": teacher_temperature}
        forth = dino_loss(student, teacher, **settings, student_temperature=0.2)
        return (forth + dino_loss(other_student, other_teacher, **settings, student_temperature=0.2)) / 2

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        loss = published(12, teacher_temp=teacher_temperature, student_temp=0.2)
        loss.center = centre.view(1, 1, -1).clone()
        return loss([teacher, other_teacher], [other_student, student])

    pair = draw_scores(6, 12)
    assert_same_pull(gradients(mine, *pair), gradients(theirs, *pair))


@pytest.mark.parametrize(("batch", "width"), [(2, 4), (16, 8), (8, 32)])
def test_vicreg_equals_lightly_but_for_half_the_variance_term(batch: int, width: int) -> None:
    """lightly follows the authors' code, which halves the variance term of the paper's equation 6."""
    published = pytest.importorskip("lightly.loss", reason=NO_LIGHTLY).VICRegLoss
    za, zb = (0.6 * z for z in draw_pair(batch, width))
    theirs = published(lambda_param=20.0, mu_param=2 * 15.0, nu_param=3.0)
    mine = gradients(vicreg_loss, za, zb, invariance=20.0, variance=15.0, covariance=3.0)
    assert_same_pull(mine, gradients(theirs, za, zb))


@pytest.mark.parametrize("redundancy", [0.0051, 0.5])
@pytest.mark.parametrize(("batch", "width"), [(3, 4), (16, 8), (8, 32)])
def test_barlow_twins_equals_lightly(batch: int, width: int, redundancy: float) -> None:
    """It standardises with BatchNorm: biased variance, epsilon 1e-5."""
    published = pytest.importorskip("lightly.loss", reason=NO_LIGHTLY).BarlowTwinsLoss(lambda_param=redundancy)
    pair = draw_pair(batch, width)
    mine = gradients(barlow_twins_loss, *pair, redundancy=redundancy, scale=1.0)
    assert_same_pull(mine, gradients(published, *pair))


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.3, 1), (1.0, 20)])
@pytest.mark.parametrize("queue", [0, 20])
def test_swav_equals_lightly(queue: int, epsilon: float, iterations: int) -> None:
    """With both sides as large crops it averages both directions."""
    lightly = pytest.importorskip("lightly.loss.swav_loss", reason=NO_LIGHTLY)
    published = lightly.SwaVLoss(temperature=0.2, sinkhorn_iterations=iterations, sinkhorn_epsilon=epsilon)
    queued = list(draw_scores(queue, 9, seed=3)) if queue else None
    settings: dict[str, Any] = {"temperature": 0.2, "epsilon": epsilon, "iterations": iterations}

    def mine(a: Tensor, b: Tensor) -> Tensor:
        queued_a, queued_b = queued or (None, None)
        return (swav_loss(a, b, queued=queued_b, **settings) + swav_loss(b, a, queued=queued_a, **settings)) / 2

    pair = draw_scores(6, 9)
    assert_same_pull(gradients(mine, *pair), gradients(lambda a, b: published([a, b], [], queued)[0], *pair))
    expected = lightly.sinkhorn(pair[0], iterations=iterations, epsilon=epsilon)
    torch.testing.assert_close(sinkhorn(pair[0], epsilon=epsilon, iterations=iterations), expected)


# Edge cases

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "info_nce": info_nce,
    "info_nce, ids": lambda a, b: info_nce(a, b, ids=torch.arange(len(a)) // 2),
    "byol": byol_loss,
    "simsiam": simsiam_loss,
    "dino": lambda a, b: dino_loss(a, b, centre=torch.linspace(-1, 1, a.shape[1])),
    "ressl": lambda a, b: ressl_loss(a, b, queue=draw_queue(9, a.shape[1]).float()),
    "nnclr": lambda a, b: nnclr_loss(a, b, queue=draw_queue(9, a.shape[1]).float()),
    "vicreg": vicreg_loss,
    "barlow_twins": barlow_twins_loss,
    "swav": swav_loss,
    "swav, queue": lambda a, b: swav_loss(a, b, queued=draw_queue(9, a.shape[1]).float()),
}
OF_DIRECTIONS = ("info_nce", "info_nce, ids", "byol", "simsiam", "ressl", "nnclr")
"""Losses that know nothing of a row's scale."""
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)


def two_rows() -> tuple[Tensor, Tensor]:
    return draw_pair(2, 3)


def identical() -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64).expand(4, 3)
    return rows, rows.clone()


def opposite() -> tuple[Tensor, Tensor]:
    rows, same = identical()
    return rows, -same


def zeros() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)


def one_zero_row() -> tuple[Tensor, Tensor]:
    za, zb = draw_pair(6, 5)
    za[2] = 0
    return za, zb


def one_constant_dimension() -> tuple[Tensor, Tensor]:
    za, zb = draw_pair(6, 5)
    za[:, 1] = zb[:, 1] = 2
    return za, zb


def far_apart() -> tuple[Tensor, Tensor]:
    """Rows of lengths from 1e-3 to 1e2 (more, and VICReg's gradient leaves float16)."""
    za, zb = draw_pair(6, 5)
    lengths = torch.logspace(-3, 2, 6, dtype=torch.float64)[:, None]
    return F.normalize(za, dim=1) * lengths, F.normalize(zb, dim=1) * lengths.flip(0)


CASES = (two_rows, identical, opposite, zeros, one_zero_row, one_constant_dimension, far_apart)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@EACH_LOSS
def test_losses_and_gradients_are_finite(
    name: str, case: Callable[[], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    value, *both = gradients(LOSSES[name], *(z.to(dtype) for z in case()))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.isfinite()
    assert any(gradient is not None for gradient in both)
    for gradient in both:
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EACH_LOSS
def test_half_precision_is_computed_in_single(name: str, dtype: torch.dtype) -> None:
    za, zb = (z.to(dtype) for z in draw_pair(8, 16))
    value, *both = gradients(LOSSES[name], za, zb)
    expected, *slopes = gradients(LOSSES[name], za.float(), zb.float())
    assert value == expected
    for gradient, slope in zip(both, slopes, strict=True):
        assert (gradient is None) == (slope is None)
        if gradient is not None and slope is not None:
            assert torch.equal(gradient, slope.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@EACH_LOSS
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    pair = [z.to(dtype).requires_grad_() for z in draw_pair(8, 16)]
    expected = LOSSES[name](*pair)
    slopes = torch.autograd.grad(expected, pair, allow_unused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[name](*pair)
    assert value.dtype == expected.dtype
    assert value == expected
    for gradient, slope in zip(torch.autograd.grad(value, pair, allow_unused=True), slopes, strict=True):
        assert (gradient is None) == (slope is None)
        assert slope is None or torch.equal(gradient, slope)


@EACH_LOSS
def test_single_precision_is_close_to_double(name: str) -> None:
    za, zb = draw_pair(32, 24)
    value, *both = gradients(LOSSES[name], za.float(), zb.float())
    expected, *slopes = gradients(LOSSES[name], za, zb)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, slope in zip(both, slopes, strict=True):
        if gradient is not None and slope is not None:
            torch.testing.assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))


@pytest.mark.parametrize(("shape_a", "shape_b"), [((4, 3), (4, 2)), ((4, 3), (2, 3)), ((4, 3, 1), (4, 3, 1))])
@EACH_LOSS
def test_losses_refuse_other_shapes(name: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(4, 3.*expected two equal \(B, D\)") as error:
        LOSSES[name](torch.ones(shape_a), torch.ones(shape_b))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OF_DIRECTIONS)
def test_a_zero_row_has_no_gradient(name: str) -> None:
    """It has no direction; through a normalisation with an eps of 1e-12 it would get one of 1e10."""
    for zero_first in (True, False):
        pair = one_zero_row() if zero_first else one_zero_row()[::-1]
        _, *both = gradients(LOSSES[name], *pair)
        gradient = both[0 if zero_first else 1]
        if gradient is not None:
            assert not gradient[2].any()
            assert gradient.any()


# Properties


@pytest.mark.parametrize("name", OF_DIRECTIONS)
def test_scale_of_rows_does_not_matter(name: str) -> None:
    za, zb = draw_pair(6, 5)
    scales = torch.logspace(-4, 4, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(LOSSES[name](za * scales, zb * scales.flip(0)), LOSSES[name](za, zb))


@pytest.mark.parametrize("name", [name for name in LOSSES if "ids" not in name])
def test_order_of_rows_does_not_matter(name: str) -> None:
    za, zb = draw_pair(7, 5)
    shuffled = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    torch.testing.assert_close(LOSSES[name](za[shuffled], zb[shuffled]), LOSSES[name](za, zb))
    assert not torch.isclose(LOSSES[name](za[shuffled], zb), LOSSES[name](za, zb))


def test_barlow_twins_knows_no_scale_or_offset_of_dimensions() -> None:
    za, zb = draw_pair(7, 5)
    scales = torch.logspace(-2, 2, 5, dtype=torch.float64)
    moved = barlow_twins_loss(za * scales + 3, zb * scales.flip(0) - 5, eps=0.0)
    torch.testing.assert_close(moved, barlow_twins_loss(za, zb, eps=0.0))
    assert float(barlow_twins_loss(za, za, redundancy=0.0, eps=0.0)) == pytest.approx(0, abs=1e-12)


def test_vicreg_variance_and_covariance_know_no_offset() -> None:
    za, zb = draw_pair(7, 5)
    expected = vicreg_loss(za, zb, invariance=0.0)
    torch.testing.assert_close(vicreg_loss(za + 7, zb - 3, invariance=0.0), expected)


def test_known_values() -> None:
    za, _ = draw_pair(5, 4)
    basis = torch.eye(4, dtype=torch.float64)
    assert float(byol_loss(za, 3 * za)) == pytest.approx(0, abs=1e-12)
    assert float(byol_loss(za, -za)) == pytest.approx(4)
    assert float(byol_loss(torch.zeros(5, 4), za.float())) == 2
    assert float(simsiam_loss(za, 3 * za)) == pytest.approx(-1)
    # All candidates alike; one certain and the rest orthogonal.
    assert float(info_nce(*identical())) == pytest.approx(math.log(4))
    assert float(info_nce(basis, basis, temperature=0.5)) == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    # The teacher knows nothing once its scores are centred; a student that agrees is at the entropy.
    centre = basis[0]
    flat = dino_loss(torch.zeros(2, 4, dtype=torch.float64), centre.expand(2, 4), centre=centre)
    assert float(flat) == pytest.approx(math.log(4))
    # Collapsed: every standard deviation is 0.01, and the hinge is added over the two sides.
    assert float(vicreg_loss(*identical())) == pytest.approx(25 * 2 * 0.99)
    # Collapsed: every correlation is 0.
    assert float(barlow_twins_loss(*identical())) == pytest.approx(0.1 * 3)


@pytest.mark.parametrize("loss", [byol_loss, simsiam_loss, info_nce])
def test_detached_targets_leave_the_rest_as_it_is(loss: Callable[..., Tensor]) -> None:
    za, zb = draw_pair(5, 4)
    _, expected, _ = gradients(loss, za, zb)
    value, gradient, of_target = gradients(lambda a, b: loss(a, b.detach()), za, zb)
    assert of_target is None
    assert gradient is not None
    assert expected is not None
    assert torch.equal(gradient, expected)
    assert value.isfinite()


# Sinkhorn


@drawn(epsilon=st.floats(0.05, 0.5), iterations=st.integers(1, 10))
def test_sinkhorn_equals_a_loop(batch: int, width: int, epsilon: float, iterations: int) -> None:
    scores, _ = draw_scores(batch, width)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    expected = sinkhorn_by_loop(scores.tolist(), epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(codes, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(batch, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_sinkhorn_of_large_scores(scale: float) -> None:
    """Exponentials of 200,000, as only decimals hold them."""
    scores = scale * draw_scores(6, 4)[0]
    expected = torch.tensor(sinkhorn_by_loop(scores.tolist()), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(scores), expected, rtol=1e-6, atol=1e-12)
    single = sinkhorn(scores.float())
    torch.testing.assert_close(single.sum(dim=1), torch.ones(6))
    value, gradient, _ = gradients(swav_loss, scores.float(), scores.float())
    assert value.isfinite()
    assert gradient is not None
    assert gradient.isfinite().all()


def test_sinkhorn_converges_to_the_optimal_transport() -> None:
    """Rows sum to 1, prototypes to B / K, and what it multiplied exp(scores / epsilon) with factorises."""
    scores, _ = draw_scores(10, 4)
    codes = sinkhorn(scores, epsilon=0.3, iterations=200)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 2.5, dtype=torch.float64))
    factors = codes.log() - scores / 0.3
    interaction = factors - factors[:1] - factors[:, :1] + factors[0, 0]
    torch.testing.assert_close(interaction, torch.zeros_like(interaction), rtol=0, atol=1e-9)


def test_sinkhorn_has_no_gradient() -> None:
    assert not sinkhorn(draw_scores(3, 4)[0].requires_grad_()).requires_grad


def test_queued_scores_only_spread_the_codes() -> None:
    """No loss of their own, and none of their gradient; where all lean to one prototype the batch moves away."""
    scores, code_scores = draw_scores(4, 5)
    queued = draw_scores(8, 5, seed=2)[0].requires_grad_()
    value = swav_loss(scores.requires_grad_(), code_scores, queued=queued)
    value.backward()
    assert queued.grad is None
    expected = sinkhorn(torch.cat([code_scores, queued.detach()]))[:4]
    torch.testing.assert_close(value, -(expected * (scores / 0.1).log_softmax(dim=1)).sum(dim=1).mean())
    assert not torch.isclose(value, swav_loss(scores, code_scores))
