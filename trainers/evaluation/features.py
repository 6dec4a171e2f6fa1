"""Features of every image of a store, by any network, and the network that a run starts from."""

from itertools import chain

import torch
from torch import Tensor, nn

from amimv.models.backbones import BackboneSpec, build_backbone, encode
from amimv.pipelines import ImageStore, ViewParams, render


@torch.inference_mode()
def extract_features(
    network: nn.Module | None,
    store: ImageStore,
    spec: BackboneSpec,
    chunk: int = 512,
    indices: Tensor | None = None,
) -> Tensor:
    """Features ``(N, D)`` of the images' normalised views, ``float32``, on the device.

    Args:
        network: in evaluation mode during the call; None gives the normalised pixels themselves.
        spec: size, mean and std that the images are rendered by.
        chunk: images at a time.
        indices: ``(M,)`` which images, instead of all.
    """
    params = ViewParams(spec.size, spec.mean, spec.std, spec.value_range)
    parts = []
    was_training = network is not None and network.training
    if network is not None:
        network.eval()
    indices = torch.arange(len(store), device=store.device) if indices is None else indices
    whole = len(indices) // chunk * chunk
    rest = [indices[None, whole:]] if whole < len(indices) else []
    for images in chain.from_iterable(map(store.stream, [indices[:whole].view(-1, chunk), *rest])):
        view = render(images, params)
        parts.append(view.flatten(1) if network is None else encode(network, view).float())
    if network is not None:
        network.train(was_training)
    return torch.cat(parts)


def build_random(spec: BackboneSpec, seed: int, device: torch.device | str) -> nn.Module:
    """The backbone as a run with this seed starts from."""
    torch.manual_seed(seed)
    return build_backbone(spec).to(device)
