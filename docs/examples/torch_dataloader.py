"""A plain torch loop over a `DataLoader`: the sampler chooses the pairs, the views are made of the batch.

It stops within an epoch and goes on from its checkpoint, as if it had never stopped.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from amimv.models.losses import nt_xent
from amimv.pipelines import ImageStore, PairSampler, PairViews, load_store


class Images(Dataset):
    def __init__(self, store: ImageStore) -> None:
        self.images = store.gather(torch.arange(len(store)))

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def train(until: int, checkpoint: Path) -> list[float]:
    torch.manual_seed(0)
    store = load_store("phantom")
    sampler = PairSampler(store.labels, 64, sampler="square-root", partner="class-balanced", seed=0)
    views = PairViews("amimv", store.mean, store.std, seed=0)
    stem = (nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
    body = (nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
    network = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32))
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    parts = {"network": network, "optimiser": optimiser, "views": views, "sampler": sampler}
    if checkpoint.exists():
        state = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    losses: list[float] = []
    while True:
        for images in DataLoader(Images(store), batch_sampler=sampler):  # first the rest of an epoch
            a, b = views(*sampler.unflatten(images))
            loss = nt_xent(sum(map(network, a)), sum(map(network, b)))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            if views.step >= until:
                torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
                return losses


def main(steps: int = 100, checkpoint: str = "checkpoint.pt") -> list[float]:
    losses = train(steps // 2, Path(checkpoint)) + train(steps, Path(checkpoint))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps, half of them before {checkpoint} was saved")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
