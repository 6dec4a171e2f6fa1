"""SimSiam: exploring simple siamese representation learning (Chen and He 2021, arXiv 2011.10566).

One network with a predictor; each side predicts the other's embedding, which gets no gradient. No negatives and no
teacher.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import average_loss
from amimv.models.heads import build_mlp
from amimv.models.losses import simsiam_loss
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, cross_pairs
from amimv.models.methods.settings import SimsiamSettings


class Simsiam(Method[SimsiamSettings]):
    def __init__(self, backbone: nn.Module, settings: SimsiamSettings) -> None:
        s = settings
        hidden = (s.projector_hidden, s.projector_hidden)
        projector = build_mlp((feature_width(backbone), *hidden, s.projector_out), last_affine=False)
        predictor = build_mlp((s.projector_out, s.predictor_hidden, s.projector_out), last_norm=False)
        super().__init__(s, Encoder(backbone, projector, predictor))

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        z, p = online(sides)
        losses = [simsiam_loss(p[a], z[b].detach()) for a, b in cross_pairs(len(sides))]
        return Outcome(average_loss(torch.stack(losses).mean()), z[0])
