"""Features of every image of a store, by any network, and the network that a run starts from."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone, encode
from amimv.pipelines import ImageStore, ViewParams, ViewPolicy, draw_view_params, render
from amimv.pipelines.rng import Key, Stream

#: Whose size, mean, std and value range images are rendered by: a backbone's, or those of the training images.
Like = BackboneSpec | ImageStore


def extract_features(
    network: nn.Module | None,
    store: ImageStore,
    like: Like | None = None,
    chunk: int = 512,
    indices: Tensor | None = None,
    augment: ViewPolicy | None = None,
) -> Tensor:
    """Features ``(N, D)`` of the images' normalised views, ``float32``, on the device.

    Args:
        network: from ``(B, C, S, S)`` to ``(B, D)``, such as a model of timm with ``num_classes=0``; in evaluation
            mode during the call. None gives the normalised pixels themselves.
        like: a backbone's spec, or the training images, by whose size, mean, std and value range the images are
            rendered; None: by the store's own.
        chunk: images at a time.
        indices: ``(M,)`` which images, instead of all.
        augment: instead of the normalised views, one of each image by the operations of this policy: the same in every
            call, as its random numbers depend on the place of an image among ``indices`` alone.

    Raises:
        InputError: for a network whose output is not ``(B, D)``.
    """
    return torch.cat(list(stream_features(network, store, like, chunk, indices, augment)))


@torch.inference_mode()
def stream_features(
    network: nn.Module | None,
    store: ImageStore,
    like: Like | None = None,
    chunk: int = 512,
    indices: Tensor | None = None,
    augment: ViewPolicy | None = None,
) -> Iterator[Tensor]:
    """What `extract_features` gives, ``chunk`` rows at a time, none of which is kept."""
    like = store if like is None else like
    was_training = network is not None and network.training
    if network is not None:
        network.eval()
    indices = torch.arange(len(store), device=store.device) if indices is None else indices
    whole = len(indices) // chunk * chunk
    rest = [indices[None, whole:]] if whole < len(indices) else []
    streamed = chain.from_iterable(map(store.stream, [indices[:whole].view(-1, chunk), *rest]))
    for places, images in zip(torch.arange(len(indices), device=store.device).split(chunk), streamed, strict=True):
        view = render(images, _params(like, augment, places, images))
        yield view.flatten(1) if network is None else _encode(network, view)
    if network is not None:
        network.train(was_training)


def _params(like: Like, augment: ViewPolicy | None, places: Tensor, images: Tensor) -> ViewParams:
    if augment is None:
        return ViewParams(like.size, like.mean, like.std, like.value_range)
    policy = replace(augment, size=like.size, mean=like.mean, std=like.std, value_range=like.value_range)
    return draw_view_params(policy, places, Key(0, Stream.EVALUATION), images.shape[2] / images.shape[1])


def _encode(network: nn.Module, views: Tensor) -> Tensor:
    features = encode(network, views)
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"the network gives {got}, expected features (B, D): of a timm model, give num_classes=0")
    return features.float()


def build_random(spec: BackboneSpec, seed: int, device: torch.device | str) -> nn.Module:
    """The backbone as a run with this seed starts from."""
    torch.manual_seed(seed)
    return build_backbone(spec).to(device)
