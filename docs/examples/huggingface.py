"""A Hugging Face data set as an image store, and batches of pairs made of it on the device."""

import sys

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from torch import nn

from amimv.models.losses import nt_xent
from amimv.pipelines import ImageStore, PairLoader, load_store


def build_dataset(images: int = 640) -> Dataset:
    """Stands for `datasets.load_dataset(...)`."""
    phantom = load_store("phantom")
    pictures = [Picture.fromarray(pixels) for pixels in phantom.gather(torch.arange(images)).numpy()]
    features = Features({"image": Image(), "label": ClassLabel(names=list(phantom.class_names))})
    return Dataset.from_dict({"image": pictures, "label": phantom.labels[:images].tolist()}, features)


def main(steps: int = 100) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = ImageStore.from_dataset(build_dataset(), image="image", label="label", size=28, device=device)
    loader = PairLoader(store, "mimv", 64, sampler="class-balanced", seed=0)
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU())
    body = (nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
    network = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32)).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    losses: list[float] = []
    while len(losses) < steps:
        for pair in loader:  # each pass is the next epoch
            za, zb = (sum(map(network, side)) for side in pair.sides)
            loss = nt_xent(za, zb, ids=pair.indices[0])  # an image drawn twice is no negative of itself
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    print(f"{len(store)} images of {', '.join(store.class_names)}")
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
