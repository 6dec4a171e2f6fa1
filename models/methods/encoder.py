"""What every method is made of: a backbone and a projector, run once per view."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from amimv.models.backbones import encode

Sides = Sequence[Sequence[Tensor]]
Embed = Callable[[list[Tensor]], list[Tensor]]


class Encoder(nn.Module):
    """Backbone and projector. Takes all views at once, so that `DistributedDataParallel` sees one forward pass, but
    runs them one after the other: each has its own BatchNorm statistics."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        """``(B, C, H, W)`` views of any sizes to as many ``(B, D)`` embeddings."""
        return [self.projector(encode(self.backbone, view)) for view in views]


def embed_sides(embed: Embed, sides: Sides) -> list[Tensor]:
    """Per side the sum of its views' embeddings, ``(B, D)``."""
    embeddings = iter(embed([view for side in sides for view in side]))
    return [sum((next(embeddings) for _ in side[1:]), start=next(embeddings)) for side in sides]
