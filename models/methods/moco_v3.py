"""MoCo v3: an empirical study of training self-supervised vision transformers (Chen et al. 2021, arXiv 2104.02057).

Queries of the online network (with a predictor) against keys of a moving-average target, both ways; negatives are
the rest of the batch. A ViT's random patch embedding stays as it is, which keeps its training stable (section 4).
"""

import torch
from torch import Tensor, nn

from amimv.models.backbones import feature_width
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.losses import info_nce
from amimv.models.methods.base import Encoder, Method, Online, Outcome, Sides, cross_pairs
from amimv.models.methods.settings import MocoV3Settings
from amimv.models.teacher import copy_teacher, cosine_momentum, update_teacher


class MocoV3(Method[MocoV3Settings]):
    def __init__(self, backbone: nn.Module, settings: MocoV3Settings) -> None:
        s = settings
        patches = getattr(backbone, "patch_embed", None)
        # The published code gives ViTs a deeper projector, and a norm at the predictor's end.
        hidden = (s.projector_hidden,) * (1 if patches is None else 2)
        projector = build_mlp((feature_width(backbone), *hidden, s.projector_out), last_affine=False)
        widths = (s.projector_out, s.predictor_hidden, s.projector_out)
        predictor = build_mlp(widths, last_norm=patches is not None, last_affine=False)
        super().__init__(s, Encoder(backbone, projector, predictor))
        self.teacher = copy_teacher(Encoder(backbone, projector))
        if patches is not None and s.freeze_patch_embedding:
            getattr(patches, "proj", patches).requires_grad_(False)

    def begin_step(self, step: int, total_steps: int) -> None:
        """The target moves by the step's momentum."""
        update_teacher(self.teacher, self.online, cosine_momentum(step, total_steps, self.settings.momentum))

    def loss(self, online: Online, sides: Sides, ids: Tensor | None) -> Outcome:
        """Of two sides the sum over both ways, as published; with local sides twice the mean over all pairs."""
        embeddings = online(sides)
        queries = [gather_rows(p) for p in embeddings.p]
        with torch.no_grad():
            keys = [gather_rows(z) for z in self.teacher(sides[:2]).z]
        ids = None if ids is None else gather_rows(ids)
        temperature = self.settings.temperature
        losses = [
            info_nce(queries[a], keys[b], temperature=temperature, ids=ids) for a, b in cross_pairs(len(queries))
        ]
        return Outcome(2 * (2 * temperature) * torch.stack(losses).mean(), gather_rows(embeddings.z[0].detach()))
