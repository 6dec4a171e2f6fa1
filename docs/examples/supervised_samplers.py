"""A sampler alone, for supervised training on a long tail: every class as often as every other.

With one image a "pair", the lists are of single images, and nothing else of this package is needed.
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from amimv.pipelines import PairSampler, load_store


def main(steps: int = 100) -> list[float]:
    store = load_store("phantom")
    images = store.gather(torch.arange(len(store))).permute(0, 3, 1, 2) / 255
    sampler = PairSampler(store.labels, 64, sampler="class-balanced", slots=1, seed=0)
    loader = DataLoader(TensorDataset(images, store.labels), batch_sampler=sampler)
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
    body = (nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
    network = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, store.n_classes))
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    losses: list[float] = []
    drawn = torch.zeros(store.n_classes, dtype=torch.int64)
    while len(losses) < steps:
        for batch, labels in loader:  # each pass is the next epoch
            loss = nn.functional.cross_entropy(network(batch), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            drawn += torch.bincount(labels, minlength=store.n_classes)
            if len(losses) == steps:
                break
    print(f"images of each class: {store.class_counts()}; of each drawn: {drawn.tolist()}")
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
