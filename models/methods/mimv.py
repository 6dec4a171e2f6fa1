"""MIMV: multi-image, multi-view pairs against a moving-average target (arXiv 2509.08469).

On the recipe `mimv` this is the published method; on the ``amimv-*`` recipes it is AMIMV (arXiv 2604.01947) in this
project's readings. The online network sees side a and the target side b, one way; local sides go to the online
network too, each against the same target.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import mimv_loss
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides
from amimv.models.methods.settings import MimvSettings
from amimv.models.teacher import copy_teacher, update_teacher


class Mimv(Method[MimvSettings]):
    def __init__(self, backbone: nn.Module, settings: MimvSettings) -> None:
        s = settings
        width = feature_width(backbone)
        hidden = s.projector_hidden or width
        projector = build_mlp((width, hidden, hidden, s.projector_out or width // 4))
        super().__init__(s, Encoder(backbone, projector, shared_norm=s.shared_norm))
        self.teacher = copy_teacher(self.online)

    def begin_step(self, step: int, total_steps: int) -> None:
        """The target moves just before each optimiser step's forward pass."""
        update_teacher(self.teacher, self.online, self.settings.momentum)

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        side_a, side_b, *local = sides
        embeddings = [gather_rows(z) for z in online([side_a, *local]).z]
        with torch.no_grad():
            target = gather_rows(self.teacher([side_b]).z[0])
        ids = None if ids is None else gather_rows(ids)
        s = self.settings
        losses = [
            mimv_loss(
                z,
                target,
                temperature=s.temperature,
                self_term=s.self_term,
                high=s.high,
                low=s.low,
                near_zero=s.near_zero,
                spare_positives=s.spare_positives,
                average=s.average,
                ids=ids,
            )
            for z in embeddings
        ]
        return Outcome(torch.stack(losses).mean(), embeddings[0])
