"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al. 2021, arXiv 2103.03230).

The cross-correlation of the dimensions of sides a and b, over the batch, is drawn to the identity. No negatives, no
teacher; a local side is paired with both.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import barlow_twins_loss
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, symmetric_pairs
from amimv.models.methods.settings import BarlowTwinsSettings


class BarlowTwins(Method[BarlowTwinsSettings]):
    def __init__(self, backbone: nn.Module, settings: BarlowTwinsSettings) -> None:
        s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_hidden, s.projector_out)
        super().__init__(s, Encoder(backbone, build_mlp(widths, last_norm=False)))

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        s = self.settings
        z = [gather_rows(side) for side in online(sides).z]
        losses = [
            barlow_twins_loss(z[a], z[b], redundancy=s.redundancy, scale=s.loss_scale)
            for a, b in symmetric_pairs(len(z))
        ]
        return Outcome(torch.stack(losses).mean(), z[0])
