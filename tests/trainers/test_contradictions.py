"""Settings that undo each other are refused in one line; those that do nothing beside the others are told once."""

import inspect
import logging
from pathlib import Path

import pytest

from amimv import InputError
from amimv.models.methods import METHODS
from amimv.pipelines import RECIPES
from amimv.trainers.build import make_recipe
from amimv.trainers.conditions import one_image
from amimv.trainers.layers import resolve, settings_from
from amimv.trainers.settings import METHOD_ALIASES

CONTRADICTIONS = [
    ("--indices x.npy --rho 100", "indices are the training subset, which rho 100.0 would draw"),
    ("--indices x.npy --profile step", "which profile step would draw"),
    ("--indices x.npy --total 50 --rho 5 --profile pareto", "which profile pareto, rho 5.0, total 50 would draw"),
    ("--rho 3 --profile natural", "profile natural has no ratio, but rho is 3"),
    ("--recipe two-view --partners 2", "recipe two-view has no partner, but partners is 2"),
    ("--method simclr --partners 3", "recipe two-view has no partner, but partners is 3"),
    ("--finetune --supervised-steps 0", "finetune trains for supervised_steps, which is 0"),
    ("--finetune --baselines only", "baselines only trains nothing that finetune could start from"),
    ("--epochs 3 --steps 4", "gives both epochs and steps"),
]


def as_yaml(flags: str) -> dict[str, object]:
    words = flags.replace("--finetune", "--finetune yes").split()
    return {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize(("flags", "said"), CONTRADICTIONS)
def test_what_contradicts_is_refused_from_everywhere(tmp_path: Path, flags: str, said: str) -> None:
    """By flags, by a file, by both, and in a study, which reads its cells by `settings_from`."""
    content = as_yaml(flags)
    lines = [f"{name}: {value}\n" for name, value in content.items()]
    for i in range(len(lines) + 1):
        config = tmp_path / "own.yaml"
        config.write_text("data_seed: 0\n" + "".join(lines[:i]))
        rest = [word for name, value in list(content.items())[i:] for word in (f"--{name}", str(value))]
        rest = " ".join(rest).replace("--finetune yes", "--finetune").split()
        if "steps" in content and "epochs" in content and 0 < i < len(lines):
            assert resolve(["--config", str(config), *rest])[0].epochs is None  # the higher layer wins
            continue
        with pytest.raises(InputError) as caught:
            resolve(["--config", str(config), *rest])
        assert said in str(caught.value)
        assert len(str(caught.value)) < 200
    with pytest.raises(InputError, match=r"^grid g"):
        settings_from(content, "grid g")


@pytest.mark.parametrize(
    "flags",
    [
        "--indices x.npy --rho 1 --profile exp --total None",
        "--indices x.npy --label-fractions 0.1 --data-seed 3",
        "--method simclr --partners 1 --partner uniform",
        "--method simclr --recipe mimv --partners 2 --partner square-root",
        "--supervised-steps 0",
        "--finetune --baselines no",
        "--no-evaluate --finetune --label-fractions 0.1",
        "--baselines only --no-finetune",
        "--profile natural --total 70",
    ],
)
def test_what_goes_together_is_accepted(flags: str) -> None:
    resolve(flags.split())


@pytest.mark.parametrize("method", [*METHODS, *METHOD_ALIASES])
@pytest.mark.parametrize("recipe", ["two-view", "amimv-strength"])
def test_what_files_and_presets_set_is_never_held_against_the_user(
    method: str, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amimv")
    for preset in ("none", "small"):
        resolve(["--method", method, "--recipe", recipe, "--preset", preset, "--optimizer", "adamw"])
    assert not caplog.records


IDLES = [
    ("--recipe multi-crop --partner square-root", "partner: recipe multi-crop has no partner"),
    ("--method simclr --online soft", "online: recipe two-view has no hard and soft strength"),
    (
        "--method mimv --second blur_p=0.1 crop_min=0.5",
        "second: recipe mimv has partners",
    ),
    ("--local-crops 3", "local_crops: recipe amimv-views has no local crops"),
    ("--sampler class-balanced --beta 0.9", "beta: no sampler is effective-number"),
    ("--clusters 9 --cluster-every 2", "clusters, cluster_every: no sampler is cluster-balanced"),
    ("--method byol --exclude-duplicates yes", "exclude_duplicates: method byol has no negatives"),
    ("--jitter-p 0 --hue 0.1", "hue: the views have no jitter"),
    ("--optimizer adamw --trust-coefficient 0.1", "trust_coefficient: optimizer adamw is no form of LARS"),
    ("--optimizer adamw --optimizer-momentum 0.5", "optimizer_momentum: optimizer adamw has none"),
    ("--supervised-steps 0 --supervised-lr 0.1", "supervised_lr: nothing is trained on labels"),
    ("--baselines no --supervised-steps 9", "supervised_steps: nothing is trained on labels"),
    ("--data retinamnist --data-seed 4", "data_seed: neither phantom, a subset nor a share of the labels is drawn"),
    ("--root somewhere", "root: phantom is not looked for there"),
    ("--cache kept", "cache: phantom is neither a folder of images"),
    ("--baselines only --method simclr --lr 3 --hue 0.1 --seed 2", "method, lr: baselines only trains nothing"),
    ("--baselines only --no-evaluate", "evaluate: baselines only trains nothing, and evaluates always"),
]


@pytest.mark.parametrize(("flags", "said"), IDLES)
def test_flags_that_do_nothing_are_told_in_one_line(flags: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    resolve(flags.split())
    (record,) = caplog.records
    assert record.message.startswith(f"no effect here: {said}")
    assert "\n" not in record.message
    assert len(record.message) < 200


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe amimv-strength --online soft",
        "--method byol --second blur_p=0.1",
        "--recipe multi-crop --local-crops 3",
        "--partner effective-number --beta 0.9",
        "--partner cluster-balanced --clusters 9",
        "--method simclr --exclude-duplicates yes",
        "--method byol --jitter-p 0 --second jitter_p=0.5 --hue 0.1",
        "--optimizer larc --trust-coefficient 0.1 --optimizer-momentum 0.8",
        "--baselines no --finetune --supervised-lr 0.1",
        "--data retinamnist --data-seed 4 --label-fractions 0.1 1",
        "--data retinamnist --data-seed 4 --rho 7",
        "--data retinamnist --root somewhere",
        "--baselines only --seed 3 --supervised-lr 0.1 --hue 0.1 --output x --threads 2",
    ],
)
def test_flags_that_do_something_are_not(flags: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amimv")
    resolve(flags.split())
    assert not caplog.records


def test_what_a_condition_says_of_methods_and_recipes_is_so() -> None:
    for name in METHODS:
        uses_ids = inspect.getsource(METHODS[name].build.loss).count("ids") > 1
        assert uses_ids == METHODS[name].settings.has_negatives, name
    for recipe in (*RECIPES, "A(x) | N(x)", "A(x) | A(y)", "A(x) | A(y2)+N(y)"):
        settings = resolve(["--recipe", recipe])[0]
        assert (make_recipe(settings).slots == 1) == one_image(settings)
