"""What people use today to make two SimCLR views per image, each in its fastest form, to be measured beside ours.

All take the operations and strengths of the recipe `two-view`: random resized crop, horizontal flip, colour jitter,
greyscale, Gaussian blur in the window `blur_window`, and normalisation by the store's mean and std; grey images get no
saturation, hue or greyscale. Where a library's operations differ, its row says so; and all of them draw a crop that
does not fit again, where we cut it, so that their crops are smaller: 0.49 of the image in the mean, ours 0.54. Every
library is imported when its views are asked for.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from amimv import InputError
from amimv.pipelines.images import ResidentImages
from amimv.pipelines.operations.blur import blur_window
from amimv.pipelines.params import ViewPolicy
from amimv.pipelines.recipes import HARD
from amimv.pipelines.store import ImageStore

#: Two views of the same images, each ``(B, C, H, W)`` ``float32``, normalised, on the store's device.
Views = tuple[Tensor, Tensor]
#: ``(store, batch_size, threads, policy=HARD)`` to endless batches, epoch after epoch in random order, each without
#: its last incomplete batch; ``close()`` ends workers and pipelines. Of the policy the operations named above are read
#: (not its size, mean and std). Raises `InputError` for a store that it cannot take.
Batches = Callable[..., Generator[Views, None, None]]


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


def checked_images(store: ImageStore, batch_size: int) -> Tensor:
    """The store's ``(N, H, W, C)`` images; an `InputError` unless they are in memory and an epoch has a batch."""
    if not isinstance(store.images, ResidentImages):
        raise InputError(f"{store.name} is not on the device as a whole: give a data set that fits into its memory")
    if not 1 <= batch_size <= len(store):
        raise InputError(f"batch size is {batch_size}, expected 1 to {len(store)}, the number of images")
    return store.images.tensor


def shuffled(store: ImageStore, batch_size: int) -> Iterator[Tensor]:
    """``(B, H, W, C)`` ``uint8`` batches on the store's device, without end."""
    whole = len(store) // batch_size * batch_size
    while True:
        order = torch.randperm(len(store), device=store.device)[:whole]
        yield from map(store.gather, order.split(batch_size))


class TwoViews(torch.utils.data.Dataset[Views]):
    """Two views of each image: ``read`` gives an image in the form that ``view`` takes."""

    def __init__(self, images: Any, read: Callable[[Any], Any], view: Callable[[Any], Tensor]) -> None:
        self.images, self.read, self.view = images, read, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Views:
        image = self.read(self.images[index])
        return self.view(image), self.view(image)


def loaded(dataset: TwoViews, store: ImageStore, batch_size: int, workers: int) -> Generator[Views, None, None]:
    """Batches of a data set through torch's ``DataLoader``; its workers end when the generator is closed."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=store.device.type == "cuda",
    )
    while True:
        for first, second in loader:
            yield first.to(store.device, non_blocking=True), second.to(store.device, non_blocking=True)


def pil_arrays(images: Tensor) -> Any:
    """Arrays that Pillow reads: ``(N, H, W, 3)``, or ``(N, H, W)`` if grey, on the host."""
    return (images[..., 0] if images.shape[3] == 1 else images).cpu().contiguous().numpy()


def torchvision_operations(transforms: Any, store: ImageStore, policy: ViewPolicy) -> list[Any]:
    """Crop, flip, jitter, greyscale and blur of ``torchvision.transforms``, first or second version."""
    p, coloured = SimpleNamespace(**policy.settings()), store.channels == 3
    jitter = transforms.ColorJitter(p.brightness, p.contrast, p.saturation * coloured, p.hue * coloured)
    blur = transforms.GaussianBlur(blur_window(store.size), p.blur_sigma)
    return [
        transforms.RandomResizedCrop(store.size, (p.crop_min, p.crop_max), p.crop_ratio),
        transforms.RandomHorizontalFlip(p.hflip),
        transforms.RandomApply([jitter], p.jitter_p),
        *([transforms.RandomGrayscale(p.grey_p)] if coloured else []),
        transforms.RandomApply([blur], p.blur_p),
    ]


def pil_views(
    store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy = HARD
) -> Generator[Views, None, None]:
    """torchvision's first transforms on PIL images."""
    from PIL import Image
    from torchvision import transforms

    images = pil_arrays(checked_images(store, batch_size))
    operations = torchvision_operations(transforms, store, policy)
    last = [transforms.ToTensor(), transforms.Normalize(store.mean, store.std)]
    dataset = TwoViews(images, Image.fromarray, transforms.Compose(operations + last))
    return loaded(dataset, store, batch_size, threads)


def tensor_views(
    store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy = HARD
) -> Generator[Views, None, None]:
    """torchvision's second transforms on ``uint8`` tensors, which become floats where that is fastest."""
    from torchvision.transforms import v2

    images = checked_images(store, batch_size).cpu().permute(0, 3, 1, 2).contiguous()
    crop, flip, *colour_and_blur = torchvision_operations(v2, store, policy)
    last = v2.Normalize(store.mean, store.std)
    # Cropped as bytes and coloured as floats: 2 to 10 % faster than bytes to the end.
    view = v2.Compose([crop, flip, v2.ToDtype(torch.float32, scale=True), *colour_and_blur, last])
    return loaded(TwoViews(images, torch.as_tensor, view), store, batch_size, threads)


def lightly_views(
    store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy = HARD
) -> Generator[Views, None, None]:
    """Lightly's transform for SimCLR. The crop's ratio and its largest area cannot be set: 3/4 to 4/3, and 1."""
    from lightly.transforms.simclr_transform import SimCLRViewTransform
    from PIL import Image

    images = pil_arrays(checked_images(store, batch_size))
    p, coloured = SimpleNamespace(**policy.settings()), store.channels == 3
    view = SimCLRViewTransform(
        input_size=store.size,
        cj_prob=p.jitter_p,
        cj_bright=p.brightness,
        cj_contrast=p.contrast,
        cj_sat=p.saturation * coloured,
        cj_hue=p.hue * coloured,
        min_scale=p.crop_min,
        random_gray_scale=p.grey_p * coloured,
        gaussian_blur=p.blur_p,
        sigmas=p.blur_sigma,
        hf_prob=p.hflip,
        normalize={"mean": list(store.mean), "std": list(store.std)},
    )
    return loaded(TwoViews(images, Image.fromarray, view), store, batch_size, threads)


def kornia_operations(store: ImageStore, policy: ViewPolicy, crops: str) -> Any:
    """Kornia's own augmentations of a whole batch of floats in [0, 1], a draw per image; crops by this mode."""
    import kornia.augmentation as augmentation

    p, coloured = SimpleNamespace(**policy.settings()), store.channels == 3
    size, window = (store.size,) * 2, (blur_window(store.size),) * 2
    mean, std = (torch.tensor(values, device=store.device) for values in (store.mean, store.std))
    return augmentation.AugmentationSequential(
        augmentation.RandomResizedCrop(size, (p.crop_min, p.crop_max), p.crop_ratio, cropping_mode=crops),
        augmentation.RandomHorizontalFlip(p=p.hflip),
        augmentation.ColorJitter(p.brightness, p.contrast, p.saturation * coloured, p.hue * coloured, p=p.jitter_p),
        *([augmentation.RandomGrayscale(p=p.grey_p)] if coloured else []),
        augmentation.RandomGaussianBlur(window, p.blur_sigma, p=p.blur_p),
        augmentation.Normalize(mean, std),
        same_on_batch=False,
    )


def kornia_views(
    store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy = HARD, crops: str = "resample"
) -> Generator[Views, None, None]:
    """Kornia's ``AugmentationSequential``, a call per view: twice the batch in one call is slower on a CPU.

    Its default way to crop, "slice", goes image by image; "resample" is faster.
    """
    checked_images(store, batch_size)
    augment = kornia_operations(store, policy, crops)

    def views() -> Generator[Views, None, None]:
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, threads))
        try:
            for images in shuffled(store, batch_size):
                pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
                yield augment(pixels), augment(pixels)
        finally:
            torch.set_num_threads(before)

    return views()


def dali_jitter(view: Any, policy: ViewPolicy, channels: int) -> Any:
    """Jitter and greyscale in one operator of DALI, from bytes to floats in [0, 255]."""
    from nvidia.dali import fn, types

    p = SimpleNamespace(**policy.settings())
    applied = fn.random.coin_flip(probability=p.jitter_p)

    def offset(low: float, high: float) -> Any:
        return applied * fn.random.uniform(range=[low, high]) if low < high else 0.0

    def factor(strength: float) -> Any:
        return 1.0 + offset(max(-1.0, -strength), strength)

    brightness, contrast = factor(p.brightness), factor(p.contrast)
    if channels == 1:
        return fn.brightness_contrast(view, brightness=brightness, contrast=contrast, dtype=types.FLOAT)
    coloured = 1 - fn.random.coin_flip(probability=p.grey_p)
    return fn.color_twist(
        view,
        brightness=brightness,
        contrast=contrast,
        saturation=factor(p.saturation) * coloured,
        hue=offset(-360 * p.hue, 360 * p.hue),
        dtype=types.FLOAT,
    )


def dali_view(view: Any, store: ImageStore, policy: ViewPolicy) -> Any:
    """The graph of one view: ``HWC`` bytes to ``CHW`` floats.

    Bytes until the colours: with floats DALI takes contrast about 0.5 of 255, which is another operation.
    """
    from nvidia.dali import fn, types

    p = SimpleNamespace(**policy.settings())
    view = fn.random_resized_crop(
        view,
        size=[store.size, store.size],
        random_area=[p.crop_min, p.crop_max],
        random_aspect_ratio=list(p.crop_ratio),
        antialias=False,  # a crop is never shrunk here
    )
    view = dali_jitter(view, policy, store.channels)
    low, high = p.blur_sigma
    if fn.random.coin_flip(probability=p.blur_p, dtype=types.BOOL):
        sigma = fn.random.uniform(range=[low, high]) if low < high else low
        view = fn.gaussian_blur(view, sigma=sigma, window_size=blur_window(store.size))
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=p.hflip),
        mean=[255 * m for m in store.mean],
        std=[255 * s for s in store.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )


def dali_seed() -> int:
    """A seed from torch's generator, on which all others here depend."""
    return int(torch.randint(2**31 - 1, ()))


def dali_pipeline(store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy) -> Any:
    """A pipeline whose one output holds the first views of a batch, then the second."""
    from nvidia.dali import fn, pipeline_def

    gpu = store.device.type == "cuda"

    def source() -> Iterator[Any]:
        for images in shuffled(store, batch_size):
            twice = torch.cat([images, images])
            # DALI asks torch for its CUDA stream when it is given a tensor, even where there is no GPU.
            yield twice if gpu else twice.numpy()

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        images = fn.external_source(source=source(), batch=True, layout="HWC", device="gpu" if gpu else "cpu")
        return dali_view(images, store, policy)

    device = torch.cuda.current_device() if gpu and store.device.index is None else store.device.index
    return graph(
        batch_size=2 * batch_size, num_threads=max(1, threads), device_id=device if gpu else None, seed=dali_seed()
    )


def dali_views(
    store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy = HARD
) -> Generator[Views, None, None]:
    """A pipeline of DALI's random operators, whose buffers become tensors without a copy."""
    checked_images(store, batch_size)

    def views() -> Generator[Views, None, None]:
        pipeline = dali_pipeline(store, batch_size, threads, policy)
        pipeline.build()
        gpu = store.device.type == "cuda"
        while True:
            (output,) = pipeline.run(torch.cuda.current_stream(store.device)) if gpu else pipeline.run()
            both = torch.from_dlpack(output.as_tensor())
            yield both[:batch_size], both[batch_size:]

    return views()


def dali_pil_compose(store: ImageStore, policy: ViewPolicy) -> Any:
    """DALI's imitation of torchvision's transforms, for one PIL image at a time."""
    import nvidia.dali.experimental.torchvision as transforms

    operations = torchvision_operations(transforms, store, policy)
    # It normalises bytes, so mean and std are in their units.
    mean, std = [255 * m for m in store.mean], [255 * s for s in store.std]
    last = [transforms.Normalize(mean, std), transforms.ToPureTensor()]
    return transforms.Compose(operations + last, batch_size=1, num_threads=1, seed=dali_seed())


def dali_pil_batches(store: ImageStore, batch_size: int, policy: ViewPolicy) -> Generator[Views, None, None]:
    """Views of one image after the other, stacked."""
    from PIL import Image

    view = dali_pil_compose(store, policy)
    for images in shuffled(store, batch_size):
        read = [Image.fromarray(image) for image in pil_arrays(images)]
        first, second = (torch.stack([view(image) for image in read]).to(store.device) for _ in range(2))
        yield first, second


def dali_pil_views(
    store: ImageStore, batch_size: int, threads: int, policy: ViewPolicy = HARD
) -> Generator[Views, None, None]:
    """DALI's imitation of torchvision's transforms.

    Batches of tensors are no way: they are taken as ``CHW``, in which it has no colours. So PIL images, one by one.
    """
    checked_images(store, batch_size)
    if store.channels == 1:
        raise InputError("DALI's torchvision transforms have no colour jitter for grey images: give a colour store")
    if not torch.cuda.is_available():
        raise InputError("DALI's torchvision transforms ask for a CUDA stream even on a CPU: they need an NVIDIA GPU")
    return dali_pil_batches(store, batch_size, policy)


_TORCHVISION = "jitter in random order, contrast about each image's mean, hue in HSV"
_BYTES = "8-bit pixels between operations"

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
    Rival(
        "Lightly SimCLRTransform, DataLoader, workers",
        "lightly",
        f"{_TORCHVISION}, {_BYTES}, blur by Pillow's approximation without a window",
        "workers",
        lightly_views,
    ),
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
