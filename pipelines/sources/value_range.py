"""What stored values become 0 and 1."""

import math
from collections.abc import Sequence

from amimv import InputError


def check_range(value_range: Sequence[float] | None) -> tuple[float, float] | None:
    """The lowest and the highest value of a range, if there is one.

    Raises:
        InputError: unless they are two finite numbers, the lower one first.
    """
    if value_range is None:
        return None
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise InputError(f"value_range is {value_range}, expected two numbers (low, high) with low < high")
    return low, high
