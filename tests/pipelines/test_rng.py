"""The counter-based generator: exact bits against plain Python integers, uniformity, independence, no state."""

from collections.abc import Callable, Iterator
from itertools import islice, permutations, product

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from amimv.pipelines import rng
from amimv.pipelines.rng import Key, Stream, hashes, integers, permutation, uniforms, uniforms64

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15
#: Two-sided; the numbers are fixed, so a test that passes once passes always.
ALPHA = 1e-4


def finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def splitmix64(seed: int) -> Iterator[int]:
    """The published generator, on Python's integers."""
    while True:
        seed = (seed + GAMMA) & MASK
        yield finalise(seed)


def reference_hashes(fields: tuple[int, int, int, int], position: int, n: int) -> list[int]:
    """splitmix64, seeded by a chain over the position and the four fields of the key."""
    state = position & MASK
    for word in (fields[0] * 0xBF58476D1CE4E5B9, *fields[1:]):
        state = finalise(((state + GAMMA) & MASK) ^ (word & MASK))
    return list(islice(splitmix64(state), n))


def unsigned(values: Tensor) -> list[int]:
    return [value & MASK for value in values.flatten().tolist()]


def p_value(counts: Tensor, expected: Tensor | float) -> float:
    """Of Pearson's chi-square test."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    return float(chi2.sf(statistic, counts.numel() - 1))


def assert_uniform(bins: Tensor, n_bins: int) -> None:
    p = p_value(torch.bincount(bins.flatten(), minlength=n_bins), bins.numel() / n_bins)
    assert ALPHA < p < 1 - ALPHA


def test_reference_gives_the_published_numbers() -> None:
    # Rosetta Code, "Pseudo-random numbers/Splitmix64", seed 1234567.
    assert list(islice(splitmix64(1234567), 5)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(
    "fields",
    [(0, 0, 0, 0), (1, 2, 3, 4), (2**63, 1, 0, 7), (2**64 - 1, 1016, 399, 10**6), (-1, 5, 2**31, 2**40)],
)
def test_bits_equal_plain_python_integers(fields: tuple[int, int, int, int]) -> None:
    positions = [0, 1, 2, 255, 10**6, 2**62, -1]
    got = hashes(Key(*fields), torch.tensor(positions), 5)
    assert got.dtype == torch.int64
    assert got.shape == (len(positions), 5)
    assert unsigned(got) == [h for p in positions for h in reference_hashes(fields, p, 5)]


def test_floats_and_integers_are_the_top_bits_of_the_hashes() -> None:
    fields, positions = (3, 1, 4, 1), torch.arange(200)
    expected = [h for p in range(200) for h in reference_hashes(fields, p, 3)]
    single, double = uniforms(Key(*fields), positions, 3), uniforms64(Key(*fields), positions, 3)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert single.flatten().tolist() == [(h >> 40) / 2**24 for h in expected]
    assert double.flatten().tolist() == [(h >> 11) / 2**53 for h in expected]
    assert integers(Key(*fields), positions, 3, 1000).flatten().tolist() == [(h >> 1) % 1000 for h in expected]


@pytest.mark.parametrize("stream", [Stream.ANCHOR, Stream.PARTNER, Stream.VIEW, Stream.VIEW + 17])
def test_every_byte_is_uniform(stream: int) -> None:
    drawn = hashes(Key(0, stream), torch.arange(50_000), 2)
    for shift in range(0, 64, 8):
        assert_uniform((drawn >> shift) & 255, 256)


@pytest.mark.parametrize("draw", [uniforms, uniforms64])
def test_uniforms_fill_the_unit_interval(draw: Callable[[Key, Tensor, int], Tensor]) -> None:
    u = draw(Key(7, Stream.VIEW), torch.arange(100_000), 1).double()
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert_uniform((u * 256).long(), 256)


def test_uniforms_stay_below_one_for_every_bit_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[-1], [0], [2**63 - 1], [-(2**63)]])
    monkeypatch.setattr(rng, "hashes", lambda key, positions, n: extremes)
    for draw, bits in ((uniforms, 24), (uniforms64, 53)):
        u = draw(Key(0, 0), torch.arange(4), 1)[:, 0]
        assert u.tolist() == [1 - 2.0**-bits, 0, 0.5 - 2.0**-bits, 0.5]


def grid(**change: int) -> Tensor:
    """20,000 hashes that differ from those of ``grid()`` in one respect only."""
    start = change.pop("position", 0)
    column = change.pop("column", 0)
    key = Key(5, 1000, 2, 3)._replace(**{name: getattr(Key(5, 1000, 2, 3), name) + by for name, by in change.items()})
    return hashes(key, torch.arange(start, start + 20_000), column + 1)[:, column]


def as_float(bits: Tensor) -> Tensor:
    return bits.double() * 2.0**-64 + 0.5


@pytest.mark.parametrize("by", [1, 2, 16])
@pytest.mark.parametrize("what", ["position", "seed", "stream", "epoch", "step", "column"])
def test_neighbours_are_independent(what: str, by: int) -> None:
    a, b = grid(), grid(**{what: by})
    correlation = torch.corrcoef(torch.stack([as_float(a), as_float(b)]))[0, 1]
    assert abs(correlation) < 5 / len(a) ** 0.5
    assert_uniform(((a >> 60) & 15) * 16 + ((b >> 60) & 15), 256)
    assert_uniform((a & 15) * 16 + (b & 15), 256)
    # The difference, too: two streams that are shifts of each other have one that is constant.
    assert_uniform(((a - b) >> 56) & 255, 256)
    flipped = sum((((a ^ b) >> bit) & 1).double().mean().item() for bit in range(64))
    assert abs(flipped - 32) < 5 * 4 / len(a) ** 0.5


def all_different(seeds: range, others: range, positions: Tensor) -> bool:
    """Whether no hash comes twice over these seeds, and streams, epochs and steps."""
    fields = product(seeds, others, others, others)
    drawn = torch.stack([hashes(Key(*key), positions, 2) for key in fields])
    return drawn.unique().numel() == drawn.numel()


def test_the_fields_do_not_stand_in_for_each_other() -> None:
    assert all_different(range(1), range(8), torch.arange(8))
    assert all_different(range(1000, 1001), range(8), torch.arange(8))


def test_seeds_and_positions_do_not_stand_in_for_each_other() -> None:
    assert all_different(range(8), range(2), torch.arange(256))


def test_step_as_a_tensor_equals_the_integer() -> None:
    positions = torch.arange(50)
    for step in (0, 1, 12345, 2**40):
        by_tensor = Key(1, Stream.VIEW, 2, torch.tensor(step))
        assert torch.equal(hashes(by_tensor, positions, 4), hashes(Key(1, Stream.VIEW, 2, step), positions, 4))


def test_a_slice_of_positions_gives_the_slice_of_the_whole() -> None:
    key, positions = Key(1, 2, 3, 4), torch.arange(64)
    whole = hashes(key, positions, 16)
    assert torch.equal(hashes(key, positions[24:40], 16), whole[24:40])
    assert torch.equal(hashes(key, positions.flip(0), 16), whole.flip(0))
    assert torch.equal(hashes(key, positions.view(4, 16), 16), whole.view(4, 16, 16))
    assert torch.equal(hashes(key, positions, 3), whole[:, :3])


def test_there_is_no_state() -> None:
    before = torch.random.get_rng_state()
    first = hashes(Key(1, 0), torch.arange(9), 2)
    torch.rand(3)
    torch.random.set_rng_state(before)
    assert torch.equal(hashes(Key(1, 0), torch.arange(9), 2), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_permutation_is_one_and_differs() -> None:
    for n in (0, 1, 2, 257):
        assert permutation(Key(0, 0, epoch=1), n).sort().values.tolist() == list(range(n))
    drawn = {tuple(permutation(Key(s, t, e), 50).tolist()) for s, t, e in product(range(3), repeat=3)}
    assert len(drawn) == 27


def test_every_permutation_is_as_likely() -> None:
    index = {order: i for i, order in enumerate(permutations(range(4)))}
    drawn = [index[tuple(permutation(Key(0, 0, epoch=epoch), 4).tolist())] for epoch in range(6000)]
    assert_uniform(torch.tensor(drawn), 24)


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 100])
def test_integers_are_in_range_and_unbiased(bound: int) -> None:
    drawn = integers(Key(2, Stream.PARTNER), torch.arange(50_000), 2, bound)
    assert drawn.dtype == torch.int64
    assert drawn.min() == 0
    assert drawn.max() == bound - 1
    if bound > 1:
        assert_uniform(drawn, bound)


def test_integers_take_a_bound_per_position() -> None:
    bounds = torch.arange(1, 1001)
    drawn = integers(Key(0, 0), torch.arange(1000), 4, bounds[:, None])
    assert (drawn >= 0).all()
    assert (drawn < bounds[:, None]).all()
    expected = torch.cat([integers(Key(0, 0), torch.tensor([i]), 4, i + 1) for i in range(1000)])
    assert torch.equal(drawn, expected)


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_bits_on_cuda() -> None:
    positions = torch.arange(10_000)
    key = Key(2**64 - 1, Stream.VIEW, 3, 4)
    on_cuda = key._replace(step=torch.tensor(4, device="cuda"))
    for draw in (hashes, uniforms, uniforms64):
        assert torch.equal(draw(on_cuda, positions.cuda(), 4).cpu(), draw(key, positions, 4))
    assert torch.equal(permutation(key, 10_000, "cuda").cpu(), permutation(key, 10_000))


@pytest.mark.parametrize("missing", [(), (1,)])
def test_a_key_names_its_stream(missing: tuple[int, ...]) -> None:
    """Two views that share one by default would be the same view."""
    with pytest.raises(TypeError, match="stream"):
        Key(*missing)
