"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al. 2020, arXiv 2002.05709).

Sides a and b are each other's positives; a local side is a positive of both.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import nt_xent
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, symmetric_pairs
from amimv.models.methods.settings import SimclrSettings


class Simclr(Method[SimclrSettings]):
    def __init__(self, backbone: nn.Module, settings: SimclrSettings) -> None:
        s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_out)
        super().__init__(s, Encoder(backbone, build_mlp(widths, norm=False, last_norm=False)))
        self.temperature = s.temperature

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        z = [gather_rows(side) for side in online(sides).z]
        ids = None if ids is None else gather_rows(ids)
        losses = [nt_xent(z[a], z[b], temperature=self.temperature, ids=ids) for a, b in symmetric_pairs(len(z))]
        return Outcome(torch.stack(losses).mean(), z[0])
