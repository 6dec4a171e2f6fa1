"""The queue against a plain first-in, first-out list."""

from collections import deque

import pytest
import torch
from torch import Tensor, nn

from amimv.models.memory import Queue

WIDTH = 3


def build_queue(size: int) -> Queue:
    torch.manual_seed(0)
    return Queue(size, WIDTH)


def batch(rows: int, seed: int) -> Tensor:
    return 5 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def unit_list(row: Tensor) -> list[float]:
    values = row.double().tolist()
    length = sum(v * v for v in values) ** 0.5
    return [v / length for v in values]


def oldest_first(queue: Queue) -> Tensor:
    return queue.rows.roll(-int(queue.position), 0)


@pytest.mark.parametrize(
    ("size", "batches"),
    [
        (6, (2, 2, 2, 2)),  # a multiple of the batch
        (7, (3, 3, 3, 3, 3)),  # a batch that wraps around
        (5, (5, 5)),  # as long as the batch
        (4, (3, 9, 2, 6, 1)),  # shorter than some batches
        (1, (2, 1)),
        (8, (3, 0, 4)),
    ],
)
def test_the_newest_rows_are_kept_in_the_order_they_came(size: int, batches: tuple[int, ...]) -> None:
    queue = build_queue(size)
    expected = deque((row.tolist() for row in queue.rows), maxlen=size)
    for seed, rows in enumerate(batches):
        new = batch(rows, seed)
        queue.push(new)
        expected.extend(unit_list(row) for row in new)
        torch.testing.assert_close(oldest_first(queue), torch.tensor(list(expected)), rtol=1e-5, atol=1e-6)
        assert 0 <= int(queue.position) < size


def test_a_batch_overwrites_its_places_and_no_others() -> None:
    queue = build_queue(7)
    before = queue.rows.clone()
    queue.push(batch(3, 0))
    assert torch.equal(queue.rows[3:], before[3:])
    assert not (queue.rows[:3] == before[:3]).any()
    first = queue.rows[:3].clone()
    queue.push(batch(4, 1))
    assert torch.equal(queue.rows[:3], first)
    assert int(queue.position) == 0


def test_it_starts_with_random_directions_that_the_seed_decides() -> None:
    queue = build_queue(50)
    assert torch.equal(queue.rows, build_queue(50).rows)
    assert not torch.equal(queue.rows, Queue(50, WIDTH).rows)
    assert len(queue.rows.unique(dim=0)) == 50


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rows_have_length_one(scale: float) -> None:
    queue = build_queue(5)
    for step in range(3):
        torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(5))
        queue.push(scale * batch(2, step))


def test_rows_keep_their_dtype() -> None:
    queue = build_queue(4)
    queue.push(batch(2, 0).bfloat16())
    assert queue.rows.dtype == torch.float32
    torch.testing.assert_close(queue.rows[:2].norm(dim=1), torch.ones(2))


def test_pushing_takes_no_gradient_and_leaves_none() -> None:
    queue = build_queue(4)
    rows = batch(2, 0).requires_grad_()
    leaf = rows * 2
    queue.push(leaf)
    assert not queue.rows.requires_grad
    assert queue.rows.grad_fn is None
    leaf.sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.full_like(rows, 2))
    assert list(queue.parameters()) == []


def test_pushing_leaves_the_rows_it_is_given_alone() -> None:
    rows = batch(2, 0)
    before = rows.clone()
    queue = build_queue(4)
    queue.push(rows)
    rows.zero_()
    torch.testing.assert_close(queue.rows[:2], nn.functional.normalize(before, dim=1))


def test_a_checkpointed_queue_goes_on_where_it_was() -> None:
    queue = build_queue(5)
    queue.push(batch(3, 0))
    torch.manual_seed(1)
    other = Queue(5, WIDTH)
    other.load_state_dict({name: tensor.clone() for name, tensor in queue.state_dict().items()})
    for seed in (1, 2):
        queue.push(batch(3, seed))
        other.push(batch(3, seed))
        assert torch.equal(queue.rows, other.rows)
        assert torch.equal(queue.position, other.position)
    assert set(queue.state_dict()) == {"rows", "position"}
