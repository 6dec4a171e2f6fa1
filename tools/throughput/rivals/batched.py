"""Whole batches: Kornia's augmentations and DALI's pipeline; and DALI's imitation of torchvision, image by image."""

from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from amimv import InputError
from amimv.pipelines.operations.blur import blur_window
from amimv.pipelines.policy import ViewPolicy
from amimv.pipelines.recipes import HARD
from amimv.pipelines.store import ImageStore
from amimv.tools.throughput.measure import threads as on_threads
from amimv.tools.throughput.rivals.common import Views, checked_images, shuffled
from amimv.tools.throughput.rivals.loaders import pil_arrays, torchvision_operations


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
        with on_threads(max(1, threads)):
            for images in shuffled(store, batch_size):
                pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
                yield augment(pixels), augment(pixels)

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
