"""View parameters: all randomness of a view, drawn before any pixel is touched.

``draw_view_params`` is the only place where a view's random numbers are drawn; a backend is a pure function of
images and parameters (`kornia_backend`, `dali_backend`), so the same parameters give the same pixels in both.

Order of operations: resample, colour, clamp to [0, 1], blur, solarise, normalise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.rng import Key, uniforms

#: Blur strength, in pixels, that changes nothing: in a window of 3 or more the neighbours weigh exp(-200).
NO_BLUR = 0.05
#: A threshold that no value in [0, 1] reaches.
NO_SOLARISE = 2.0

#: The parameters of a view that are drawn, one row per sample.
DRAWN = ("affine", "colour", "sigma", "solarise")

#: Luma weights of ITU-R BT.601, as torchvision and Kornia use for greyscale.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ViewPolicy:
    """How one view is rendered: output size, the data set's statistics, and how strongly it is augmented.

    The defaults only normalise. All probabilities are in [0, 1].

    Attributes:
        size: height and width of the view in pixels; None keeps the image's.
        mean, std: per channel, in units of [0, 1]; their length is the number of channels (1 or 3). None: not known
            yet, so nothing can be drawn or rendered; `Recipe.with_statistics` binds them.
        crop: smallest and largest area of the random resized crop, as a share of the image.
        ratio: smallest and largest aspect ratio (width / height) of the crop, drawn log-uniformly.
        hflip, vflip: probability of mirroring left-right, up-down.
        rotation: largest absolute angle, in degrees, uniform.
        brightness, contrast, saturation: factor uniform in [max(0, 1 - v), 1 + v].
        hue: uniform in [-v, v], in turns; at most 0.5.
        jitter_p: probability that the four jitter operations are applied (together, as in SimCLR).
        grey_p: probability of greyscale (colour images only).
        blur_p, blur_sigma: probability and range of sigma, in pixels of the view.
        solarise_p, solarise_threshold: probability and threshold in [0, 1]; values at or above it are inverted.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    vflip: float = 0.0
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_p: float = 0.0
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    solarise_threshold: float = 0.5

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise InputError(f"mean {self.mean} and std {self.std} must have the same number of channels")
        if self.mean is not None and len(self.mean) not in (1, 3):
            raise InputError(f"mean {self.mean} and std {self.std} must both have 1 or 3 channels")
        for name in ("hflip", "vflip", "jitter_p", "grey_p", "blur_p", "solarise_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a probability in [0, 1]")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise InputError(f"crop is {self.crop}, expected 0 < smallest <= largest <= 1 (shares of the area)")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"ratio is {self.ratio}, expected 0 < smallest <= largest")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise InputError(f"blur_sigma is {self.blur_sigma}, expected 0 < smallest <= largest")
        if not 0 <= self.hue <= 0.5:
            raise InputError(f"hue is {self.hue}, expected turns in [0, 0.5]")
        if self.size is not None and self.size < 4:
            raise InputError(f"size is {self.size}, expected at least 4 pixels")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std.

        Raises:
            InputError: if they are not known: contrast would pivot on a grey that is not the data set's.
        """
        if self.mean is None or self.std is None:
            raise InputError(
                "the view policy has no mean and std: give ViewPolicy(mean=..., std=...), or bind a recipe's with "
                "recipe.with_statistics(store.mean, store.std)"
            )
        return self.mean, self.std

    @property
    def channels(self) -> int:
        return len(self.statistics[0])

    @property
    def resamples(self) -> bool:
        """Whether any geometry is drawn."""
        return self.crop != (1.0, 1.0) or self.ratio != (1.0, 1.0) or any((self.hflip, self.vflip, self.rotation))

    @property
    def recolours(self) -> bool:
        jitters = self.jitter_p > 0 and any((self.brightness, self.contrast, self.saturation, self.hue))
        return jitters or (self.grey_p > 0 and self.channels == 3)

    def normalised(self) -> "ViewPolicy":
        """The policy of the normalised view ``N``: the same size and statistics, nothing drawn."""
        return ViewPolicy(size=self.size, mean=self.mean, std=self.std)


@dataclass(frozen=True)
class ViewParams:
    """The random numbers of one view of one batch. An operation that the policy never draws is ``None``.

    Attributes:
        size, mean, std: as in the policy.
        affine: ``(B, 2, 3)`` ``float32``, output to input coordinates in [-1, 1], ``align_corners=False``.
        colour: ``(B, C, C + 1)`` ``float32``, applied to values in [0, 1]: matrix and offset.
        sigma: ``(B,)`` ``float32`` Gaussian blur in pixels of the view; ``NO_BLUR`` changes nothing.
        solarise: ``(B,)`` ``float32`` threshold in [0, 1]; ``NO_SOLARISE`` changes nothing.
    """

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    affine: Tensor | None = None
    colour: Tensor | None = None
    sigma: Tensor | None = None
    solarise: Tensor | None = None

    def to(self, device: torch.device | str) -> "ViewParams":
        """The same parameters on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name in DRAWN if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def split(self, sizes: Sequence[int]) -> list["ViewParams"]:
        """The parameters of consecutive batches of these sizes, without a copy."""
        drawn = {name: value.split(list(sizes)) for name in DRAWN if (value := getattr(self, name)) is not None}
        rows: list[dict[str, Any]] = [{name: parts[i] for name, parts in drawn.items()} for i in range(len(sizes))]
        return [replace(self, **row) for row in rows]


def blur_window(size: int) -> int:
    """Side of the blur's window: the odd number nearest to a tenth of the view's size, at least 3 (28: 3, 224: 23).

    A tenth of the image is SimCLR's choice (Chen et al. 2020, appendix A).
    """
    return max(3, 2 * round((size / 10 - 1) / 2) + 1)


def draw_view_params(policy: ViewPolicy, positions: Tensor, key: Key) -> ViewParams:
    """Draw the parameters of one view for the given places in the global batch.

    Args:
        policy: what is drawn, and how strongly.
        positions: ``(B,)`` ``int64``, the place of each sample in the global batch; the numbers of a sample depend
            on its own place only, so a rank that draws its slice gets what a single process gets there.
        key: seed, stream (one per view), epoch and step; a step per sample, ``(B,)``, draws several batches at once.

    Returns:
        Parameters on the device of ``positions``.

    Raises:
        InputError: if the policy's mean and std are not known.
    """
    # Always drawn in full, so that switching one operation off does not change the others.
    u = uniforms(key, positions, 16).unbind(1)
    params = ViewParams(policy.size, *policy.statistics)
    if policy.resamples:
        params = replace(params, affine=_affine(policy, u[0:7]))
    if policy.recolours:
        params = replace(params, colour=_colour(policy, u[7:13]))
    if policy.blur_p > 0:
        low, high = policy.blur_sigma
        params = replace(params, sigma=torch.where(u[13] < policy.blur_p, low + (high - low) * u[14], NO_BLUR))
    if policy.solarise_p > 0:
        threshold = torch.where(u[15] < policy.solarise_p, policy.solarise_threshold, NO_SOLARISE)
        params = replace(params, solarise=threshold)
    return params


def _affine(policy: ViewPolicy, u: tuple[Tensor, ...]) -> Tensor:
    """Crop, flips and rotation as one matrix ``(B, 2, 3)``.

    Where torchvision's random resized crop draws again when a crop does not fit, the side that is too long is cut.
    """
    area = policy.crop[0] + (policy.crop[1] - policy.crop[0]) * u[0]
    low, high = (math.log(r) for r in policy.ratio)
    ratio = torch.exp(low + (high - low) * u[1])
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    centre_x = (1 - width) * (2 * u[2] - 1)
    centre_y = (1 - height) * (2 * u[3] - 1)
    flip_x = torch.where(u[4] < policy.hflip, -1.0, 1.0)
    flip_y = torch.where(u[5] < policy.vflip, -1.0, 1.0)
    angle = math.radians(policy.rotation) * (2 * u[6] - 1)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([width * flip_x * cos, -width * flip_y * sin, centre_x], dim=1)
    row_y = torch.stack([height * flip_x * sin, height * flip_y * cos, centre_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def _factor(strength: float, u: Tensor, applied: Tensor) -> Tensor:
    low = max(0.0, 1 - strength)
    return torch.where(applied, low + (1 + strength - low) * u, 1.0)


def _colour(policy: ViewPolicy, u: tuple[Tensor, ...]) -> Tensor:
    """Brightness, contrast, saturation, hue and greyscale, in this order, as one matrix ``(B, C, C + 1)``.

    It differs from torchvision's ``ColorJitter`` in three ways: the order is fixed, where that shuffles it; contrast
    pivots on the data set's mean luma (times the brightness factor), where that takes each image's own; and values
    are clamped to [0, 1] once, at the end. Hue is a rotation about the grey axis in YIQ, as in DALI, where that goes
    through HSV.
    """
    applied = u[0] < policy.jitter_p
    brightness = _factor(policy.brightness, u[1], applied)
    contrast = _factor(policy.contrast, u[2], applied)
    if policy.channels == 1:
        pivot: float = policy.statistics[0][0]
        return torch.stack([brightness * contrast, (1 - contrast) * brightness * pivot], dim=1).unsqueeze(1)
    saturation = _factor(policy.saturation, u[3], applied)
    hue = torch.where(applied, policy.hue * (2 * u[4] - 1), 0.0)
    # Last: greyscale is saturation 0 after the hue rotation, which keeps luma.
    saturation = torch.where(u[5] < policy.grey_p, 0.0, saturation)
    pivot = sum(m * w for m, w in zip(policy.statistics[0], LUMA, strict=True))
    chroma = saturation * torch.exp(2j * math.pi * hue)  # scales and rotates the (I, Q) plane
    basis = _yiq_basis(u[0].device)
    unit = torch.ones_like(brightness)
    # Y stays, (I, Q) is turned and scaled: RGB -> YIQ -> RGB is a sum of three fixed matrices.
    weights = torch.stack([unit, chroma.real, chroma.imag], dim=1)
    with torch.autocast(basis.device.type, enabled=False):  # the caller's would round the matrix to bfloat16
        matrix = torch.einsum("bk,kij->bij", weights, basis) * (brightness * contrast)[:, None, None]
    offset = ((1 - contrast) * brightness * pivot)[:, None, None].expand(-1, 3, 1)
    return torch.cat([matrix, offset], dim=2)


_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
_BASIS: dict[torch.device, Tensor] = {}


def _yiq_basis(device: torch.device) -> Tensor:
    """``(3, 3, 3)``: RGB matrices that keep luma, keep chroma, and turn chroma by 90 degrees. Kept per device."""
    if device not in _BASIS:
        forward = torch.tensor(_RGB_TO_YIQ, dtype=torch.float64)
        inverse = torch.linalg.inv(forward)
        luma = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
        chroma = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
        turn = torch.zeros(3, 3, dtype=torch.float64)
        turn[1, 2], turn[2, 1] = -1.0, 1.0
        basis = torch.stack([inverse @ m @ forward for m in (luma, chroma, turn)])
        _BASIS[device] = basis.to(device, torch.float32)
    return _BASIS[device]
