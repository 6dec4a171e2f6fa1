"""Initial weights: files in the layouts of the libraries that write them, give the features that wrote them."""

import argparse
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone, encode, save_backbone
from amimv.models.weights import load_initial

#: Above 128 px the stem is timm's own.
SPEC = BackboneSpec("resnet18", 3, 160)
VIT = BackboneSpec("vit_tiny_patch16_224", 3, 64)
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


#: A quarter of the widths: small files.
THIN = {"channels": (16, 32, 64, 128)}


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(seed, name="resnet18", **arguments):
    """A network whose BatchNorm statistics are not those of the beginning."""
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=0, **arguments)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    """Built once: every test loads other weights into it."""
    return other(0, **THIN)


@pytest.fixture(scope="module")
def source():
    return other(1, **THIN)


@pytest.fixture(scope="module")
def state(source):
    return source.state_dict()


def features(network, images=IMAGES):
    with torch.no_grad():
        return encode(network.eval(), images)


def same(network, source, images=IMAGES):
    with torch.no_grad():
        torch.testing.assert_close(features(network, images), source(images), atol=1e-4, rtol=1e-4)


HEAD = {"weight": torch.zeros(10, 128), "bias": torch.zeros(10)}


def moco_v3(state):
    """facebookresearch/moco-v3, main_moco.py: what DistributedDataParallel wraps, with a projector in place of fc."""
    other_state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    inner = below("base_encoder.", state | {"fc.0.weight": torch.zeros(16, 128)})
    inner |= below("momentum_encoder.", other_state) | {"predictor.0.weight": torch.zeros(16, 16)}
    return {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": OrderedDict(below("module.", inner)),
        "optimizer": {"state": {0: {"mu": torch.zeros(64, 3, 7, 7)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "scaler": {"scale": 65536.0},
    }


def moco_v2(state):
    other_state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    inner = below("encoder_q.", state) | below("encoder_k.", other_state)
    return {"state_dict": below("module.", inner | {"queue": torch.zeros(8, 16), "queue_ptr": torch.zeros(1)})}


def dino(state):
    """facebookresearch/dino, main_dino.py: the student below DistributedDataParallel, and the command's arguments."""
    student = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": below("module.backbone.", student) | {"module.head.mlp.0.weight": torch.zeros(8, 128)},
        "teacher": below("backbone.", state) | {"head.mlp.0.weight": torch.zeros(8, 128)},
        "epoch": 3,
        "args": argparse.Namespace(arch="resnet18"),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def vissl(state):
    trunk = below("_feature_blocks.", state)
    model = {"trunk": trunk, "heads": {"0.clf.0.weight": torch.zeros(8, 128)}}
    return {"type": "checkpoint", "loss": 1.0, "classy_state_dict": {"base_model": {"model": model, "meters": {}}}}


def solo_learn(state):
    """A checkpoint of Lightning's, of solo-learn's BYOL."""
    momentum = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    inner = below("momentum_backbone.", momentum) | below("backbone.", state) | below("classifier.", HEAD)
    return {"epoch": 3, "pytorch-lightning_version": "2.1.2", "state_dict": inner | below("projector.0.", HEAD)}


def lightly(state):
    """As Lightly's examples take torchvision's network apart, with the head of its SimCLR."""
    network = other(0, **THIN)  # whose children are those of torchvision's, in their order
    network.load_state_dict(state)
    module = nn.Module()
    module.backbone = nn.Sequential(*list(network.children())[:-1])
    module.projection_head = nn.Sequential(nn.Linear(128, 8))
    return {"state_dict": module.state_dict()}


def timm_training(state):
    """timm's train.py with --model-ema, which it prefers itself."""
    worse = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {"arch": "resnet18", "state_dict": worse, "state_dict_ema": below("module.", state), "epoch": 3}


def torchvision_supervised(state):
    return state | below("fc.", HEAD)


LAYOUTS = (moco_v3, moco_v2, dino, vissl, solo_learn, lightly, timm_training, torchvision_supervised)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_file_of_each_library_gives_the_features_of_its_network(layout, network, source, state, tmp_path):
    torch.save(layout(state), tmp_path / "weights.pth")
    loaded = load_initial(network, SPEC, str(tmp_path / "weights.pth"))
    assert (loaded.loaded, loaded.missing, loaded.adapted) == (105, (), ())
    same(network, source)


def test_what_was_loaded_and_what_not_stands_in_one_line(network, state, tmp_path):
    torch.save(moco_v3(state), tmp_path / "weights.pth")
    loaded = load_initial(network, SPEC, str(tmp_path / "weights.pth"))
    assert str(loaded) == (
        f"initial weights from {tmp_path}/weights.pth below 'state_dict.module.base_encoder.': 105 of 105 tensors; "
        "adapted: none; missing: none; left out: fc.0.weight"
    )


def test_the_digest_is_that_of_the_tensors_wherever_they_lie(network, state, tmp_path):
    """Of the encoder's alone: neither of what stands beside it, nor of the name of the file."""
    torch.save(state, tmp_path / "a.pth")
    torch.save({"backbone": state, "epoch": 3, "queue": torch.zeros(3)}, tmp_path / "b.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "c.safetensors")
    changed = state | {"bn1.bias": torch.nextafter(state["bn1.bias"], torch.ones(()))}
    torch.save(changed, tmp_path / "d.pth")
    names = ("a.pth", "b.pth", "c.safetensors", "d.pth")
    digests = [load_initial(network, SPEC, str(tmp_path / name)).digest for name in names]
    assert len(set(digests[:3])) == 1
    assert digests[3] != digests[0]
    assert len(digests[0]) == 32


def test_lightlys_own_resnet(tmp_path):
    """Its convolutions are those of a stem for small images, and its shortcuts have a name of their own."""
    torch.manual_seed(2)
    lightly = pytest.importorskip("lightly.models", reason="lightly is not installed")
    resnet = lightly.ResNetGenerator("resnet-18").eval()
    encoder = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))
    torch.save(below("backbone.", encoder.state_dict()), tmp_path / "weights.ckpt")
    spec = BackboneSpec("resnet18", 3, 32)
    network = build_backbone(spec).eval()
    assert load_initial(network, spec, str(tmp_path / "weights.ckpt")).missing == ()
    resnet.linear = nn.Identity()
    same(network, resnet, IMAGES[..., :32, :32])


def test_a_vision_transformer_of_lightly_and_of_another_size(tmp_path):
    """DINO's names of a ViT are timm's. Patches of 16 at 224 px become patches of 8 at 64 px, as timm does it."""
    vit = other(3, "vit_tiny_patch16_224")
    torch.save(below("student_backbone.", vit.state_dict()), tmp_path / "weights.ckpt")
    modules = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
    masked = modules.MaskedVisionTransformerTIMM(vit, weight_initialization="skip")
    torch.save({"state_dict": below("backbone.", masked.state_dict())}, tmp_path / "lightly.ckpt")
    network = build_backbone(VIT)
    loaded = [load_initial(network, VIT, str(tmp_path / name)) for name in ("weights.ckpt", "lightly.ckpt")]
    assert [one.prefix for one in loaded] == ["student_backbone.", "state_dict.backbone.vit."]
    assert {one.adapted for one in loaded} == {
        ("pos_embed from 1x197x192 to 1x65x192", "patch_embed.proj.weight from 192x3x16x16 to 192x3x8x8")
    }
    expected = resample_abs_pos_embed(vit.pos_embed, [8, 8])
    torch.testing.assert_close(network.pos_embed, expected)
    assert loaded[0].missing == ()


def test_grey_images_adapt_the_first_convolution_as_timm_does(source, state, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    spec = BackboneSpec("resnet18", 1, 160)
    network = other(0, in_chans=1, **THIN)
    loaded = load_initial(network, spec, str(tmp_path / "weights.pth"))
    assert loaded.adapted == ("conv1.weight from 64x3x7x7 to 64x1x7x7",)
    torch.testing.assert_close(network.conv1.weight, adapt_input_conv(1, state["conv1.weight"]))
    grey = IMAGES[:, :1]
    same(network, lambda _: source(grey.expand(-1, 3, -1, -1)), grey)


def test_a_narrowed_stem_sees_a_small_image_as_the_wide_one_sees_it_enlarged(tmp_path):
    state = other(1).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    spec = BackboneSpec("resnet18", 3, 28)
    network = build_backbone(spec)
    loaded = load_initial(network, spec, str(tmp_path / "weights.pth"))
    assert loaded.adapted == ("conv1.weight from 64x3x7x7 to 64x3x3x3",)
    patch = IMAGES[:, :, :3, :3]
    large = nn.functional.interpolate(patch, size=7, mode="bicubic")
    with torch.no_grad():
        narrow = nn.functional.conv2d(patch, network.conv1.weight)
        wide = nn.functional.conv2d(large, state["conv1.weight"])
    torch.testing.assert_close(narrow, wide, atol=1e-4, rtol=1e-4)


def test_a_run_and_its_exported_backbone(network, source, tmp_path):
    source.timm_arguments = {"num_classes": 0, "in_chans": 3, **THIN}
    save_backbone(source, SPEC, tmp_path / "run" / "backbone")
    for where in ("run", "run/backbone", "run/backbone/model.safetensors"):
        assert load_initial(network, SPEC, str(tmp_path / where)).missing == ()
        same(network, source)
    with pytest.raises(InputError, match=r"of backbone 'small' match .* give --backbone resnet18$"):
        load_initial(build_backbone(BackboneSpec()), BackboneSpec(), str(tmp_path / "run"))


def test_timms_own_sources(network, source, tmp_path, monkeypatch):
    source.timm_arguments = {"num_classes": 0, "in_chans": 3, **THIN}
    save_backbone(source, SPEC, tmp_path)
    before = torch.get_rng_state()
    assert load_initial(network, SPEC, f"local-dir:{tmp_path}").loaded == 105
    same(network, source)
    assert torch.equal(before, torch.get_rng_state())
    # timm's pretrained weights of that name, had its cache them.
    create, overlay = timm.create_model, {"file": str(tmp_path / "model.safetensors"), "num_classes": 0}
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, pretrained_cfg_overlay=overlay, **THIN, **k))
    network.conv1.weight.data.zero_()
    assert load_initial(network, SPEC, "timm").loaded == 105
    same(network, source)


def test_an_export_that_timm_alone_cannot_build_is_read_all_the_same(tmp_path):
    torch.manual_seed(4)
    source, spec = build_backbone(BackboneSpec()).eval(), BackboneSpec()
    save_backbone(source, spec, tmp_path)
    network = build_backbone(spec)
    assert load_initial(network, spec, f"local-dir:{tmp_path}").missing == ()
    same(network, source, IMAGES[..., :28, :28])


@pytest.mark.parametrize("given", ["timm", "hf-hub:timm/resnet18.a1_in1k"])
def test_without_a_network_timms_weights_are_one_line(network, given, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^no pretrained weights of .*resnet18.* without a network give a file$"):
        load_initial(network, SPEC, given)


def write_broken(path):
    path.write_bytes(b"PK\x03\x04 no archive")


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (lambda path: None, "w.pth", "no initial weights at .*w.pth: give random, timm, hf-hub:NAME"),
        (lambda path: path.touch(), "w.pth", "w.pth is empty"),
        (lambda path: path.touch(), "w.safetensors", "w.safetensors is empty"),
        (lambda path: path.mkdir(), "w", "no initial weights at .*w/model.safetensors"),
        (write_broken, "w.pth", "w.pth cannot be read as weights"),
        (write_broken, "w.safetensors", "w.safetensors cannot be read as weights"),
        (lambda path: path.write_text("hello"), "w.pth", "w.pth cannot be read as weights"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "w.pth", r"w.pth holds objects \(torch.nn.modules.linear"),
        (lambda path: torch.save({"epoch": 3}, path), "w.pth", "w.pth holds no tensors"),
        (lambda path: save_file({"a": torch.zeros(2)}, path), "w.safetensors", "0 of the 105 tensors .* give others"),
        (
            lambda path: torch.save(timm.create_model("resnet34", **THIN).state_dict(), path),
            "w.pth",
            "another network: 105 of the 105 tensors of backbone 'resnet18' match by name and shape, and 80 more",
        ),
        (
            lambda path: torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), path),
            "w.pth",
            "another network: 0 of the 105",
        ),
        (
            lambda path: torch.save(other(1, **THIN).state_dict() | {"bn1.bias": torch.full((64,), torch.nan)}, path),
            "w.pth",
            "bn1.bias has values that are not finite",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(write, name, message, network, tmp_path):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        load_initial(network, SPEC, str(tmp_path / name))
    assert "\n" not in str(error.value)
