"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al. 2020, arXiv 2002.05709).

Sides a and b are each other's positives; a local side is a positive of both.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import nt_xent
from amimv.models.methods.encoder import Encoder, Online, Sides, symmetric_pairs
from amimv.models.methods.settings import SimclrSettings


class Simclr(nn.Module):
    def __init__(self, backbone: nn.Module, settings: SimclrSettings) -> None:
        super().__init__()
        self.settings = settings
        self.temperature = settings.temperature
        widths = (feature_width(backbone), settings.projector_hidden, settings.projector_out)
        self.online = Encoder(backbone, build_mlp(widths, norm=False, last_norm=False))

    def begin_step(self, step: int, total_steps: int) -> None:
        """Nothing moves but the weights."""

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scalar loss of the global micro-batch, and the embeddings ``(B, D)`` of side a."""
        z = [gather_rows(side) for side in online(sides).z]
        ids = None if ids is None else gather_rows(ids)
        losses = [nt_xent(z[a], z[b], temperature=self.temperature, ids=ids) for a, b in symmetric_pairs(len(z))]
        return torch.stack(losses).mean(), z[0]
