"""Views per second of the pair loader, beside torchvision's PIL transforms in a ``DataLoader``, in one run.

``python tools/profile_throughput.py``: two SimCLR views per image (crop, flip, jitter, grey, blur, normalise) on both
sides; the whole `PairLoader` is measured: sampling, drawing and rendering. Where operations differ: torchvision
shuffles the order of the jitter, takes contrast's pivot from each image, and turns hue in HSV.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from amimv import InputError, run_command
from amimv.pipelines import HARD, ImageStore, PairLoader, get_recipe, load_store
from amimv.pipelines.params import blur_window
from amimv.trainers.data import describe_data


@dataclass(frozen=True)
class ProfileSettings:
    data: str = "phantom"
    """phantom, a 2-D MedMNIST name or the path of an .npz"""
    size: int = 0
    """of the images, in pixels; 0: 28, or what an .npz has"""
    root: str = ""
    """folder of MedMNIST's files"""
    batch_size: int = 256
    """images per batch; each gives two views"""
    workers: int = 2
    """of torchvision's DataLoader (persistent and warmed)"""
    repeats: int = 7
    """timed repeats of each; the median is shown"""
    seconds: float = 1.5
    """length of a repeat, at least"""


class PilViews(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two SimCLR views of each image by torchvision's transforms of PIL images."""

    def __init__(self, store: ImageStore) -> None:
        from torchvision import transforms

        jitter = transforms.ColorJitter(HARD.brightness, HARD.contrast, HARD.saturation, HARD.hue)
        blur = transforms.GaussianBlur(blur_window(store.size), HARD.blur_sigma)
        self.images = store.images.cpu().numpy()
        self.view = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomResizedCrop(store.size, HARD.crop, HARD.ratio),
                transforms.RandomHorizontalFlip(HARD.hflip),
                transforms.RandomApply([jitter], HARD.jitter_p),
                transforms.RandomGrayscale(HARD.grey_p),
                transforms.RandomApply([blur], HARD.blur_p),
                transforms.ToTensor(),
                transforms.Normalize(store.mean, store.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return self.view(image), self.view(image)


def endless(loader: PairLoader) -> Iterator[int]:
    """Views handed out, batch by batch, epoch after epoch."""
    epoch = 0
    while True:
        for pair in loader.epoch(epoch):
            yield sum(len(view) for side in pair.sides for view in side)
        epoch += 1


def endless_pil(store: ImageStore, settings: ProfileSettings) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        PilViews(store),
        settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        drop_last=True,
    )
    while True:
        for first, second in loader:
            yield len(first) + len(second)


def measure(batches: Iterator[int], settings: ProfileSettings, wait: Callable[[], None]) -> list[float]:
    """Views per second of each repeat, after a warm-up of one repeat."""
    rates = []
    for _ in range(settings.repeats + 1):
        views, started = 0, time.perf_counter()
        while time.perf_counter() - started < settings.seconds:
            views += next(batches)
        wait()
        rates.append(views / (time.perf_counter() - started))
    return rates[1:]


def profile(settings: ProfileSettings) -> None:
    """Measure each in turn and print one table."""
    s = settings
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = load_store(s.data, size=s.size or None, root=s.root or None, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows = {f"torchvision PIL, DataLoader, {s.workers} workers": endless_pil(store, s)}
    for backend in ("kornia", "dali"):
        loader = PairLoader(store, get_recipe("two-view"), s.batch_size, backend=backend)
        rows[f"amimv PairLoader, {backend}"] = endless(loader)
    title = (
        f"{describe_data(store)}, {store.size} px, batch {s.batch_size}, two views, {device}, {os.cpu_count()} cores"
    )
    table = Table("pipeline", "views/s, median", "quartiles", "ratio", title=title, title_justify="left")
    base = 0.0
    for name, batches in rows.items():
        try:
            rates = measure(batches, s, wait)
        except InputError as error:
            table.add_row(name, "skipped", str(error), "")
            continue
        median = statistics.median(rates)
        low, _, high = statistics.quantiles(rates, n=4)
        base = base or median
        table.add_row(name, f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{median / base:.1f}x")
    Console(width=120).print(table)


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 input that cannot be used)."""
    run_command(lambda: profile(tyro.cli(ProfileSettings, prog="profile_throughput.py", description=__doc__)))


if __name__ == "__main__":
    main()
