"""View parameters: all randomness of a view, drawn before any pixel is touched.

``draw_view_params`` is the only place where a view's random numbers are drawn; a backend is a pure function of
images and parameters (`kornia_backend`, `dali_backend`), so the same parameters give the same pixels in both.

Order: resample, colour, clamp to [0, 1], the operations on pixels in their order, normalise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amimv.pipelines.constants import kept
from amimv.pipelines.operations import Colour, ColourChange, Geometry, Pixels, Source
from amimv.pipelines.operations.base import compose, matrix
from amimv.pipelines.operations.crop import Crop
from amimv.pipelines.policy import ViewPolicy
from amimv.pipelines.rng import Key, uniforms


@dataclass(frozen=True)
class ViewParams:
    """The random numbers of one view of one batch. What the policy never draws is ``None``, or not there.

    Attributes:
        size, mean, std, value_range: as in the policy.
        affine: ``(B, 2, 3)`` ``float32``, output to input coordinates in [-1, 1], ``align_corners=False``.
        colour: ``(B, C, C + 1)`` ``float32``, applied to values in [0, 1]: matrix and offset.
        pixels: by the name of an operation on pixels what it drew, ``(B,)`` or ``(B, K)`` ``float32``; such as
            ``blur``: sigma in pixels of the view, ``solarise``: threshold in [0, 1].
    """

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[float, float] | None = None
    affine: Tensor | None = None
    colour: Tensor | None = None
    pixels: Mapping[str, Tensor] = field(default_factory=dict)

    def drawn(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        own = {"affine": self.affine, "colour": self.colour}
        return {name: value for name, value in own.items() if value is not None} | dict(self.pixels)

    def _with(self, drawn: Mapping[str, Tensor]) -> "ViewParams":
        pixels = {name: drawn[name] for name in self.pixels}
        return replace(self, affine=drawn.get("affine"), colour=drawn.get("colour"), pixels=pixels)

    def to(self, device: torch.device | str) -> "ViewParams":
        """The same parameters on another device."""
        return self._with({name: value.to(device, non_blocking=True) for name, value in self.drawn().items()})

    def split(self, sizes: Sequence[int]) -> list["ViewParams"]:
        """The parameters of consecutive batches of these sizes, without a copy."""
        parts = {name: value.split(list(sizes)) for name, value in self.drawn().items()}
        return [self._with({name: part[i] for name, part in parts.items()}) for i in range(len(sizes))]


def draw_view_params(policy: ViewPolicy, positions: Tensor, key: Key, aspect: float = 1.0) -> ViewParams:
    """Draw the parameters of one view for the given places in the global batch.

    Args:
        policy: what is drawn, and how strongly.
        positions: ``(B,)`` ``int64``, the place of each sample in the global batch; the numbers of a sample depend
            on its own place only, so a rank that draws its slice gets what a single process gets there.
        key: seed, stream (one per view), epoch and step; a step per sample, ``(B,)``, draws several batches at once.
        aspect: width / height of the images that the view is of.

    Returns:
        Parameters on the device of ``positions``.

    Raises:
        InputError: if the policy's mean and std are not known.
    """
    mean, std = policy.statistics
    source = Source(mean, aspect)
    lanes = max((operation.lane + operation.uniforms for operation in policy.operations), default=0)
    # An operation's numbers are those of its lane, whatever else is drawn.
    u = uniforms(key, positions, lanes).unbind(1)
    affine: Tensor | None = None
    change = ColourChange()
    pixels = {}
    for operation in policy.operations:
        own = u[operation.lane : operation.lane + operation.uniforms]
        if isinstance(operation, Geometry):
            inner = operation.draw(own, source)
            affine = inner if affine is None else compose(affine, inner)
        elif isinstance(operation, Colour):
            change = change.then(operation.draw(own, source))
        elif isinstance(operation, Pixels):
            pixels[operation.key()] = operation.draw(own, source)
    if affine is not None and aspect != 1 and not isinstance(policy.operations[0], Crop):
        affine = compose(centre_square(aspect, affine), affine)
    return ViewParams(policy.size, mean, std, policy.value_range, affine, _colour_matrix(change, len(mean)), pixels)


def centre_square(aspect: float, like: Tensor) -> Tensor:
    """``(B, 2, 3)``: the square in the middle of images of this width / height; the whole image where that is 1."""
    return matrix([[min(1.0, 1 / aspect), 0.0, 0.0], [0.0, min(1.0, aspect), 0.0]], like[:, 0, 0])


def _colour_matrix(change: ColourChange, channels: int) -> Tensor | None:
    """``(B, C, C + 1)``: matrix and offset; None if nothing changes."""
    some = change.gain if change.gain is not None else change.chroma
    if some is None:
        return None
    gain = torch.ones_like(some.real) if change.gain is None else change.gain
    offset = gain.new_zeros(len(gain), 1) if change.offset is None else change.offset
    if change.chroma is None:
        linear = torch.eye(channels, device=gain.device) * gain[:, None, None]
    else:
        basis = _yiq_basis(gain.device)
        # Y stays, (I, Q) is turned and scaled: RGB -> YIQ -> RGB is a sum of three fixed matrices.
        chroma = change.chroma.to(torch.complex64)
        weights = torch.stack([torch.ones_like(gain), chroma.real, chroma.imag], dim=1)
        with torch.autocast(basis.device.type, enabled=False):  # the caller's would round the matrix to bfloat16
            linear = torch.einsum("bk,kij->bij", weights, basis) * gain[:, None, None]
    return torch.cat([linear, offset.expand(-1, channels)[:, :, None]], dim=2)


_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def _build_yiq_basis() -> list[list[list[float]]]:
    """RGB matrices that keep luma, keep chroma, and turn chroma by 90 degrees."""
    forward = torch.tensor(_RGB_TO_YIQ, dtype=torch.float64)
    inverse = torch.linalg.inv(forward)
    luma = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    chroma = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    turn = torch.zeros(3, 3, dtype=torch.float64)
    turn[1, 2], turn[2, 1] = -1.0, 1.0
    return [[[float(e) for e in row] for row in inverse @ m @ forward] for m in (luma, chroma, turn)]


_YIQ_BASIS = _build_yiq_basis()


@kept
def _yiq_basis(device: torch.device) -> Tensor:
    """`_build_yiq_basis` as ``(3, 3, 3)``."""
    return torch.tensor(_YIQ_BASIS, dtype=torch.float32, device=device)
