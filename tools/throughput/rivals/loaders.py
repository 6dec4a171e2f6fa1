"""Image by image in torch's ``DataLoader``: torchvision's transforms, first and second version, and Lightly's."""

from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from amimv.pipelines.operations.blur import blur_window
from amimv.pipelines.policy import ViewPolicy
from amimv.pipelines.recipes import HARD
from amimv.pipelines.store import ImageStore
from amimv.tools.throughput.rivals.common import Views, checked_images


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
