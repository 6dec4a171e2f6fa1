"""How the cost of a batch grows: with its size, the images' size, the data set's size and the slots of a pair."""

from pathlib import Path
from typing import NamedTuple

import torch

from amimv.pipelines import ImageStore, PairLoader, get_recipe, load_store
from amimv.tools.throughput.measure import held_memory
from amimv.tools.throughput.stages import run_epochs

BATCH_SIZES = (64, 128, 256, 512, 1024, 2048)
SIZES = (28, 48, 64, 96, 128)
IMAGES = (3_000, 10_000, 30_000, 100_000)
PARTNERS = (1, 2, 3, 4)
BATCH = 256
EPOCH = 30_000
MEMORY_EPOCHS = (20, 200)


class ScaleRow(NamedTuple):
    """One measurement: what was varied, its value, milliseconds per batch, and microseconds per unit.

    The unit is a view, for sizes a thousand pixels of the views, so that linear cost is a constant.
    """

    axis: str
    value: int
    milliseconds: float
    microseconds_per_unit: float


def measure_batch(store: ImageStore, recipe: str, batch_size: int, seconds: float, partners: int = 1) -> float:
    """Seconds per batch of the `kornia` backend, sampler and all."""
    pairs = PairLoader(store, get_recipe(recipe, partners=partners), batch_size)
    run_epochs(pairs, 0.0)
    return run_epochs(pairs, seconds)[1]


def repeated(store: ImageStore, images: int) -> ImageStore:
    """A store of so many images: the given ones, again and again."""
    return store.subset(torch.arange(images, device=store.device) % len(store))


def measure_scaling(data: str, root: str | None, device: torch.device | str, seconds: float) -> list[ScaleRow]:
    """Vary one thing at a time from batches of 256 `two-view` pairs; other sizes than the data's are of `phantom`.

    The data set is repeated to 30,000 images, so that what an epoch costs is spread over as many batches as usual.
    Slots are varied with the recipe `mimv`: each partner adds a normalised and an augmented view.
    """
    loaded = load_store(data, root=root, device=device)
    store = repeated(loaded, EPOCH)
    rows = []

    def add(axis: str, value: int, per_batch: float, units: float) -> None:
        rows.append(ScaleRow(axis, value, 1e3 * per_batch, 1e6 * per_batch / units))

    for batch in BATCH_SIZES:
        add("batch size", batch, measure_batch(store, "two-view", batch, seconds), 2 * batch)
    for size in SIZES:
        sized = repeated(load_store("phantom", size=size, device=device), EPOCH // 4)
        add("image size", size, measure_batch(sized, "two-view", BATCH, seconds), 2 * BATCH * size**2 / 1000)
    for images in IMAGES:
        add("images", images, measure_batch(repeated(loaded, images), "two-view", BATCH, seconds), 2 * BATCH)
    for partners in PARTNERS:
        per_batch = measure_batch(store, "mimv", BATCH, seconds, partners)
        add("slots", 1 + partners, per_batch, BATCH * 2 * (1 + partners))
    return rows


def measure_memory(store: ImageStore, batch_size: int) -> dict[int, float]:
    """MiB held (see `held_memory`) after each of ``MEMORY_EPOCHS`` epochs of pairs."""
    pairs = PairLoader(store, get_recipe("amimv"), batch_size)
    held = {}
    for epoch in range(max(MEMORY_EPOCHS)):
        for _ in pairs.epoch(epoch):
            pass
        if epoch + 1 in MEMORY_EPOCHS:
            held[epoch + 1] = held_memory(store.device)
    return held


def draw_scaling(rows: list[ScaleRow], title: str, path: Path) -> None:
    """One panel per axis: milliseconds per batch, and the cost that is linear in the units through the first point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row.axis for row in rows))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(4 * len(axes), 3.4), layout="constrained", squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        shown = [row for row in rows if row.axis == axis]
        values = [row.value for row in shown]
        first = shown[0].microseconds_per_unit
        linear = [row.milliseconds * first / row.microseconds_per_unit for row in shown]
        panel.plot(values, [row.milliseconds for row in shown], "o-", label="measured")
        panel.plot(
            values, linear, "--", color="grey", label="linear through the first" if axis != "images" else "flat"
        )
        panel.set_xlabel(f"{axis} (pixels)" if axis == "image size" else axis)
        panel.set_ylim(bottom=0)
        panel.legend()
    panels[0][0].set_ylabel("ms per batch")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
