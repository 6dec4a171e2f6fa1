"""Pairs in an Accelerate loop: the prepared `DataLoader` deals the sampler's batches out to the processes.

`accelerate launch accelerate_loop.py 200`, on any number of them; partners are of the anchor's own group.
"""

import sys
from itertools import count

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amimv.models.losses import info_nce
from amimv.pipelines import PairSampler, PairViews, load_store


def main(steps: int = 100) -> list[float]:
    accelerator = Accelerator()
    store = load_store("phantom")
    patients = torch.arange(len(store)) // 3  # phantom has none: every three images shall be of one
    sampler = PairSampler(len(store), 64, partner="same-group", groups=patients, seed=0)  # no label is read
    dataset = TensorDataset(store.gather(torch.arange(len(store))))
    views = PairViews("A(x) | A(y)", store.mean, store.std, seed=0).to(accelerator.device)
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
    body = (nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
    network = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32))
    network, optimiser, loader = accelerator.prepare(
        network,
        torch.optim.AdamW(network.parameters(), 2e-3),
        DataLoader(dataset, batch_sampler=sampler),
    )
    losses: list[float] = []
    for _epoch in count():
        for (images,) in loader:
            (a,), (b,) = views(*sampler.unflatten(images))
            za, zb = network(torch.cat([a, b])).chunk(2)
            loss = (info_nce(za, zb) + info_nce(zb, za)) / 2
            optimiser.zero_grad()
            accelerator.backward(loss)
            optimiser.step()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if len(losses) == steps:
                accelerator.print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")
                return losses
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
