"""BYOL: bootstrap your own latent (Grill et al. 2020, arXiv 2006.07733).

The online network, with a predictor, predicts a moving-average target's embedding of the other side, both ways. No
negatives.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import average_loss
from amimv.models.heads import build_mlp
from amimv.models.losses import byol_loss
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, cross_pairs
from amimv.models.methods.settings import ByolSettings
from amimv.models.teacher import copy_teacher, cosine_momentum, update_teacher


class Byol(Method[ByolSettings]):
    def __init__(self, backbone: nn.Module, settings: ByolSettings) -> None:
        s = settings
        projector = build_mlp((feature_width(backbone), s.projector_hidden, s.projector_out), last_norm=False)
        predictor = build_mlp((s.projector_out, s.predictor_hidden, s.projector_out), last_norm=False)
        super().__init__(s, Encoder(backbone, projector, predictor))
        self.teacher = copy_teacher(Encoder(backbone, projector))

    def begin_step(self, step: int, total_steps: int) -> None:
        """The target moves by the step's momentum."""
        update_teacher(self.teacher, self.online, cosine_momentum(step, total_steps, self.settings.momentum))

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        """Of two sides the sum over both ways, as published; with local sides twice the mean over all pairs."""
        embeddings = online(sides)
        with torch.no_grad():
            targets = self.teacher(sides[:2]).z
        losses = [byol_loss(embeddings.p[a], targets[b]) for a, b in cross_pairs(len(sides))]
        return Outcome(average_loss(2 * torch.stack(losses).mean()), embeddings.z[0])
