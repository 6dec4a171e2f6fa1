"""What people use today to make two SimCLR views per image, each in its fastest form, to be measured beside ours.

All take the operations and strengths of the recipe `two-view`: random resized crop, horizontal flip, colour jitter,
greyscale, Gaussian blur in the window `blur_window`, and normalisation by the store's mean and std; grey images get no
saturation, hue or greyscale. Where a library's operations differ, its row says so; and all of them draw a crop that
does not fit again, where we cut it, so that their crops are smaller: 0.49 of the image in the mean, ours 0.54. Every
library is imported when its views are asked for. This folder is of a checkout only: setup.cfg leaves it out.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Literal

from amimv import InputError
from amimv.pipelines.params import ViewPolicy
from amimv.pipelines.recipes import HARD
from amimv.pipelines.store import ImageStore
from amimv.tools.throughput.rivals.batched import dali_pil_views, dali_views, kornia_views
from amimv.tools.throughput.rivals.common import Batches, Views
from amimv.tools.throughput.rivals.loaders import lightly_views, pil_views, tensor_views


@dataclass(frozen=True)
class Rival:
    """One way to make two views.

    Attributes:
        name: for the table.
        module: what must import.
        differences: where its operations differ from ours, in one line; empty if nowhere.
        threads: what ``threads`` of ``batches`` counts: "workers" (processes, from 1), "threads" (of this process,
            from 1), or "nothing" (it runs in this process as it is: give 0).
        batches: makes the views.
    """

    name: str
    module: str
    differences: str
    threads: Literal["nothing", "workers", "threads"]
    batches: Batches

    def views(self, store: ImageStore, batch: int, n: int, policy: ViewPolicy = HARD) -> Generator[Views, None, None]:
        """Its batches; an `InputError` if its library is missing."""
        try:
            import_module(self.module)
        except ImportError as error:
            raise InputError(f"{self.module} cannot be imported ({error})") from error
        return self.batches(store, batch, n, policy)

    def count(self, store: ImageStore, batch: int, n: int) -> Iterator[int]:
        """Views handed out, batch by batch."""
        with closing(self.views(store, batch, n)) as batches:
            for views in batches:
                yield sum(map(len, views))


_TORCHVISION = "jitter in random order, contrast about each image's mean, hue in HSV"
_BYTES = "8-bit pixels between operations"
_LIGHTLY = f"{_TORCHVISION}, {_BYTES}, blur by Pillow's approximation without a window"

RIVALS: tuple[Rival, ...] = (
    Rival(
        "torchvision v1 (PIL), DataLoader, main process",
        "torchvision",
        f"{_TORCHVISION}, {_BYTES}",
        "nothing",
        pil_views,
    ),
    Rival(
        "torchvision v1 (PIL), DataLoader, workers", "torchvision", f"{_TORCHVISION}, {_BYTES}", "workers", pil_views
    ),
    Rival("torchvision v2 (tensors), DataLoader, main process", "torchvision", _TORCHVISION, "nothing", tensor_views),
    Rival("torchvision v2 (tensors), DataLoader, workers", "torchvision", _TORCHVISION, "workers", tensor_views),
    Rival("Lightly SimCLRTransform, DataLoader, main process", "lightly", _LIGHTLY, "nothing", lightly_views),
    Rival("Lightly SimCLRTransform, DataLoader, workers", "lightly", _LIGHTLY, "workers", lightly_views),
    Rival(
        "Kornia AugmentationSequential, as it comes",
        "kornia",
        f"{_TORCHVISION}; crops of whole pixels, image by image",
        "threads",
        partial(kornia_views, crops="slice"),
    ),
    Rival(
        "Kornia AugmentationSequential, crops resampled",
        "kornia",
        f"{_TORCHVISION}; crops from pixel centre to pixel centre",
        "threads",
        kornia_views,
    ),
    Rival(
        "DALI pipeline",
        "nvidia.dali",
        "contrast about mid-grey, crops of whole pixels rounded to 8 bits, colours not clamped",
        "threads",
        dali_views,
    ),
    Rival(
        "DALI torchvision transforms (PIL)",
        "nvidia.dali.experimental.torchvision",
        f"contrast about mid-grey, crops of whole pixels, {_BYTES}; one image at a time",
        "nothing",
        dali_pil_views,
    ),
)
