"""Random numbers as a function of position: a counter-based generator on ``int64`` tensors.

There is no state: the same (seed, stream, epoch, step, position) gives the same bits on every device, in every
process and in every order, so a resumed or re-distributed run sees the same numbers. After Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (SC 2011); the mixing function is the finaliser of splitmix64 (Steele et al.,
"Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Key(NamedTuple):
    """Names one family of random numbers; what varies inside it is the position.

    ``step`` may be an ``int64`` tensor on the device: of no dimension, so that a captured CUDA graph can advance it,
    or one step per position, so that several batches are drawn at once. ``stream`` has no default: two views that
    share one are the same view.
    """

    seed: int
    stream: int
    epoch: int = 0
    step: int | Tensor = 0


def _signed(value: int) -> int:
    """A 64-bit pattern as the Python integer that an ``int64`` tensor can hold."""
    return (value + 2**63) % 2**64 - 2**63


def library_seed(seed: int, epoch: int = 0) -> int:
    """A seed in ``[0, 2**32)``, as NumPy and scikit-learn take them: ``seed + epoch`` where that fits."""
    return (seed + epoch) % 2**32


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own shift of ``int64`` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hashes(key: Key, positions: Tensor, n: int) -> Tensor:
    """``n`` independent 64-bit hashes for each position.

    Args:
        key: the family of numbers.
        positions: ``int64``, any shape ``(...)``.
        n: numbers per position.

    Returns:
        ``(..., n)`` ``int64``, uniform over all 64-bit patterns, on the device of ``positions``.
    """
    import torch

    state = positions
    # The seed is spread over all bits: as it is, a small seed would only swap the numbers of nearby positions.
    for field in key._replace(seed=key.seed * _MIX_1):
        word = _signed(field) if isinstance(field, int) else field
        state = _mix((state + _GAMMA) ^ word)
    counters = torch.arange(1, n + 1, device=positions.device) * _GAMMA
    return _mix(state.unsqueeze(-1) + counters)


def uniforms(key: Key, positions: Tensor, n: int) -> Tensor:
    """``(..., n)`` ``float32`` numbers, uniform over the multiples of ``2**-24`` in [0, 1)."""
    import torch

    return _shift_right(hashes(key, positions, n), 40).to(torch.float32) * 2.0**-24


def uniforms64(key: Key, positions: Tensor, n: int) -> Tensor:
    """``(..., n)`` ``float64`` numbers, uniform over the multiples of ``2**-53`` in [0, 1)."""
    import torch

    return _shift_right(hashes(key, positions, n), 11).to(torch.float64) * 2.0**-53


def integers(key: Key, positions: Tensor, n: int, bound: int | Tensor) -> Tensor:
    """``(..., n)`` ``int64`` numbers in ``[0, bound)``; ``bound`` broadcasts against the result.

    The bias of the remainder is below ``bound / 2**63``.
    """
    return _shift_right(hashes(key, positions, n), 1) % bound


def permutation(key: Key, n: int, device: torch.device | str = "cpu") -> Tensor:
    """A random permutation of ``0..n-1``, ``int64``: the argsort of one hash per index."""
    import torch

    positions = torch.arange(n, device=device)
    return hashes(key, positions, 1).squeeze(-1).argsort(stable=True)


class Stream(IntEnum):
    """Who draws: every use of the generator has its own stream, so no two share numbers."""

    ANCHOR = 1
    PARTNER = 2
    LONG_TAIL = 3
    LABEL_FRACTION = 4
    PHANTOM = 5
    NOISE = 6
    GROUP_SPLIT = 7
    OWN_GROUP = 8
    EVALUATION = 9
    VIEW = 1000  # + 16 * slot + draw
