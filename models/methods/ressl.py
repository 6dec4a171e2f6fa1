"""ReSSL: relational self-supervised learning with weak augmentation (Zheng et al. 2021, arXiv 2107.09282).

The student's similarities to a queue of other images follow those of a moving-average teacher, which sees a weakly
augmented side. One way: the student sees side a and the teacher side b; local sides go to the student too.
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import average_loss, gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import ressl_loss
from amimv.models.memory import Queue
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides
from amimv.models.methods.settings import ResslSettings
from amimv.models.teacher import copy_teacher, cosine_momentum, update_teacher


class Ressl(Method[ResslSettings]):
    def __init__(self, backbone: nn.Module, settings: ResslSettings) -> None:
        s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_out)
        super().__init__(s, Encoder(backbone, build_mlp(widths, norm=False, last_norm=False)))
        self.teacher = copy_teacher(self.online)
        self.queue = Queue(s.queue, s.projector_out)

    def begin_step(self, step: int, total_steps: int) -> None:
        """The teacher moves by the step's momentum."""
        update_teacher(self.teacher, self.online, cosine_momentum(step, total_steps, self.settings.momentum))

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        s = self.settings
        side_a, side_b, *local = sides
        students = online([side_a, *local]).z
        with torch.no_grad():
            teacher = self.teacher([side_b]).z[0]
        queue = self.queue.rows.clone()  # the backward pass needs what is about to be overwritten
        losses = [
            ressl_loss(
                student,
                teacher,
                queue=queue,
                student_temperature=s.student_temperature,
                teacher_temperature=s.teacher_temperature,
            )
            for student in students
        ]
        loss = average_loss(torch.stack(losses).mean())
        self.queue.push(gather_rows(teacher))
        return Outcome(loss, students[0])
