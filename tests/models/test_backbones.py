"""Backbones: their sizes and stems, and exports read again here and by timm alone."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from amimv import InputError
from amimv.models import backbones
from amimv.models.backbones import (
    BackboneSpec,
    build_backbone,
    check_sizes,
    encode,
    load_backbone,
    save_backbone,
    stem_is_changed,
    timm_note,
)


def draw_views(channels: int, size: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def feature_map(network: Any, channels: int, size: int) -> tuple[int, ...]:
    return tuple(network.eval().forward_features(draw_views(channels, size, 1)).shape[1:])


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def has_max_pool(network: nn.Module) -> bool:
    return any(isinstance(module, nn.MaxPool2d) for module in network.modules())


@pytest.mark.parametrize(("name", "millions", "side"), [("small", 0.21, 4), ("small-v1", 0.31, 2)])
def test_small_is_small(name: str, millions: float, side: int) -> None:
    network = build_backbone(BackboneSpec(name))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert network.num_features == 128
    assert feature_map(network, 3, 28) == (128, side, side)
    assert not has_max_pool(network)
    assert encode(network, draw_views(3, 28)).shape == (3, 128)
    assert encode(network, draw_views(3, 12)).shape == (3, 128)  # a local crop


def test_an_export_of_the_small_backbone_of_before_is_what_it_was(tmp_path: Path) -> None:
    network, views = build_backbone(BackboneSpec("small-v1")).eval(), draw_views(3, 28)
    save_backbone(network, BackboneSpec("small"), tmp_path)
    again, spec = load_backbone(tmp_path)
    assert spec.name == "small-v1"
    assert torch.equal(encode(again, views), encode(network, views))


@pytest.mark.parametrize(
    ("size", "side", "kernel", "stride", "padding", "pooled"),
    [(28, 4, 3, 1, 1, False), (64, 8, 3, 1, 1, False), (128, 8, 7, 2, 3, False), (224, 7, 7, 2, 3, True)],
)
def test_resnet_stems_suit_the_image_size(
    size: int, side: int, kernel: int, stride: int, padding: int, pooled: bool
) -> None:
    """timm's own would give 1, 2, 4, 7. The padding of a 3x3 stem is 1: with 2, as some have it, the map grows."""
    network = build_backbone(BackboneSpec("resnet18", size=size))
    assert feature_map(network, 3, size) == (512, side, side)
    stem = convolutions(network)[0]
    assert (stem.kernel_size, stem.stride, stem.padding) == ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
    assert has_max_pool(network) == pooled
    assert network.num_features == 512


@pytest.mark.parametrize("size", [28, 64, 128])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "resnet10t"])
def test_resnets_and_convnexts_keep_4_or_2_times_their_resolution(name: str, size: int) -> None:
    here = feature_map(build_backbone(BackboneSpec(name, size=size)), 3, size)
    factor = 4 if size <= 64 else 2
    native = feature_map(timm.create_model(name, num_classes=0), 3, size * factor)
    assert here[0] == native[0]
    assert abs(here[1] - native[1]) <= 1  # a stem without padding loses a pixel


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit_relpos"])
@pytest.mark.parametrize(("size", "patch"), [(28, 4), (64, 8), (128, 16), (224, 16)])
def test_vit_patches_give_7_to_14_tokens_a_side(name: str, size: int, patch: int) -> None:
    network = build_backbone(BackboneSpec(name, size=size))
    assert network.patch_embed.proj.kernel_size == network.patch_embed.proj.stride == (patch, patch)
    assert network.patch_embed.grid_size == (size // patch, size // patch)
    assert 7 <= size // patch <= 14
    assert encode(network, draw_views(3, size)).shape == (3, network.num_features)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "small",
        "test_resnet",
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "test_mambaout",
        "mobilenetv3_small_050",
    ],
)
def test_features_are_as_wide_as_num_features_says(name: str, channels: int) -> None:
    network = build_backbone(BackboneSpec(name, channels, 28))
    assert convolutions(network)[0].in_channels == channels
    features = encode(network.eval(), draw_views(channels, 28))
    assert features.shape == (3, network.num_features)
    assert features.isfinite().all()


@pytest.mark.parametrize("name", ["small", "test_resnet", "test_vit"])
def test_a_new_backbone_trains(name: str) -> None:
    """Built in training mode, with statistics untouched by the check of its shapes, every weight in the graph."""
    network = build_backbone(BackboneSpec(name))
    assert all(module.training for module in network.modules())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.get_buffer("num_batches_tracked") == 0
    encode(network, draw_views(3, 28)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("smal", "small"), ("test_vitt", "test_vit")])
def test_an_unknown_backbone_names_near_misses(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"unknown backbone '{name}': did you mean .*{near}") as caught:
        build_backbone(BackboneSpec(name))
    assert "\n" not in str(caught.value)


def test_a_backbone_like_no_other_names_none() -> None:
    with pytest.raises(InputError, match="unknown backbone 'qqqqqqqq': give 'small' or a model of timm"):
        build_backbone(BackboneSpec("qqqqqqqq"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ResNet18", "did you mean resnet18"),
        (" resnet18\n", "did you mean resnet18"),
        ("hf-hub:timm/resnet18", "give 'small' or a model of timm"),
        ("", "give 'small' or a model of timm"),
        ("resnet18.a1_in2k", "leave out what follows the dot"),
        ("test_vit.", "leave out what follows the dot"),
    ],
)
def test_an_unusual_name_is_one_line(name: str, near: str) -> None:
    with pytest.raises(InputError, match=r"unknown backbone '.*" + near) as caught:
        build_backbone(BackboneSpec(name))
    assert "\n" not in str(caught.value)


def test_a_name_may_have_its_tag() -> None:
    assert build_backbone(BackboneSpec("test_resnet.r160_in1k", size=28)).num_features == 96


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("levit_128s", 224),
        ("levit_128s", 64),
        ("mixer_s16_224", 224),
        ("maxvit_rmlp_pico_rw_256", 256),
        ("hiera_tiny_224", 64),
        ("vitamin_small_224", 28),
        ("vit_tiny_r_s16_p8_224", 224),
        ("crossvit_tiny_240", 240),
        ("coat_tiny", 64),
        ("efficientformerv2_s0", 224),
        ("test_maxvit", 160),
        ("gcvit_xxtiny", 64),
    ],
)
def test_networks_for_one_size_are_given_what_they_take(name: str, size: int) -> None:
    """Some have no patch to choose, or take the size as a pair only."""
    network = build_backbone(BackboneSpec(name, size=size)).eval()
    assert encode(network, draw_views(3, size, 2)).shape == (2, network.num_features)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 28), ("test_vit3", 64), ("swin_tiny_patch4_window7_224", 28)])
def test_vits_are_those_of_timm_with_the_patch_that_suits_the_size(name: str, size: int) -> None:
    torch.manual_seed(3)
    here = build_backbone(BackboneSpec(name, size=size)).state_dict()
    torch.manual_seed(3)
    there = timm.create_model(name, num_classes=0, img_size=size, patch_size={28: 4, 64: 8}[size]).state_dict()
    assert list(here) == list(there)
    assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_stems_of_parallel_convolutions_are_widened_together(name: str) -> None:
    """One of 3x3 and one of 1x1 are added, so both lose their stride of 2: 28 pixels give what 56 gave."""
    network = build_backbone(BackboneSpec(name, size=28))
    assert feature_map(network, 3, 28)[-2:] == (2, 2)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("test_convnext", 4, "Kernel size"),
        ("test_maxvit", 28, ""),
        ("test_coatnet", 28, ""),
        ("levit_128s", 28, ""),
        ("mixer_s16_224", 28, "patches of 16 pixels do not tile them"),
        ("vit_tiny_r_s16_p8_224", 28, "AssertionError"),
        ("csatv2", 28, "no stem that could be widened"),
    ],
)
def test_a_backbone_that_cannot_take_the_size_is_one_line(name: str, size: int, reason: str) -> None:
    with pytest.raises(InputError, match=f"backbone '{name}'.*{reason}") as caught:
        build_backbone(BackboneSpec(name, size=size))
    assert "\n" not in str(caught.value)
    assert "patch_size" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        IndexError(""),
        KeyError("heads"),
        ValueError("x " * 200),
        ZeroDivisionError("a\nb"),
        NotImplementedError(" \n"),
    ],
)
def test_whatever_a_network_raises_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, **_: object) -> nn.Module:
        raise error

    network, spec = build_backbone(BackboneSpec("test_vit")), BackboneSpec("test_vit")
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(network, "forward", create)
    for refused in (lambda: build_backbone(spec), lambda: check_sizes(network, spec, [12])):
        with pytest.raises(
            InputError, match=r"^backbone 'test_vit' cannot take .* \d+ pixels \(.+\): see docs"
        ) as caught:
            refused()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200
    assert network.training


@pytest.mark.parametrize(
    ("features", "said"), [(torch.zeros(2, 4, 7, 7), r"shape \(2, 4, 7, 7\)"), ([torch.zeros(2, 4)], "type list")]
)
def test_features_that_are_no_vectors_are_refused(
    features: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "_features", lambda network, spec: features)
    with pytest.raises(InputError, match=f"backbone 'test_vit' gives features of {said}, expected \\(B, D\\)"):
        build_backbone(BackboneSpec("test_vit"))


def test_local_crops_that_a_network_cannot_take_are_refused() -> None:
    spec = BackboneSpec("levit_128s", size=64)
    with pytest.raises(InputError, match="'levit_128s' cannot take images of 32 pixels"):
        check_sizes(build_backbone(spec), spec, [64, 32])


def trained(spec: BackboneSpec) -> nn.Module:
    """A network off its initial state: statistics moved by a few batches, and no weight at 0."""
    torch.manual_seed(1)
    network = build_backbone(spec)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
        for _ in range(2):
            network(1 + 2 * draw_views(spec.channels, spec.size, 8))
    return network.eval()


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("small", 3, 28),
        ("small", 1, 28),
        ("resnet18", 3, 28),
        ("test_resnet", 1, 64),
        ("test_resnet", 3, 224),
        ("test_vit", 1, 28),
        ("test_vit", 3, 64),
        ("test_convnext", 3, 28),
        ("vit_tiny_patch16_224", 3, 28),
    ],
)
def test_an_export_gives_the_same_features(name: str, channels: int, size: int, tmp_path: Path) -> None:
    spec = BackboneSpec(name, channels, size, (0.1, 0.2, 0.3)[:channels], (0.4, 0.5, 0.6)[:channels])
    network = trained(spec)
    save_backbone(network, spec, tmp_path / "runs" / "export")
    again, read = load_backbone(str(tmp_path / "runs" / "export"))
    assert read == spec
    assert not again.training
    with torch.no_grad():
        views = draw_views(channels, size)
        assert torch.equal(encode(again, views), encode(network, views))


@pytest.mark.parametrize(
    ("name", "size", "changed"),
    [
        ("small", 28, True),
        ("small", 224, True),
        ("resnet18", 28, True),
        ("test_resnet", 128, True),
        ("test_resnet", 224, False),
        ("test_vit", 28, False),
        ("vit_tiny_patch16_224", 28, False),
    ],
)
def test_timm_refuses_what_it_would_build_as_another_network(
    name: str, size: int, changed: bool, tmp_path: Path
) -> None:
    spec = BackboneSpec(name, size=size)
    assert stem_is_changed(spec) == changed
    save_backbone(build_backbone(spec), spec, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"backbone.json", "config.json", "model.safetensors"}
    note = json.loads((tmp_path / "config.json").read_text()).get("note", "")
    assert note == timm_note(spec)
    assert ("timm alone cannot build this network" in note) == changed
    with pytest.raises(RuntimeError, match=f"Unknown model .amimv_{name}") if changed else nullcontext():
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


TIMM_ALONE = """
import sys
import timm, torch
for folder in sys.argv[1:]:
    network = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    with torch.no_grad():
        features = network(torch.load(folder + "/views.pt", weights_only=True))
    torch.save([features, network.num_features, network.pretrained_cfg["mean"]], folder + "/features.pt")
assert not any(name.startswith("amimv") for name in sys.modules)
"""


@pytest.mark.slow
def test_timm_alone_reads_an_export_and_gives_the_same_features(tmp_path: Path) -> None:
    """In a process that imports only timm and torch, as someone without this package would."""
    specs = [
        BackboneSpec("vit_tiny_patch16_224", 3, 28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        BackboneSpec("test_vit", 1, 64, (0.25,), (0.5,)),
        BackboneSpec("test_vit3", 3, 128),
        BackboneSpec("test_resnet", 1, 224, (0.25,), (0.5,)),
        BackboneSpec("levit_128s", 3, 64),  # takes no patch size
    ]
    networks = [trained(spec) for spec in specs]
    folders = [tmp_path / spec.name for spec in specs]
    for spec, network, folder in zip(specs, networks, folders, strict=True):
        save_backbone(network, spec, folder)
        torch.save(draw_views(spec.channels, spec.size), folder / "views.pt")
    command = [sys.executable, "-c", TIMM_ALONE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for spec, network, folder in zip(specs, networks, folders, strict=True):
        features, width, mean = torch.load(folder / "features.pt", weights_only=True)
        with torch.no_grad():
            torch.testing.assert_close(features, network(draw_views(spec.channels, spec.size)), rtol=1e-4, atol=1e-5)
        assert width == network.num_features
        assert tuple(mean) == spec.mean
        assert json.loads((folder / "config.json").read_text())["architecture"] == spec.name


@pytest.mark.parametrize("missing", ["everything", "backbone.json", "model.safetensors"])
def test_a_folder_without_an_export_is_refused(missing: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    if missing != "everything":
        spec = BackboneSpec("test_resnet")
        save_backbone(build_backbone(spec), spec, folder)
        (folder / missing).unlink()
    with pytest.raises(InputError, match=r"no exported backbone in .*: expected backbone.json and model.safetensors"):
        load_backbone(folder)


def test_an_export_at_the_hub_is_read_as_its_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BackboneSpec("small", 1, 28, (0.25,), (0.5,))
    network, asked = trained(spec), []
    save_backbone(network, spec, tmp_path)

    def download(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(backbones, "hf_hub_download", download)
    views = draw_views(1, 28)
    for source in ("hf-hub:me/skin@v1", f"local-dir:{tmp_path}", tmp_path):
        again, read = load_backbone(source)
        assert read == spec
        with torch.no_grad():
            assert torch.equal(encode(again, views), encode(network, views))
    assert asked == [("me/skin", "backbone.json", "v1"), ("me/skin", "model.safetensors", "v1")]


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^no exported backbone in hf-hub:me/skin \(.*\): expected [^\n]*$"):
        load_backbone("hf-hub:me/skin")


def test_channels_last_views_give_the_same_features() -> None:
    network = build_backbone(BackboneSpec()).eval()
    views = draw_views(3, 28)
    with torch.no_grad():
        assert torch.equal(
            encode(network, views), encode(network, views.contiguous(memory_format=torch.channels_last))
        )


@pytest.mark.parametrize(("name", "size", "safe"), [("repvgg_a0", 144, False), ("repvgg_a0", 28, True)])
def test_channels_last_is_left_off_where_torch_would_crash(name: str, size: int, safe: bool) -> None:
    network = build_backbone(BackboneSpec(name, size=size))
    layouts: list[bool] = []
    network.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    wide = next(c for c in convolutions(network) if c.kernel_size == (3, 3) and c.in_channels > 3)
    assert wide.weight.is_contiguous(memory_format=torch.channels_last) == safe
    encode(network, draw_views(3, size, 2))
    encode(network.to("meta"), draw_views(3, size, 2).to("meta"))  # as on a GPU
    assert layouts == [safe, True]


@pytest.mark.parametrize(
    ("convolution", "overruns"),
    [
        (nn.Conv2d(3, 8, 1, 2), True),
        (nn.Conv2d(15, 8, 1, (1, 2)), True),
        (nn.Conv2d(8, 8, 1, 4), True),
        (nn.Conv2d(16, 8, 1, 2), False),
        (nn.Conv2d(3, 8, 1, 1), False),
        (nn.Conv2d(3, 8, 3, 2), False),
        (nn.Conv2d(6, 8, 1, 2, groups=2), False),
        (nn.Linear(3, 8), False),
    ],
)
def test_which_convolutions_overrun(convolution: nn.Module, overruns: bool) -> None:
    assert backbones._overruns_in_channels_last(convolution) == overruns


STEPS = """
import sys
import torch
from amimv.models.backbones import BackboneSpec, build_backbone, encode
for name in sys.argv[1:]:
    network = build_backbone(BackboneSpec(name, size=144))
    for _ in range(3):
        encode(network, torch.randn(2, 3, 144, 144)).square().sum().backward()
"""


@pytest.mark.slow
def test_strided_stems_of_1x1_convolutions_train_on_a_cpu() -> None:
    """In a process of its own, which the overrun would end."""
    command = [sys.executable, "-c", STEPS, "repvgg_a0", "mobileone_s0", "fastvit_t8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
