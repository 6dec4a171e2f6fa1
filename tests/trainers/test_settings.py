"""Settings: which layer wins, where each value came from, and one clear line for each thing that can be wrong."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from torch import nn

from amimv import InputError, user_path
from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.methods import METHODS
from amimv.pipelines import HARD, Recipe, ViewPolicy, load_store
from amimv.pipelines.operations import OPERATIONS
from amimv.pipelines.sources.listing import SPLITS
from amimv.trainers.build import make_recipe
from amimv.trainers.checks import check
from amimv.trainers.data_settings import PATH
from amimv.trainers.layers import CONFIGS, RECIPE_ALIASES, from_yaml, resolve, to_yaml
from amimv.trainers.settings import METHOD_ALIASES, PretrainSettings, of_role, settings_class


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def refused(*flags: str) -> str:
    """The one line that resolving these flags ends in."""
    with pytest.raises(InputError) as caught:
        resolve(list(flags))
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_file(folder: Path, text: str) -> str:
    message = refused("--config", str(write(folder, text)))
    assert "own.yaml" in message
    return message


# Layers


def test_each_layer_wins_over_those_below_it(tmp_path: Path) -> None:
    config = write(tmp_path, "weight_decay: 0.5\nwarmup: 0.25\n")
    settings, sources = resolve(
        ["--method", "mimv", "--preset", "small", "--config", str(config), "--warmup", "0.125"]
    )
    method_file = yaml.safe_load((CONFIGS / "mimv.yaml").read_text())
    preset_file = yaml.safe_load((CONFIGS / "presets" / "small.yaml").read_text())
    # warmup stands in all layers, weight_decay in all but the flags, and so on down to the dataclass.
    assert (settings.warmup, sources["warmup"]) == (0.125, "flag")
    assert (settings.weight_decay, sources["weight_decay"]) == (0.5, str(config))
    assert (settings.optimizer, sources["optimizer"]) == (preset_file["optimizer"], "preset small")
    assert settings.optimizer != method_file["optimizer"]
    momentum = (settings.optimizer_momentum, sources["optimizer_momentum"])
    assert momentum == (method_file["optimizer_momentum"], "configs/mimv.yaml")
    assert (settings.grey_p, sources["grey_p"]) == (settings_class("mimv").grey_p, "default")
    assert (settings.recipe, sources["recipe"]) == ("mimv", "configs/mimv.yaml")
    assert set(sources) == set(vars(settings))


def test_the_order_on_the_command_line_does_not_matter(tmp_path: Path) -> None:
    config = str(write(tmp_path, "lr: 0.25\nhue: 0.0\nmethod: simclr\n"))
    flags = [("--config", config), ("--preset", "none"), ("--lr", "0.125"), ("--backbone", "resnet18")]
    found = [resolve(list(itertools.chain(*order))) for order in itertools.permutations(flags)]
    assert all(one == found[0] for one in found)
    settings, sources = found[0]
    assert (settings.lr, settings.hue, settings.method) == (0.125, 0.0, "simclr")
    assert (sources["lr"], sources["hue"], sources["method"]) == ("flag", config, config)


def test_forms_of_flags() -> None:
    settings, sources = resolve(
        ["--method=simclr", "--lr=0.25", "--batch_size", "8", "--no-evaluate", "--no-sync-bn", "--compile"]
    )
    assert settings.method == "simclr"
    assert (settings.lr, settings.batch_size, settings.evaluate) == (0.25, 8, False)
    assert (settings.sync_bn, settings.compile) == (False, True)
    for name in ("method", "lr", "batch_size", "evaluate", "sync_bn", "compile"):
        assert sources[name] == "flag", name
    assert sources["seed"] == "default"


def test_a_flag_that_repeats_the_value_below_it_is_still_a_flag() -> None:
    settings, sources = resolve(["--seed", "0", "--label-fractions", "0.1", "1"])
    assert (settings.seed, sources["seed"]) == (0, "flag")
    assert settings.label_fractions == (0.1, 1.0)


def test_an_unknown_flag_ends_in_tyros_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        resolve(["--backbon", "resnet18"])
    assert caught.value.code == 2
    assert "--backbone" in capsys.readouterr().err


def test_settings_of_one_method_are_not_those_of_another(tmp_path: Path) -> None:
    settings, _ = resolve(["--method", "mimv", "--near-zero", "None", "--momentum", "0.5"])
    assert vars(settings)["near_zero"] is None
    assert vars(settings)["momentum"] == 0.5
    config = write(tmp_path, "near_zero: null\nlow: -0.5\n")
    settings, _ = resolve(["--method", "mimv", "--config", str(config)])
    assert vars(settings)["near_zero"] is None
    assert vars(settings)["low"] == -0.5
    assert "near_zero" in refused("--method", "simclr", "--config", str(config))


# Aliases, presets, lengths


@pytest.mark.parametrize(
    ("flags", "method", "recipe"),
    [
        ((), "mimv", RECIPE_ALIASES["amimv"]),
        (("--method", "amimv"), "mimv", RECIPE_ALIASES["amimv"]),
        (("--method", "mimv"), "mimv", "mimv"),
        (("--method", "simclr"), "simclr", "two-view"),
        (("--method", "simclr", "--recipe", "amimv"), "simclr", RECIPE_ALIASES["amimv"]),
        (("--method", "amimv", "--recipe", "amimv-roles"), "mimv", "amimv-roles"),
        (("--recipe", "N(x)+A(y) | A(x)+N(y)"), "mimv", "N(x)+A(y) | A(x)+N(y)"),
    ],
)
def test_aliases_are_resolved(flags: tuple[str, ...], method: str, recipe: str) -> None:
    settings, _ = resolve(list(flags))
    assert (settings.method, settings.recipe) == (method, recipe)


def test_the_length_of_a_higher_layer_unsets_the_other_below(tmp_path: Path) -> None:
    def length(*flags: str) -> tuple[int | None, int | None]:
        settings, _ = resolve(["--method", "mimv", *flags])
        assert settings.minutes is None
        return settings.epochs, settings.steps

    assert length("--preset", "none") == (2000, None)
    assert length("--preset", "small") == (None, 1500)
    epochs = str(write(tmp_path, "epochs: 3\n"))
    assert length("--config", epochs) == (3, None)
    assert length("--steps", "9", "--config", epochs) == (None, 9)
    assert length("--preset", "small", "--epochs", "2") == (2, None)
    assert length("--preset", "none", "--steps=5") == (None, 5)
    settings, _ = resolve(["--minutes", "0.5", "--config", epochs])
    assert (settings.epochs, settings.steps, settings.minutes) == (None, None, 0.5)


def test_both_lengths_in_one_layer_are_an_error(tmp_path: Path) -> None:
    message = refused("--epochs", "3", "--steps", "4")
    assert "command line" in message
    assert "both epochs and steps" in message
    assert "both epochs and steps" in refused_file(tmp_path, "epochs: 3\nsteps: 4\n")
    assert "both steps and minutes" in refused("--minutes", "1", "--steps", "4")


def test_no_length_is_an_error() -> None:
    assert "--epochs, --steps, --views or --minutes" in refused("--preset", "none", "--epochs", "None")


# Published defaults


def linear_shapes(settings: PretrainSettings) -> list[tuple[int, int]]:
    """(in, out) of the projector's layers on a ResNet-18."""
    backbone = build_backbone(BackboneSpec(settings.backbone))
    method = METHODS[settings.method].build(backbone, settings)
    return [tuple(w.shape[::-1]) for n, w in method.online.projector.named_parameters() if w.ndim == 2]


def hard_augmentation(s: PretrainSettings) -> tuple[object, ...]:
    jitter = (s.brightness, s.contrast, s.saturation, s.hue, s.jitter_p)
    return (*jitter, s.grey_p, s.crop_min, s.crop_max, s.hflip, s.vflip, s.rotation, s.blur_p, s.solarise_p)


def test_published_defaults_of_mimv() -> None:
    s = published("mimv")
    assert (s.epochs, s.steps, s.epochs * s.warmup) == (2000, None, pytest.approx(200))
    assert (s.optimizer, s.lr, s.optimizer_momentum, s.weight_decay) == ("sgd", 3.0, 0.9, 1e-4)
    assert (s.batch_size, s.lr_batch) == (1024, 1024)
    assert (vars(s)["temperature"], vars(s)["momentum"]) == (0.3, 0.9)
    assert (s.recipe, s.sampler, s.partner, s.partners) == ("mimv", "uniform", "uniform", 1)
    assert linear_shapes(s) == [(512, 512), (512, 512), (512, 128)]
    assert hard_augmentation(s) == (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.08, 1.0, 0.5, 0.0, 0.0, 0.5, 0.0)


#: Of each method: (peak learning rate, weight decay), its own settings, widths of the projector's and of the head's
#: layers on the 512 features of a ResNet-18. Batch 256, 1,000 epochs.
PUBLISHED: dict[str, tuple[tuple[float, float], dict[str, float | None], list[int], list[int]]] = {
    "simclr": (
        (0.4, 1e-4),
        {"temperature": 0.2},
        [512, 2048, 256],
        [],
    ),
    "moco-v3": (
        (0.3, 1e-6),
        {"temperature": 0.2, "momentum": 0.99},
        [512, 4096, 256],
        [256, 4096, 256],
    ),
    "byol": (
        (1.0, 1e-5),
        {"momentum": 0.99},
        [512, 4096, 256],
        [256, 4096, 256],
    ),
    "dino": (
        (0.3, 1e-6),
        {
            "student_temperature": 0.1,
            "teacher_temperature": 0.07,
            "teacher_temperature_start": 0.04,
            "momentum": 0.9995,
            "centre_momentum": 0.9,
        },
        [512, 2048, 2048, 256],
        [256, 4096],
    ),
    "ressl": (
        (0.05, 1e-4),
        {"student_temperature": 0.1, "teacher_temperature": 0.04, "queue": 65536, "momentum": 0.99},
        [512, 4096, 256],
        [],
    ),
    "nnclr": (
        (0.4, 1e-5),
        {"temperature": 0.2, "queue": 65536},
        [512, 2048, 2048, 256],
        [256, 4096, 256],
    ),
    "vicreg": (
        (0.3, 1e-4),
        {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
        [512, 2048, 2048, 2048],
        [],
    ),
    "barlow-twins": (
        (0.3, 1e-4),
        {"redundancy": 0.0051, "loss_scale": 0.1},
        [512, 2048, 2048, 2048],
        [],
    ),
    "simsiam": (
        (0.5, 1e-5),
        {"fixed_predictor_lr": True},
        [512, 2048, 2048, 2048],
        [2048, 512, 2048],
    ),
    "swav": (
        (0.6, 1e-6),
        {"temperature": 0.1, "queue": 3840, "prototypes": 3000},
        [512, 2048, 128],
        [128, 3000],
    ),
}
SGD = ("ressl", "simsiam")


class Features(nn.Module):
    """Stands for a ResNet-18, of which the heads only know the width."""

    num_features = 512


def widths(network: nn.Module | None) -> list[int]:
    """Of the layers of a head, from the first's input on."""
    weights = [] if network is None else [w for _, w in network.named_parameters() if w.ndim == 2]
    for one, following in itertools.pairwise(weights):
        assert one.shape[0] == following.shape[1]
    return [weights[0].shape[1], *(w.shape[0] for w in weights)] if weights else []


def published(method: str) -> PretrainSettings:
    """As resolved for a published set on a ResNet-18; shown by ``pytest -s``."""
    flags = ["--method", method, "--backbone", "resnet18", "--preset", "none", "--data", "retinamnist"]
    settings, sources = resolve(flags)
    print(f"\n# {' '.join(flags)}\n{to_yaml(settings, sources)}")
    return settings


def test_every_method_has_its_published_settings() -> None:
    for name in (*METHODS, *METHOD_ALIASES):
        assert (CONFIGS / f"{name}.yaml").is_file(), name
    assert set(PUBLISHED) <= set(METHODS)


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_defaults(method: str) -> None:
    (lr, weight_decay), own, projector, head = PUBLISHED[method]
    s = published(method)
    assert (s.epochs, s.steps, s.epochs * s.warmup) == (1000, None, pytest.approx(10))
    assert (s.lr, s.weight_decay, s.batch_size, s.lr_batch) == (lr, weight_decay, 256, 256)
    assert s.optimizer_momentum == 0.9
    if method in SGD:
        assert s.optimizer == "sgd"
    else:
        assert (s.optimizer, s.trust_coefficient) == ("larc", 0.02)
    assert (s.recipe, s.sampler, s.partner, s.rho) == ("two-view", "uniform", "uniform", 1.0)
    assert {name: getattr(s, name) for name in own} == own
    online = METHODS[s.method].build(Features(), replace(s, **({"queue": 8} if "queue" in vars(s) else {}))).online
    assert widths(online.projector) == projector
    assert widths(online.head) == head


def test_published_defaults_of_simclr_with_a_temperature_schedule() -> None:
    s = published("simclr-ts")
    assert (s.method, s.recipe) == ("simclr-ts", "two-view")
    own = vars(s)
    assert (own["temperature"], own["highest_temperature"], own["periods"]) == (0.1, 1.0, 5.0)
    assert (s.epochs, s.epochs * s.warmup) == (2000, pytest.approx(10))
    assert (s.optimizer, s.optimizer_momentum, s.lr, s.weight_decay) == ("sgd", 0.9, 0.5, 1e-4)
    assert (s.batch_size, s.lr_batch) == (512, 512)
    assert widths(METHODS["simclr-ts"].build(Features(), s).online.projector) == [512, 512, 128]


def test_published_lengths_of_phases_in_epochs() -> None:
    dino, swav = vars(published("dino")), vars(published("swav"))
    assert dino["freeze_prototypes"] * dino["epochs"] == pytest.approx(1)
    assert dino["teacher_temperature_warmup"] * dino["epochs"] == pytest.approx(50)
    assert swav["freeze_prototypes"] * swav["epochs"] == pytest.approx(2)
    assert swav["queue_start"] * swav["epochs"] == pytest.approx(50)


# Both sides' augmentation


def both_policies(recipe: Recipe) -> tuple[ViewPolicy, ViewPolicy]:
    assert recipe.name == "two-view"
    (a,), (b,) = recipe.sides
    return a.policy, b.policy


#: (brightness, contrast, saturation, hue), (jitter, grey, blur, solarise) probabilities and smallest crop of side a.
SIDE_A = {
    "simclr": ((0.8, 0.8, 0.8, 0.2), (0.8, 0.2, 0.5, 0.0), 0.08),
    "simclr-ts": ((0.4, 0.4, 0.4, 0.1), (0.8, 0.2, 0.0, 0.0), 0.1),
    "swav": ((0.8, 0.8, 0.8, 0.2), (0.8, 0.2, 0.5, 0.0), 0.08),
    "moco-v3": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.0, 0.0), 0.08),
    "byol": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.0, 0.0), 0.08),
    "dino": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.0, 0.0), 0.08),
    "nnclr": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.0, 0.0), 0.08),
    "barlow-twins": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.0, 0.0), 0.08),
    "vicreg": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.0, 0.1), 0.2),
    "ressl": ((0.4, 0.4, 0.2, 0.1), (0.8, 0.2, 0.5, 0.0), 0.08),
    "simsiam": ((0.4, 0.4, 0.4, 0.1), (0.8, 0.2, 0.5, 0.0), 0.08),
}
#: What of it another side b has.
SIDE_B: dict[str, dict[str, Any]] = {
    **{name: {"solarise_p": 0.2} for name in ("moco-v3", "byol", "dino", "nnclr", "barlow-twins")},
    "ressl": {"jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0},
}


@pytest.mark.parametrize("method", SIDE_A)
def test_published_augmentation_of_both_sides(method: str) -> None:
    first, second = both_policies(make_recipe(published(method)))
    a, b = (SimpleNamespace(**policy.settings()) for policy in (first, second))
    jitter, probabilities, smallest = SIDE_A[method]
    assert (a.brightness, a.contrast, a.saturation, a.hue) == jitter
    assert (a.jitter_p, a.grey_p, a.blur_p, a.solarise_p) == probabilities
    assert (a.crop_min, a.crop_max, a.crop_ratio) == (smallest, 1.0, (3 / 4, 4 / 3))
    assert (a.hflip, a.vflip, a.rotation) == (0.5, 0.0, 0.0)
    assert second == first.changed(**SIDE_B.get(method, {}))
    if method == "ressl":
        only_cropped_and_mirrored = (b.jitter_p, b.grey_p, b.blur_p, b.solarise_p, b.rotation, b.vflip)
        assert only_cropped_and_mirrored == (0.0,) * 6


@pytest.mark.parametrize("method", SIDE_A)
@pytest.mark.parametrize("preset", ["small", "dermatoscopy", "xray", "microscopy"])
def test_presets_give_both_sides_the_same_augmentation(preset: str, method: str) -> None:
    settings, _ = resolve(["--method", method, "--preset", preset])
    a, b = both_policies(make_recipe(settings))
    assert a.settings()["solarise_p"] == 0.0
    assert b == (a.changed(**SIDE_B["ressl"]) if method == "ressl" else a)


def test_a_flag_for_the_second_side_changes_that_side_only() -> None:
    settings, _ = resolve(["--method", "simclr", "--second", "blur_p=0.125", "crop_min=.5"])
    a, b = both_policies(make_recipe(settings))
    assert b == a.changed(crop_min=0.5, blur_p=0.125) != a


SECONDS: list[tuple[str, list[str], dict[str, float]]] = [
    ("", [], {"solarise_p": 0.2}),
    ("second: {blur_p: 0.125}", [], {"solarise_p": 0.2, "blur_p": 0.125}),
    ("second_blur_p: 0.125", [], {"solarise_p": 0.2, "blur_p": 0.125}),
    ("second: {solarise_p: null, hue: 0}", [], {"hue": 0.0}),
    ("second_solarise_p: null\nsecond_crop_min: 0.5", [], {"crop_min": 0.5}),
    ("second: [solarise_p=0.5, grey_p=0]", [], {"solarise_p": 0.5, "grey_p": 0.0}),
    ("second: {blur_p: 0.125}", ["--second", "blur_p=None", "crop_min=.5"], {"solarise_p": 0.2, "crop_min": 0.5}),
    ("second_blur_p: 0.125", ["--second", "solarise_p=None"], {"blur_p": 0.125}),
]


@pytest.mark.parametrize(("text", "flags", "changes"), SECONDS)
def test_overrides_of_the_second_side_lie_on_those_below_in_old_words_and_new(
    tmp_path: Path, text: str, flags: list[str], changes: dict[str, float]
) -> None:
    """BYOL as published solarises side b."""
    config = write(tmp_path, f"method: byol\npreset: none\ndata: retinamnist\n{text}\n")
    settings, sources = resolve(["--config", str(config), *flags])
    a, b = both_policies(make_recipe(settings))
    assert b == a.changed(**changes) != a
    assert sources["second"] == ("flag" if flags else str(config) if text else "configs/byol.yaml")
    again = write(tmp_path, to_yaml(settings, sources))
    assert from_yaml(again).second == settings.second == resolve(["--config", str(again)])[0].second


def test_side_b_may_have_what_side_a_does_without() -> None:
    settings, _ = resolve(["--method", "simclr", "--jitter-p", "0", "--hue", "0.25", "--second", "jitter_p=1"])
    a, b = (SimpleNamespace(**policy.settings()) for policy in both_policies(make_recipe(settings)))
    assert (a.jitter_p, b.jitter_p, b.hue) == (0.0, 1.0, 0.25)


def test_every_setting_of_every_operation_is_a_setting(tmp_path: Path) -> None:
    """A flag, a line of a file, and what the views are made by; what MIMV does without is off."""
    text = "A(x)+S(y) | N(x)+A'(y)+L(y)"
    examples = {name: v for kind in OPERATIONS for example in kind.examples.values() for name, v in example.items()}
    flags = []
    for name, value in examples.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    settings, sources = resolve(["--recipe", text, *flags])
    assert settings.policy() == HARD.changed(**examples)
    again = from_yaml(write(tmp_path, to_yaml(settings, sources)))
    assert again == settings
    recipe = make_recipe(again)
    assert recipe.name == text
    assert [view.label for side in recipe.sides for view in side] == ["A(x)", "S(y)", "N(x)", "A'(y)", "L1(y)"]
    assert recipe.sides[0][1].policy == HARD.changed(**examples).soft()
    assert published("mimv").policy() == HARD


# What can be wrong


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--method", "simcrl"), "unknown method 'simcrl': did you mean simclr"),
        (("--recipe", "two-veiw"), "unknown recipe 'two-veiw': did you mean two-view"),
        (("--recipe", "A(x) | B(x)"), "'B' at character 8, expected one of N, A, H, S, L for a view"),
        (("--recipe", "A(x)\n|A(y2)"), "leaves out an image"),
        (("--recipe", "A(x) | A(y)+A(y2)", "--partners", "2"), "names its own, but partners is 2"),
        (
            ("--recipe", "two-view", "--partners", "2"),
            "recipe two-view has no partner, but partners is 2: leave one of them out",
        ),
        (("--blur-sigma", "2", "0.1"), "blur_sigma is (2.0, 0.1), expected (smallest, largest), each more than 0"),
        (("--noise-std", "0.1", "1.5"), "noise_std is (0.1, 1.5)"),
        (("--brightness", "inf"), "brightness is inf"),
        (("--sampler", "class-balance"), "unknown sampler 'class-balance': did you mean class-balanced"),
        (("--partner", "square"), "unknown partner sampler 'square': did you mean square-root"),
        (("--preset", "smal"), "unknown preset 'smal': did you mean small"),
        (("--backend", "korni"), "unknown backend 'korni': did you mean kornia"),
        (("--profile", "expo"), "unknown profile 'expo': did you mean exp"),
        (("--size", "32"), "unknown size '32'"),
        (("--resume", "yes"), "unknown resume mode 'yes'"),
        (("--warmup", "1"), "warmup is 1.0"),
        (("--label-fractions", "0"), "label fractions are (0.0,)"),
        (("--supervised-lr", "0"), "supervised learning rates are (0.0,), expected one or more above 0"),
        (("--supervised-lr", "0.1", "-1"), "supervised learning rates are (0.1, -1.0)"),
        (("--supervised-lr", "nan"), "supervised learning rates are (nan,)"),
        (("--supervised-lr", "0.1", "inf"), "supervised learning rates are (0.1, inf)"),
        (("--supervised-steps", "-1"), "supervised_steps is -1, expected at least 0"),
        (("--baselines", "maybe"), "unknown value of baselines 'maybe'"),
        (("--baselines", "onyl"), "unknown value of baselines 'onyl': did you mean only"),
        (("--partners", "0"), "partners is 0, expected at least 1"),
        (("--crop-min", "0"), "crop_min is 0.0"),
        (("--hflip", "2"), "hflip is 2.0"),
        (("--second", "blur_p=2"), "blur_p is 2.0"),
        (("--second", "blurp=2"), "unknown setting of an operation 'blurp': did you mean blur_p"),
        (("--second", "blur_p"), "second is 'blur_p', expected NAME=VALUE"),
        (("--second", "blur_p=often"), "second is 'blur_p=often', expected NAME=VALUE"),
        (("--second-blur-p", "2"), "--second-blur-p is now an override: give --second blur_p=VALUE"),
        (("--size", "0"), "size is 0, expected at least 1"),
        (("--root", ""), "root is empty"),
        (("--method", "mocov3"), "unknown method 'mocov3': did you mean moco-v3"),
        (("--method", "simclr", "--temperature", "0"), "temperature is 0.0, expected more than 0"),
        (("--method", "ressl", "--teacher-temperature", "-1"), "teacher_temperature is -1.0, expected more than 0"),
        (("--method", "nnclr", "--queue", "0"), "queue is 0, expected at least 1"),
        (("--method", "byol", "--momentum", "1.5"), "momentum is 1.5, expected 0 to 1"),
        (("--method", "dino", "--centre-momentum", "-1"), "centre_momentum is -1.0, expected 0 to 1"),
        (("--method", "dino", "--prototypes", "1"), "prototypes is 1, expected at least 2"),
        (("--method", "swav", "--prototypes", "1"), "prototypes is 1, expected at least 2"),
        (("--method", "swav", "--iterations", "0"), "iterations is 0, expected at least 1"),
        (("--method", "simsiam", "--predictor-hidden", "0"), "predictor_hidden is 0, expected at least 1"),
    ],
)
def test_bad_values_on_the_command_line(flags: tuple[str, ...], expected: str) -> None:
    assert expected in refused(*flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batchsize: 3\n", "unknown setting 'batchsize': did you mean batch_size"),
        ("qqqq: 3\n", "unknown setting 'qqqq', see --help"),
        ("1: 3\n", "unknown setting '1'"),
        ("batch_size: many\n", "batch_size is 'many', expected int"),
        ("batch_size: true\n", "batch_size is True, expected int"),
        ("batch_size: 2.5\n", "batch_size is 2.5, expected int"),
        ("batch_size: .inf\n", "batch_size is inf, expected int"),
        ("batch_size: [3]\n", "batch_size is [3], expected int"),
        ("lr: high\n", "lr is 'high', expected float"),
        ("lr: true\n", "lr is True, expected float"),
        ("lr:\n", "lr is None, expected float"),
        ("evaluate: 1\n", "evaluate is 1, expected bool"),
        ("evaluate: never\n", "evaluate is 'never', expected bool"),
        ("name: 3\n", "name is 3, expected str"),
        ("label_fractions: half\n", "label_fractions is 'half', expected float"),
        ("label_fractions: [[0.5]]\n", "label_fractions is [[0.5]], expected float"),
        ("label_fractions: true\n", "label_fractions is True, expected float"),
        ("label_fractions:\n", "label_fractions is None, expected float"),
        ("label_fractions: [some]\n", "label_fractions is ['some'], expected"),
        ("supervised_lr: {a: 0.5}\n", "supervised_lr is {'a': 0.5}, expected float"),
        ("supervised_lr: [fast]\n", "supervised_lr is ['fast'], expected"),
        ("finetune: 1\n", "finetune is 1, expected bool"),
        ("baselines: true\n", "baselines is True, expected yes or no or only"),
        ("baselines: on\n", "unknown value of baselines 'on'"),
        ("mixed_precision: false\n", "mixed_precision is False, expected no or bf16 or fp16"),
        ("exclude_duplicates: 1\n", "exclude_duplicates is 1, expected auto or yes or no"),
        ("sampler: unifrom\n", "own.yaml: unknown sampler 'unifrom': did you mean uniform?"),
        ("warmup: 2\n", "own.yaml: warmup is 2.0, expected a share"),
        ("finetune: perhaps\n", "finetune is 'perhaps', expected bool: yes or no"),
        ("near_zero: small\n", "near_zero is 'small', expected float"),
        ("- lr\n", "holds no settings"),
        ("", "holds no settings"),
        ("lr: [1,\n", "not a readable YAML file"),
        ("lr: !!python/object/apply:os.getcwd []\n", "not a readable YAML file"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused_file(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "no such config file" in refused("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a readable YAML file" in refused("--config", str(tmp_path / "binary.yaml"))
    assert "not a readable YAML file" in refused("--config", str(tmp_path))


def test_bad_choices_in_a_file_are_found_as_well(tmp_path: Path) -> None:
    config = str(write(tmp_path, "method: mimw\n"))
    assert "unknown method 'mimw': did you mean mimv" in refused("--config", config)
    config = str(write(tmp_path, "preset: smal\n"))
    assert "unknown preset 'smal': did you mean small" in refused("--config", config)


def test_numbers_that_yaml_reads_as_text_are_fine(tmp_path: Path) -> None:
    config = write(tmp_path, "lr: 5e-3\nweight_decay: 0\nbatch_size: 64.0\nlabel_fractions: [1e-2, 1]\n")
    settings, _ = resolve(["--config", str(config)])
    assert (settings.lr, settings.weight_decay, settings.batch_size) == (0.005, 0.0, 64)
    assert isinstance(settings.weight_decay, float)
    assert isinstance(settings.batch_size, int)
    assert settings.label_fractions == (0.01, 1.0)


WORDS = [
    *(("baselines", word, word) for word in ("yes", "no", "only")),
    *(("exclude_duplicates", word, word) for word in ("yes", "no", "auto")),
    *(("mixed_precision", word, word) for word in ("no", "bf16")),
    *(("resume", word, word) for word in ("no", "auto")),
    *(("name", word, word) for word in ("no", "On", "OFF", "Yes", "2024-01-31", "1_000e3")),
    ("tracker", "off", "off"),
    *(("finetune", word, True) for word in ("yes", "on", "true", "True", "YES", "'on'")),
    *(("evaluate", word, False) for word in ("no", "off", "false", "False", "NO", "'off'")),
    ("supervised_lr", "5e-3", (5e-3,)),
    ("supervised_lr", "0.1", (0.1,)),
    ("label_fractions", "1", (1.0,)),
    ("label_fractions", "[5e-1, 1]", (0.5, 1.0)),
]


@pytest.mark.parametrize(("name", "text", "value"), WORDS)
def test_words_stay_words_and_a_scalar_is_a_tuple_of_one(tmp_path: Path, name: str, text: str, value: object) -> None:
    """As documented, and as ``yes``, ``no``, ``on`` and ``off`` are read elsewhere; what is written reads the same."""
    settings, sources = resolve(["--config", str(write(tmp_path, f"{name}: {text}\n"))])
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(value)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings, sources))
    assert name == "resume" or getattr(from_yaml(path), name) == value


@pytest.mark.parametrize("name", of_role(PATH))
def test_a_place_may_begin_at_home_wherever_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = str(tmp_path / "a" / "b.yaml")
    Path(wanted).parent.mkdir()
    Path(wanted).write_text("lr: 0.25\n")
    for flags in ([f"--{name}", "~/a/b.yaml"], [f"--{name}=~/a/b.yaml"]):
        assert getattr(resolve(flags)[0], name) == wanted
    assert resolve(["--config=~/a/b.yaml"])[0].lr == 0.25
    if name != "config":
        own = write(tmp_path, f"{name}: ~/a/b.yaml\n")
        assert getattr(resolve(["--config", str(own)])[0], name) == wanted
        assert getattr(from_yaml(own), name) == wanted
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_a_study_and_a_data_set_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(
        tmp_path / "x.npz",
        **{
            f"{split}_images": np.zeros((4, 28, 28), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None]
            for split in SPLITS
        },
        **{f"{split}_labels": np.array([0, 1, 0, 1]) for split in SPLITS},
    )
    assert len(load_store("~/x.npz")) == 4
    assert len(load_store("x.npz", root="~")) == 4
    with pytest.raises(InputError, match=r"no file ~nobody-of-this-name/x\.npz"):
        load_store("~nobody-of-this-name/x.npz")


def test_no_learning_rate_in_a_file_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path, "supervised_lr: []\n")
    assert "supervised learning rates are (), expected one or more above 0" in refused("--config", str(config))


def test_a_config_from_before_a_setting_was_there_still_reads(tmp_path: Path) -> None:
    settings, sources = resolve(["--method", "simclr"])
    new = ("supervised_lr", "finetune", "baselines")
    lines = [line for line in to_yaml(settings, sources).splitlines() if line.split(":")[0] not in new]
    path = write(tmp_path, "\n".join(lines) + "\n")
    assert from_yaml(path) == settings
    assert (settings.supervised_lr, settings.finetune, settings.baselines) == ((0.005,), False, "yes")


# There and back


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--method", "simclr", "--epochs", "3", "--lr", "1e-7", "--name", "yes # no: 'x'", "--label-fractions", "0.1"),
        ("--near-zero", "None", "--preset", "none", "--data", "retinamnist", "--rho", "100", "--no-evaluate"),
        ("--data", "some where/a.npz", "--backbone", "resnet18", "--root", "1", "--exclude-duplicates", "no"),
        ("--method", "simclr-ts", "--preset", "none"),
        ("--method", "byol", "--second", "crop_min=0.5", "crop_ratio=0.5,2", "solarise_p=None", "--preset", "none"),
        ("--baselines", "no", "--finetune", "--supervised-lr", "1e-4", "0.005"),
        ("--baselines", "yes"),
        *(("--method", method) for method in METHODS),
    ],
)
def test_a_runs_config_gives_the_same_settings_again(tmp_path: Path, flags: tuple[str, ...]) -> None:
    settings, sources = resolve(list(flags))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings, sources))
    again = from_yaml(path)
    assert type(again) is type(settings)
    assert again == settings
    resolved, new_sources = resolve(["--config", str(path)])
    assert vars(resolved) == vars(settings) | {"config": str(path)} or vars(resolved) == vars(settings)
    assert new_sources["lr"] == str(path)


def test_the_written_config_tells_where_each_value_came_from() -> None:
    settings, sources = resolve(["--method", "mimv", "--lr", "0.25"])
    lines = to_yaml(settings, sources).splitlines()
    found = {line.split(":")[0]: line.rpartition("# ")[2] for line in lines}
    assert found == {name: source for name, source in sources.items() if name not in ("config", "resume")}
    assert found["lr"] == "flag"
    assert found["crop_min"] == "preset small"


@pytest.mark.parametrize("method", [*METHODS, *METHOD_ALIASES])
@pytest.mark.parametrize("preset", ["none", "small", "dermatoscopy"])
def test_all_shipped_files_fit(method: str, preset: str) -> None:
    check(resolve(["--method", method, "--preset", preset])[0])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--method dino --teacher-temperature-start 0", "teacher_temperature_start is 0.0, expected more than 0"),
        ("--method swav --epsilon 0", "epsilon is 0.0, expected more than 0"),
        ("--method simclr-ts --highest-temperature -1", "highest_temperature is -1.0, expected more than 0"),
        ("--method byol --projector-hidden 0", "projector_hidden is 0, expected at least 1"),
        ("--method mimv --projector-hidden -1", "projector_hidden is -1, expected at least 1"),
        ("--lr -1", "lr is -1.0, expected more than 0"),
        ("--lr nan", "lr is nan, expected more than 0"),
        ("--weight-decay -1", "weight_decay is -1.0, expected 0 to 1"),
        ("--temperature nan", "temperature is nan, expected more than 0"),
        ("--near-zero inf", "near_zero is inf, expected a number"),
        ("--method dino --freeze-prototypes 2", "freeze_prototypes is 2.0, expected 0 to 1"),
        ("--batch-size 0", "batch_size is 0, expected at least 1"),
        ("--method simclr --preset none --weight-decay 0", "weight decay 0 turns the adaptation of larc off"),
    ],
)
def test_numbers_out_of_range_are_one_line(flags: str, said: str) -> None:
    assert said in refused(*flags.split())
