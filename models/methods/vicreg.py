"""VICReg: variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv 2105.04906).

Sides a and b are drawn together, while every dimension keeps its variance and dimensions stay uncorrelated. No
negatives, no teacher; a local side is paired with both.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import vicreg_loss
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, symmetric_pairs
from amimv.models.methods.settings import VicregSettings


class Vicreg(Method[VicregSettings]):
    def __init__(self, backbone: nn.Module, settings: VicregSettings) -> None:
        s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_hidden, s.projector_out)
        super().__init__(s, Encoder(backbone, build_mlp(widths, last_norm=False)))

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        s = self.settings
        z = [gather_rows(side) for side in online(sides).z]
        losses = [
            vicreg_loss(z[a], z[b], invariance=s.invariance, variance=s.variance, covariance=s.covariance)
            for a, b in symmetric_pairs(len(z))
        ]
        return Outcome(torch.stack(losses).mean(), z[0])
