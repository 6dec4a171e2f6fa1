"""Schedules: functions of the optimiser step, so that nothing has to be saved or prepared."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate at a step (from 0): linear warm-up, then a cosine to 0.

    The first of ``warmup_steps`` is at ``1 / warmup_steps`` of the peak, the step after them at the peak
    (SGDR, Loshchilov and Hutter 2017, equation 5, without restarts; the linear warm-up of Goyal et al. 2017).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
