"""SimCLR with a temperature schedule, for long-tailed data (Kukleva et al. 2023, arXiv 2303.13664).

A low temperature tells images apart, a high one gathers groups of them; the schedule goes from one to the other and
back, so that rare and frequent classes both get their share.
"""

import math

from torch import nn

from amimv.models.methods.settings import SimclrTsSettings
from amimv.models.methods.simclr import Simclr


def swinging_temperature(step: int, total_steps: int, low: float, high: float, periods: float) -> float:
    """Temperature at a step (from 0): a cosine from ``high`` down to ``low`` and back, ``periods`` times."""
    return low + (high - low) * (1 + math.cos(2 * math.pi * periods * step / total_steps)) / 2


class SimclrTs(Simclr):
    def __init__(self, backbone: nn.Module, settings: SimclrTsSettings) -> None:
        super().__init__(backbone, settings)
        self.schedule = (settings.temperature, settings.highest_temperature, settings.periods)

    def begin_step(self, step: int, total_steps: int) -> None:
        """The temperature is a function of the step."""
        self.temperature = swinging_temperature(step, total_steps, *self.schedule)
