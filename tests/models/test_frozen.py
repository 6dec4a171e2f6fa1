"""Frozen networks of timm beside a run: they see images as their pretrained_cfg says."""

import pytest
import timm
import torch
from torch import nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec
from amimv.models.frozen import load_frozen
from amimv.pipelines import ImageStore
from amimv.trainers.evaluation import extract_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of 32 px with statistics of its own, in the form of timm's hub."""
    path = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=5)
    cfg = {"input_size": (3, 32, 32), "mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.3)}
    timm.models.save_for_hf(network, path, model_config={"pretrained_cfg": {**network.pretrained_cfg, **cfg}})
    return path, network.eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_repeated_and_normalised_as_the_network_was_trained(folder, channels):
    path, network = folder
    images = torch.randint(0, 256, (4, 16, 16, channels), dtype=torch.uint8)
    store = ImageStore.from_arrays(images)
    spec = BackboneSpec("small", channels, 16, (0.5,) * channels, (0.5,) * channels)
    frozen, like = load_frozen(f"local-dir:{path}", spec)
    # Twice the size: between the pixels, with the border repeated, as torch enlarges.
    large = nn.functional.interpolate(images.permute(0, 3, 1, 2) / 255, size=32, mode="bilinear")
    mean, std = torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)
    with torch.no_grad():
        expected = network.forward_head(
            network.forward_features((large.expand(-1, 3, -1, -1) - mean) / std), pre_logits=True
        )
    torch.testing.assert_close(extract_features(frozen, store, like), expected, atol=1e-4, rtol=1e-3)


def test_other_channels_and_missing_weights_are_one_line(folder, tmp_path):
    path, _ = folder
    spec = BackboneSpec("small", 4, 16, (0.5,) * 4, (0.5,) * 4)
    with pytest.raises(InputError, match=r"takes images of 3 channels, these have 4: leave it out$"):
        load_frozen(f"local-dir:{path}", spec)
    for name in (f"local-dir:{tmp_path}", "resnet17", "test_resnet.no_such_tag"):
        with pytest.raises(InputError, match=r"^no pretrained weights of [^\n]*$"):
            load_frozen(name, BackboneSpec())
