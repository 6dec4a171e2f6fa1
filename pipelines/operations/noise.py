"""Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from amimv.fields import setting
from amimv.pipelines.operations.base import Examples, Pixels, Source, on_host, per_sample, spread
from amimv.pipelines.rng import Key, Stream, hashes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Noise(Pixels):
    """Gaussian noise of a strength of each sample's own, another number for every value, clamped to [0, 1].

    The numbers come from the counter-based generator, so that they are a function of place, too. No DALI form: its
    generator gives others.
    """

    lane, uniforms = 22, 3
    examples: ClassVar[Examples] = {"noise": {"noise_p": 1.0, "noise_std": (0.1, 0.2)}}
    noise_p: float = setting(0.0, "probability of Gaussian noise", 0, 1)
    noise_std: tuple[float, float] = setting(
        (0.01, 0.1), "smallest and largest deviation of the noise, in [0, 1]", 0, 1
    )

    @property
    def active(self) -> bool:
        return self.noise_p > 0

    def soft(self) -> Self:
        """Half the deviations, as often."""
        low, high = self.noise_std
        return type(self)(self.noise_p, (low / 2, high / 2))

    def draw(self, u: Sequence[Tensor], source: Source) -> Tensor:
        """``(B, 2)``: deviation, 0 where it is not drawn, and a seed, one of ``2**24`` numbers in [0, 1)."""
        import torch

        return torch.stack([torch.where(u[0] < self.noise_p, spread(u[1], self.noise_std), 0.0), u[2]], dim=1)

    @staticmethod
    def apply(images: Tensor, drawn: Tensor) -> Tensor:
        """On a CPU only the images that get any noise are touched, in place."""
        if on_host(images):
            noisy = (drawn[:, 0] > 0).nonzero().squeeze(1)
            part = _add_noise(images.index_select(0, noisy), drawn.index_select(0, noisy))
            return images.index_copy_(0, noisy, part)
        return _add_noise(images, drawn)


def _add_noise(images: Tensor, drawn: Tensor) -> Tensor:
    import torch

    std, seed = drawn.unbind(1)
    values = images[0].numel()
    # One hash makes two numbers, and they two normal ones (Box and Muller 1958).
    places = torch.arange((values + 1) // 2, device=images.device)
    step = (seed * 2**24).long()[:, None].expand(-1, len(places))
    bits = hashes(Key(0, Stream.NOISE, step=step), places.expand_as(step), 1)[:, :, 0]
    u, v = (((bits >> shift) & 0xFFFFFF).float() * 2.0**-24 for shift in (8, 36))
    radius, angle = (-2 * (1 - u).log()).sqrt(), 2 * math.pi * v
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :values]
    return images.addcmul_(normal.view_as(images), per_sample(std)).clamp_(0, 1)
