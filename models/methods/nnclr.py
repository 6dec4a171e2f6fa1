"""NNCLR: with a little help from my friends (Dwibedi et al. 2021, arXiv 2104.14548).

The positive of a side's prediction is the nearest neighbour, in a queue, of the other side's projection, both ways.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import nnclr_loss
from amimv.models.memory import Queue
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, cross_pairs
from amimv.models.methods.settings import NnclrSettings


class Nnclr(Method[NnclrSettings]):
    def __init__(self, backbone: nn.Module, settings: NnclrSettings) -> None:
        s = settings
        projector = build_mlp((feature_width(backbone), s.projector_hidden, s.projector_hidden, s.projector_out))
        predictor = build_mlp((s.projector_out, s.predictor_hidden, s.projector_out), last_norm=False)
        super().__init__(s, Encoder(backbone, projector, predictor))
        self.queue = Queue(s.queue, s.projector_out)

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        """Side a's projections go to the queue afterwards."""
        embeddings = online(sides)
        z = [gather_rows(side) for side in embeddings.z[:2]]
        p = [gather_rows(side) for side in embeddings.p]
        ids = None if ids is None else gather_rows(ids)
        losses = [
            nnclr_loss(z[b], p[a], queue=self.queue.rows, temperature=self.settings.temperature, ids=ids)
            for a, b in cross_pairs(len(p))
        ]
        loss = torch.stack(losses).mean()
        self.queue.push(z[0])
        return Outcome(loss, z[0])
