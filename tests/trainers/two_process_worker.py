"""Run under torchrun or alone: the first batch of every sampler, and first losses and gradients, to a file."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.methods import METHODS
from amimv.pipelines import SAMPLERS, PairLoader, get_recipe, load_store


def build_loader(data: str, accelerator: Accelerator, sampler: str) -> PairLoader:
    store = load_store(data)
    loader = PairLoader(
        store,
        get_recipe("amimv"),
        16,
        sampler,
        partner=sampler,
        epochs=3,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    loader.set_clusters(store.labels.clone())
    return loader


def main(data: str, folder: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    result: dict = {"processes": accelerator.num_processes, "pairs": {}}
    for sampler in SAMPLERS:
        loader = build_loader(data, accelerator, sampler)
        # (steps x slots, this rank's share of each batch)
        result["pairs"][sampler] = torch.cat([pair.indices for pair in loader.epoch(1)])
    pair = next(iter(build_loader(data, accelerator, "class-balanced").epoch(1)))
    for name in ("mimv", "simclr"):
        method_class = METHODS[name]
        torch.manual_seed(0)
        method = method_class.build(build_backbone(BackboneSpec("test_vit", size=28)), method_class.settings())
        width = method.online.backbone.num_features
        method.online.projector = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32))
        if hasattr(method, "teacher"):
            method.teacher.projector = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32))
            method.teacher.load_state_dict(method.online.state_dict())
        online = accelerator.prepare(method.online)
        loss, _ = method.loss(online, pair.sides, pair.indices[0])
        accelerator.backward(loss)
        gradients = {n: p.grad.clone() for n, p in method.online.named_parameters() if p.grad is not None}
        result[name] = {"loss": loss.detach(), "gradients": gradients}
    torch.save(result, Path(folder) / f"{accelerator.num_processes}-{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
