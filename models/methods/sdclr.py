"""SDCLR: self-damaging contrastive learning (Jiang et al. 2021, arXiv 2106.02990), for long-tailed data.

Side a goes through the network, side b (and local sides) through its pruned twin: the same weights without the
smallest ones, with norms of its own. Images that the twin has forgotten, rare ones first, agree least and so weigh
most in the loss, which is SimCLR's.
"""

import copy
import math

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.func import functional_call

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import nt_xent
from amimv.models.methods.base import Embeddings, Encoder, Method, Online, Outcome, Sides
from amimv.models.methods.settings import SdclrSettings

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, RmsNorm)


class EncoderWithTwin(Encoder):
    """Side a through the encoder, all others through the twin, which shares all parameters but the norms'."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__(backbone, projector)
        own = {id(p) for module in self.modules() if isinstance(module, NORMS) for p in module.parameters()}
        shared = {id(p): p for p in self.parameters() if id(p) not in own}
        self.twin = copy.deepcopy(Encoder(backbone, projector), shared)
        kinds = (nn.Conv2d, nn.Linear)
        layers = [name for name, module in backbone.named_modules() if isinstance(module, kinds)]
        self.prunable = [f"backbone.{name}.weight" for name in layers]
        self.masks = nn.Module()
        for i, name in enumerate(self.prunable):
            self.masks.register_buffer(str(i), torch.ones_like(self.get_parameter(name), dtype=torch.bool))

    @torch.no_grad()
    def prune(self, share: float) -> None:
        """Mask that share of the twin's prunable weights, the smallest of all layers together."""
        sizes = [self.get_parameter(name).abs() for name in self.prunable]
        everything = torch.cat([size.flatten() for size in sizes])
        dropped = min(math.ceil(share * len(everything)), len(everything) - 1)
        threshold = everything.kthvalue(dropped + 1).values
        for mask, size in zip(self.masks.buffers(), sizes, strict=True):
            mask.copy_(size >= threshold)

    def forward(self, sides: Sides) -> Embeddings:
        """Sides of ``(B, C, H, W)`` views of any sizes to their embeddings."""
        masks = zip(self.prunable, self.masks.buffers(), strict=True)
        pruned = {name: self.get_parameter(name) * mask for name, mask in masks}
        z = super().forward(sides[:1]).z + functional_call(self.twin, pruned, (sides[1:],), tie_weights=False).z
        return Embeddings(z, z)


class Sdclr(Method[SdclrSettings]):
    online: EncoderWithTwin

    def __init__(self, backbone: nn.Module, settings: SdclrSettings) -> None:
        s = settings
        widths = (feature_width(backbone), s.projector_hidden, s.projector_hidden, s.projector_out)
        super().__init__(s, EncoderWithTwin(backbone, build_mlp(widths)))

    def begin_step(self, step: int, total_steps: int) -> None:
        """The twin loses other weights every so often."""
        if step % max(1, round(self.settings.prune_every * total_steps)) == 0:
            self.online.prune(self.settings.pruned)

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        za, *others = (gather_rows(side) for side in online(sides).z)
        ids = None if ids is None else gather_rows(ids)
        losses = [nt_xent(za, z, temperature=self.settings.temperature, ids=ids) for z in others]
        return Outcome(torch.stack(losses).mean(), za)
