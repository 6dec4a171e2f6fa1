"""What every method owes the training, and what all are made of: an encoder that is run once per view."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import encode
from amimv.models.methods.settings import MethodSettings

#: A method's own settings.
Own = TypeVar("Own", bound=MethodSettings)
Sides = Sequence[Sequence[Tensor]]


class Embeddings(NamedTuple):
    """Of each side: the sum of its views' projections, and what the head makes of it.

    Attributes:
        z: per side ``(B, D)``.
        p: per side the head's output (predictions or scores); without a head it is ``z``.
    """

    z: list[Tensor]
    p: list[Tensor]


Online = Callable[[Sides], Embeddings]


class Encoder(nn.Module):
    """Backbone and projector, and a head (predictor, prototypes) if the method has one.

    Takes all sides at once, so that `DistributedDataParallel` sees one forward pass, but runs the views one after the
    other: each has its own BatchNorm statistics. With ``shared_norm`` a side's views are one batch with one set of
    statistics, and must have the same size. The head sees a side's summed embedding.
    """

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, head: nn.Module | None = None, *, shared_norm: bool = False
    ) -> None:
        super().__init__()
        self.shared_norm = shared_norm
        self.backbone = backbone
        self.projector = projector
        self.head = head

    def no_weight_decay(self) -> set[str]:
        """What timm's optimisers leave out of the weight decay besides biases and norms, such as a ViT's positions."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in names}

    def forward(self, sides: Sides) -> Embeddings:
        """Sides of ``(B, C, H, W)`` views of any sizes to their embeddings.

        With ``shared_norm`` an `InputError` if the views of one side differ in size.
        """
        z = [self._embed(side) for side in sides]
        return Embeddings(z, z if self.head is None else [self.head(side) for side in z])

    def _embed(self, side: Sequence[Tensor]) -> Tensor:
        if self.shared_norm:
            first, *others = self._project(_concatenate(side)).chunk(len(side))
        else:
            first, *others = (self._project(view) for view in side)
        return sum(others, start=first)

    def _project(self, views: Tensor) -> Tensor:
        z: Tensor = self.projector(encode(self.backbone, views))
        return z


def _concatenate(side: Sequence[Tensor]) -> Tensor:
    """``(V * B, C, H, W)`` of V views."""
    shapes = sorted({tuple(view.shape) for view in side})
    if len(shapes) > 1:
        listed = " and ".join(map(str, shapes))
        raise InputError(f"shared_norm: views of one side have shapes {listed}, expected one; leave shared_norm off")
    return torch.cat(list(side))


class Outcome(NamedTuple):
    """What a method makes of a micro-batch.

    Attributes:
        loss: scalar, of the global micro-batch.
        embeddings: ``(B, D)`` of side a, of this process or gathered from all; what is measured of them is logged.
    """

    loss: Tensor
    embeddings: Tensor


class Method(nn.Module, ABC, Generic[Own]):
    """What is done with the sides of a pair. Its state is checkpointed; built as ``Kind(backbone, settings)``.

    Attributes:
        settings: the method's own.
        online: what is optimised, and wrapped for many processes: all that learns is in it.
    """

    def __init__(self, settings: Own, online: Encoder) -> None:
        super().__init__()
        self.settings = settings
        self.online = online

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before each optimiser step (from 0): moves the teacher and sets what follows a schedule, as a
        function of the step. Here nothing moves but the weights.
        """

    @abstractmethod
    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        """Called for each micro-batch; nothing in it may wait for the device.

        Args:
            online: `Method.online`, possibly wrapped; called once.
            sides: a and b, then local ones: views ``(B, C, H, W)``, normalised.
            ids: ``(B,)`` image of each row: others of the same image are not its negatives; None: they are.
        """


def cross_pairs(sides: int) -> list[tuple[int, int]]:
    """(online side, target side): every side against sides a and b (0 and 1), itself left out."""
    return [(online, target) for target in (0, 1) for online in range(sides) if online != target]


def symmetric_pairs(sides: int) -> list[tuple[int, int]]:
    """Pairs of sides for a loss that does not tell them apart: a with b, and every local side with both."""
    return [(0, 1), *((local, target) for local in range(2, sides) for target in (0, 1))]
