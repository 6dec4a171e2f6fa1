"""DINO: emerging properties in self-supervised vision transformers (Caron et al. 2021, arXiv 2104.14294).

The student's distribution over prototypes follows that of a moving-average teacher on another side; the teacher sees
sides a and b, the student all (recipe `multi-crop` gives it small crops). Centring and a low temperature of the
teacher keep both from collapsing; the prototypes stay fixed at first.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import average, average_loss
from amimv.models.heads import Prototypes, build_mlp
from amimv.models.losses import dino_loss
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, cross_pairs
from amimv.models.methods.settings import DinoSettings
from amimv.models.teacher import copy_teacher, cosine_momentum, update_teacher


def warmup_temperature(step: int, total_steps: int, start: float, end: float, warmup: float) -> float:
    """The teacher's temperature at a step (from 0): a line from ``start`` to ``end`` over a share of the steps."""
    done = 1.0 if warmup == 0 else min(1.0, step / (warmup * total_steps))
    return start + (end - start) * done


class Dino(Method[DinoSettings]):
    centre: Tensor

    def __init__(self, backbone: nn.Module, settings: DinoSettings) -> None:
        s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_hidden, s.projector_out)
        projector = build_mlp(widths, norm=s.projector_norm, last_norm=False, activation=nn.GELU)
        for layer in projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        prototypes = Prototypes(s.projector_out, s.prototypes)
        super().__init__(s, Encoder(backbone, projector, prototypes))
        self.prototypes = prototypes
        self.teacher = copy_teacher(self.online)
        self.temperature = s.teacher_temperature
        self.register_buffer("centre", torch.zeros(s.prototypes))

    def begin_step(self, step: int, total_steps: int) -> None:
        """Teacher, its temperature and the prototypes' freeze are functions of the step."""
        s = self.settings
        update_teacher(self.teacher, self.online, cosine_momentum(step, total_steps, s.momentum))
        self.temperature = warmup_temperature(
            step, total_steps, s.teacher_temperature_start, s.teacher_temperature, s.teacher_temperature_warmup
        )
        self.prototypes.freeze(step < s.freeze_prototypes * total_steps)

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        s = self.settings
        embeddings = online(sides)
        with torch.no_grad():
            teacher = [scores.to(self.centre.dtype) for scores in self.teacher(sides[:2]).p]
        losses = [
            dino_loss(
                embeddings.p[a],
                teacher[b],
                centre=self.centre,
                student_temperature=s.student_temperature,
                teacher_temperature=self.temperature,
            )
            for a, b in cross_pairs(len(sides))
        ]
        loss = average_loss(torch.stack(losses).mean())
        self.centre.lerp_(average(torch.cat(teacher).mean(dim=0)), 1 - s.centre_momentum)
        return Outcome(loss, embeddings.z[0])
