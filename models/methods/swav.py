"""SwAV: unsupervised learning of visual features by contrasting cluster assignments (Caron et al. 2020, arXiv
2006.09882).

Each side predicts the other's code, its soft assignment to prototypes that uses all of them alike over the batch; a
queue of earlier embeddings helps where the batch has fewer rows than there are prototypes. Local sides predict both
codes.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import Prototypes, build_mlp
from amimv.models.losses import swav_loss
from amimv.models.memory import Queue
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, cross_pairs
from amimv.models.methods.settings import SwavSettings


class Swav(Method[SwavSettings]):
    def __init__(self, backbone: nn.Module, settings: SwavSettings) -> None:
        s = settings
        projector = build_mlp((feature_width(backbone), s.projector_hidden, s.projector_out), last_norm=False)
        prototypes = Prototypes(s.projector_out, s.prototypes)
        super().__init__(s, Encoder(backbone, projector, prototypes))
        self.prototypes = prototypes
        self.queue_a, self.queue_b = (Queue(s.queue, s.projector_out) for _ in range(2))
        self.uses_queue = False

    def begin_step(self, step: int, total_steps: int) -> None:
        """The prototypes' freeze and the queue's start are functions of the step."""
        self.prototypes.freeze(step < self.settings.freeze_prototypes * total_steps)
        self.uses_queue = step >= self.settings.queue_start * total_steps

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        s = self.settings
        embeddings = online(sides)
        queues = (self.queue_a, self.queue_b)
        scores = [gather_rows(p) for p in embeddings.p]
        with torch.no_grad():
            queued = [self.prototypes(queue.rows) if self.uses_queue else None for queue in queues]
        losses = [
            swav_loss(
                scores[a],
                scores[b],
                temperature=s.temperature,
                epsilon=s.epsilon,
                iterations=s.iterations,
                queued=queued[b],
            )
            for a, b in cross_pairs(len(scores))
        ]
        loss = torch.stack(losses).mean()
        z = [gather_rows(side.detach()) for side in embeddings.z[:2]]
        for queue, side in zip(queues, z, strict=True):
            queue.push(side)
        return Outcome(loss, z[0])
