"""Constants of a device: built once, and not at every batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
#: By the function that built it and its arguments, the device among them.
KEPT: dict[tuple[object, ...], Tensor] = {}


def kept(build: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The same function, which builds once what it is asked for again.

    Not in a compiled graph, which keeps its own: in CUDA graphs its memory is written again.
    """

    @wraps(build)
    def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        import torch

        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        key = (build, *args)
        if key not in KEPT:
            KEPT[key] = build(*args, **kwargs)
        return KEPT[key]

    return get
