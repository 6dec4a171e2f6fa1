"""The embedded data set: procedurally drawn lesions of seven forms on tissue-like texture, not patients.

The classes differ in form only. Position, rotation, aspect, size, colour, contrast, illumination, mottling,
hairs and noise follow one law for all of them, every form takes away the same amount of light on average (so
mean colour says nothing), and the palette varies less than the usual colour jitter does (so it is no shortcut
for a contrastive loss).
"""

import math

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.rng import Key, Stream, hashes, permutation, uniforms64

CLASS_NAMES = ("disc", "ring", "spiculated", "lobulated", "network", "cluster", "two-tone")
TRAIN_COUNTS = (1397, 755, 408, 221, 119, 65, 35)
"""Images per class in the training split, 40 : 1; which class gets which is permuted by the seed."""
VAL_PER_CLASS = 70
TEST_PER_CLASS = 100

_SPLITS = ("train", "val", "test")
# The ``epoch`` of a key is the split, its ``step`` is one of these purposes: no two uses share numbers.
_ORDER, _COUNTS, _PLACE, _FORM, _COLOUR, _MOTTLE, _HAIR, _NOISE = range(8)

_SKIN = (0.84, 0.69, 0.62)
_SHADE = (0.88, 1.04, 1.08)  # the lesion takes away more green and blue than red: brown on pink
_HAIR_COLOUR = (0.22, 0.17, 0.14)
_HAIR_SHARE = 0.15
_MOST_HAIRS = 3
_MOST_BLOBS = 6
_WAVES = 6  # the mottling has up to this many half waves along each side
_CHUNK_PIXELS = 2**19  # drawn at a time: about 4 MB per float64 plane, whatever the size of the images


def draw_counts(split: str, seed: int = 0) -> tuple[int, ...]:
    """Images per class in the order of ``CLASS_NAMES``: ``train`` long-tailed, ``val`` and ``test`` balanced.

    Raises:
        InputError: no such split.
    """
    if _split_number(split) > 0:
        return (VAL_PER_CLASS if split == "val" else TEST_PER_CLASS,) * len(CLASS_NAMES)
    ranks = permutation(Key(seed, Stream.PHANTOM, _split_number(split), _COUNTS), len(CLASS_NAMES))
    return tuple(TRAIN_COUNTS[rank] for rank in ranks.tolist())


def generate_phantom(
    split: str,
    seed: int = 0,
    size: int = 28,
    device: torch.device | str = "cpu",
    counts: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one split of the data set, in random order.

    An image depends on the seed, the split, its index and its label alone, and is the same on every device:
    all arithmetic is ``float64``, whose differences in the last bit are far too small to move a rounded
    ``uint8``. Another size shows the same lesions at another resolution (the noise stays one number per pixel
    and channel).

    Args:
        split: ``train``, ``val`` or ``test``.
        seed: any integer; one seed is one data set.
        size: side of the images in pixels, at least 8.
        device: where to draw; the results stay there.
        counts: images per class in the order of ``CLASS_NAMES``, instead of ``draw_counts(split, seed)``.

    Returns:
        Images ``(N, size, size, 3)`` ``uint8`` and labels ``(N,)`` ``int64``.

    Raises:
        InputError: no such split, images too small, or counts that are not seven numbers >= 0, not all 0.
    """
    number = _split_number(split)
    if size < 8:
        raise InputError(f"size is {size}, expected at least 8 pixels: use 28, 64, 128 or 224")
    counts = draw_counts(split, seed) if counts is None else counts
    if len(counts) != len(CLASS_NAMES) or min(counts) < 0 or sum(counts) == 0:
        raise InputError(f"counts is {counts}, expected 7 numbers >= 0, not all 0: one per class")
    key = Key(seed, Stream.PHANTOM, number)
    ordered = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    labels = ordered[permutation(key._replace(step=_ORDER), len(ordered), device)]
    images = torch.empty(len(labels), size, size, 3, dtype=torch.uint8, device=device)
    chunk = max(1, _CHUNK_PIXELS // (2 * size) ** 2)
    for label in range(len(CLASS_NAMES)):
        for indices in (labels == label).nonzero().squeeze(1).split(chunk):
            images[indices] = _draw_images(label, indices, key, size)
    return images, labels


def _split_number(split: str) -> int:
    if split not in _SPLITS:
        raise InputError(f"split is {split!r}, expected one of {', '.join(_SPLITS)}")
    return _SPLITS.index(split)


def _uniforms(key: Key, purpose: int, indices: Tensor, n: int) -> tuple[Tensor, ...]:
    """``n`` numbers in [0, 1) per image, each ``(B, 1, 1)``, ready to meet a ``(B, H, W)`` plane."""
    return uniforms64(key._replace(step=purpose), indices, n)[:, :, None, None].unbind(1)


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


def _axis(n: int, device: torch.device) -> Tensor:
    """Centres of ``n`` pixels across [-1, 1]."""
    return (2 * torch.arange(n, dtype=torch.float64, device=device) + 1) / n - 1


def _halve(plane: Tensor) -> Tensor:
    return (plane[:, ::2, ::2] + plane[:, 1::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, 1::2]) / 4


def _draw_images(label: int, indices: Tensor, key: Key, size: int) -> Tensor:
    """``(B, size, size, 3)`` ``uint8`` images of one class; lesion and hairs are drawn at twice the size."""
    lesion = _halve(_lesion(label, indices, key, size))
    colour = uniforms64(key._replace(step=_COLOUR), indices, 10)
    # One step for all channels (a paler or darker skin) and a smaller one for each.
    tone = _between(-0.03, 0.03, colour[:, :1]) + _between(-0.01, 0.01, colour[:, 1:4])
    contrast = _between(0.20, 0.32, colour[:, 7:8]) * _between(0.94, 1.06, colour[:, 4:7])
    skin, shade = lesion.new_tensor(_SKIN) + tone, lesion.new_tensor(_SHADE) * contrast
    light = _light(colour[:, 8:], size) + _mottling(indices, key, size)
    image = skin[:, None, None] + light.unsqueeze(-1) - lesion.unsqueeze(-1) * shade[:, None, None]
    hair = _halve(_hairs(indices, key, size)).unsqueeze(-1)
    image = image + hair * (image.new_tensor(_HAIR_COLOUR) - image)
    image = image + _noise(indices, key, size)
    return (image * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def _light(u: Tensor, size: int) -> Tensor:
    """``(B, size, size)``: a linear gradient of random direction, at most 0.05 at the end of an axis."""
    x = _axis(size, u.device)
    angle, slope = 2 * math.pi * u[:, :1], _between(0.0, 0.05, u[:, 1:2])
    return (slope * angle.cos() * x).unsqueeze(1) + (slope * angle.sin() * x).unsqueeze(2)


def _mottling(indices: Tensor, key: Key, size: int) -> Tensor:
    """``(B, size, size)``: cosine waves of random amplitude, without the constant one."""
    x = _axis(size, indices.device)
    half_waves = torch.arange(_WAVES, device=indices.device)
    basis = (half_waves[:, None] * (x + 1) * (math.pi / 2)).cos()
    amplitude = _between(-0.01, 0.01, uniforms64(key._replace(step=_MOTTLE), indices, _WAVES**2))
    amplitude[:, 0] = 0.0
    return basis.T @ amplitude.unflatten(1, (_WAVES, _WAVES)) @ basis


def _hairs(indices: Tensor, key: Key, size: int) -> Tensor:
    """``(B, 2 size, 2 size)`` opacity of up to three bent dark hairs; most images have none."""
    x = _axis(2 * size, indices.device)
    opacity = x.new_zeros(len(indices), 2 * size, 2 * size)
    haired = (_uniforms(key, _HAIR, indices, 1)[0].flatten() < _HAIR_SHARE).nonzero().squeeze(1)
    u = _uniforms(key, _HAIR, indices[haired], 3 + 4 * _MOST_HAIRS)
    hairs = 1 + (u[1] * _MOST_HAIRS).floor()
    strength = _between(0.5, 0.8, u[2])
    for i in range(_MOST_HAIRS):
        angle, offset, bend, width = u[3 + 4 * i : 7 + 4 * i]
        cos, sin = (2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()
        along = cos * x + sin * x[:, None]
        middle = _between(-0.8, 0.8, offset) + _between(-0.3, 0.3, bend) * along.square()
        inside = _between(0.02, 0.04, width) - (cos * x[:, None] - sin * x - middle).abs()
        line = (inside * size + 0.5).clamp(0, 1) * (i < hairs)  # soft over one pixel of the drawing
        opacity[haired] = torch.maximum(opacity[haired], strength * line)
    return opacity


def _noise(indices: Tensor, key: Key, size: int) -> Tensor:
    """``(B, size, size, 3)`` near-normal noise of deviation 0.025: the sum of four 16-bit words of a hash."""
    bits = hashes(key._replace(step=_NOISE), indices, 3 * size * size)
    total = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48 & 0xFFFF)
    unit = (total - 2 * 0xFFFF) * (math.sqrt(3) / 2**16)
    return (0.025 * unit.to(torch.float64)).unflatten(1, (size, size, 3))


def _lesion(label: int, indices: Tensor, key: Key, size: int) -> Tensor:
    """``(B, 2 size, 2 size)`` share of the contrast that is taken away at each point, around 1 inside."""
    axis = _axis(2 * size, indices.device)
    shift_x, shift_y, radius, aspect, turn, twist, edge = _uniforms(key, _PLACE, indices, 7)
    radius = _between(0.50, 0.72, radius)
    room = 0.9 - radius  # a small lesion may lie further out than a large one
    x = axis - room * _between(-1.0, 1.0, shift_x)
    y = axis[:, None] - room * _between(-1.0, 1.0, shift_y)
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
    major = (cos * x + sin * y) / radius
    minor = (cos * y - sin * x) / (radius * _between(0.72, 1.0, aspect))
    # A second turn: what a form holds inside has no fixed angle to its long axis.
    cos, sin = (2 * math.pi * twist).cos(), (2 * math.pi * twist).sin()
    u, v = cos * major + sin * minor, cos * minor - sin * major
    draws = _uniforms(key, _FORM, indices, 1 + 3 * _MOST_BLOBS)
    return _FORMS[label](u, v, _between(0.08, 0.16, edge), draws)


# The forms: coordinates in units of the lesion's radius, width of the soft edge and uniform numbers give a
# (B, H, W) mask. Each integrates to pi, the area of the unit disc.


def _soft(inside: Tensor, edge: Tensor) -> Tensor:
    """0 to 1 across an edge; ``inside`` is the distance to it, positive inside."""
    return (inside / edge + 0.5).clamp(0, 1)


def _disc(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    return _soft(1 - torch.hypot(u, v), edge)


def _ring(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    hole = _between(0.45, 0.55, draws[0])
    scale = (1 - hole.square()).rsqrt()
    middle, half = scale * (1 + hole) / 2, scale * (1 - hole) / 2
    return _soft(half - (torch.hypot(u, v) - middle).abs(), edge)


def _lobed(u: Tensor, v: Tensor, edge: Tensor, lobes: Tensor, amplitude: Tensor) -> Tensor:
    """A disc whose radius is a cosine of the angle; ``1 + amplitude**2 / 2`` is the mean of its square."""
    radius = (1 + amplitude * (lobes * torch.atan2(v, u)).cos()) * (1 + amplitude.square() / 2).rsqrt()
    return _soft(radius - torch.hypot(u, v), edge)


def _spiculated(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    return _lobed(u, v, edge, 9 + (4 * draws[0]).floor(), _between(0.27, 0.33, draws[1]))


def _lobulated(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    return _lobed(u, v, edge, 4 + (2 * draws[0]).floor(), _between(0.22, 0.28, draws[1]))


def _network(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    """Dark lines around pale holes; ``(1 + cos)(1 + cos) / 4`` averages 1/4, so 4 / 3 makes the mean 1."""
    wave = 2 * math.pi / _between(0.50, 0.62, draws[0])
    columns, rows = 1 + (wave * (u + draws[1])).cos(), 1 + (wave * (v + draws[2])).cos()
    return _disc(u, v, edge, draws) * (4 / 3) * (1 - columns * rows / 4)


def _cluster(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    """A blob amid three to five others, gaps between them: 0.7 of the disc's area, and so much the darker."""
    around = 3 + (3 * draws[0]).floor()
    mean_radius = 0.7**0.5 * (1 + around).rsqrt()
    mask = torch.zeros_like(u)
    for i in range(_MOST_BLOBS):
        along, turn, grow = draws[1 + 3 * i : 4 + 3 * i]
        angle = (2 * math.pi * i + _between(-0.25, 0.25, turn)) / around
        out = (2 * mean_radius + 0.08) * _between(0.95, 1.05, along) * (i > 0)
        radius = torch.where(i <= around, mean_radius * _between(0.92, 1.08, grow), -1.0)
        away = torch.hypot(u - out * angle.cos(), v - out * angle.sin())
        mask = torch.maximum(mask, _soft(radius - away, edge))
    return mask / 0.7


def _two_tone(u: Tensor, v: Tensor, edge: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
    step = _between(0.45, 0.52, draws[0])
    return _disc(u, v, edge, draws) * (1 - step + 2 * step * _soft(u, edge))


_FORMS = (_disc, _ring, _spiculated, _lobulated, _network, _cluster, _two_tone)
