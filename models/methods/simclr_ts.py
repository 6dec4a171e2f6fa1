"""SimCLR with a temperature schedule, for long-tailed data (Kukleva et al. 2023, arXiv 2303.13664).

A low temperature tells images apart, a high one gathers groups of them; the schedule goes from one to the other and
back, so that rare and frequent classes both get their share.
"""

import math
from dataclasses import dataclass

from torch import nn

from amimv.models.methods.simclr import Simclr, SimclrSettings


@dataclass(frozen=True)
class SimclrTsSettings(SimclrSettings):
    temperature: float = 0.1
    """the lowest, of the cosine similarities"""
    highest_temperature: float = 1.0
    """where the schedule starts, and comes back to"""
    periods: float = 5.0
    """how often it does so in the training"""
    projector_hidden: int = 512
    """width of the projector's hidden layer"""
    projector_out: int = 128
    """width of the embedding"""


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
