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
from amimv.models.methods.encoder import Encoder, Online, Sides, symmetric_pairs
from amimv.models.methods.settings import VicregSettings


class Vicreg(nn.Module):
    def __init__(self, backbone: nn.Module, settings: VicregSettings) -> None:
        super().__init__()
        self.settings = s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_hidden, s.projector_out)
        self.online = Encoder(backbone, build_mlp(widths, last_norm=False))

    def begin_step(self, step: int, total_steps: int) -> None:
        """Nothing moves but the weights."""

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scalar loss of the global micro-batch, and the embeddings ``(B, D)`` of side a."""
        s = self.settings
        z = [gather_rows(side) for side in online(sides).z]
        losses = [
            vicreg_loss(z[a], z[b], invariance=s.invariance, variance=s.variance, covariance=s.covariance)
            for a, b in symmetric_pairs(len(z))
        ]
        return torch.stack(losses).mean(), z[0]
