"""From a study's file to its cells."""

import csv
import itertools
import shlex
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from amimv import InputError
from amimv.pipelines import largest_total, load_store, long_tail
from amimv.pipelines.sources.npz import NotDownloaded
from amimv.trainers import study
from amimv.trainers.layers import CONFIGS, RECIPE_ALIASES, resolve
from amimv.trainers.length import with_views_as_steps
from amimv.trainers.settings import PretrainSettings
from amimv.trainers.study import Cell, read_study, write_plan

DOCS = Path(__file__).parents[2] / "docs" / "study"
#: The archives of the studies whose runs are published with the code.
PUBLISHED = {
    "study-small.yaml": "small",
    "study-dermatoscopy.yaml": "dermatoscopy",
    "ablation.yaml": "ablation",
    "readings.yaml": "readings",
    "pixels.yaml": "pixels",
}
#: The first has hundreds of cells.
EACH = [pytest.param(*pair, marks=pytest.mark.slow if pair[1] == "small" else ()) for pair in PUBLISHED.items()]

SMALL = """
settings: {steps: 3, batch_size: 16, label_fractions: [0.5, 1.0]}
sets:
  mine: {data: phantom, data_seed: 4, steps: 7}
grids:
  one:
    data: [phantom, mine]
    method: [simclr, amimv]
    rho: [1, 50]
    total: common
    seed: [0, 1]
"""


def cells_of(text: str, folder: Path) -> list[Cell]:
    path = folder / "study.yaml"
    path.write_text(text)
    return read_study(path)


def test_a_grid_is_the_product_of_its_axes_with_one_baseline_per_subset_and_seed(tmp_path: Path) -> None:
    cells = cells_of(SMALL, tmp_path)
    made = {
        (c.settings.data_seed, c.given["method"], c.settings.rho, c.settings.seed) for c in cells if c.kind == "cell"
    }
    assert made == set(itertools.product([0, 4], ["simclr", "mimv"], [1.0, 50.0], [0, 1]))
    bare = [(c.settings.data_seed, c.settings.rho, c.settings.seed) for c in cells if c.kind == "baselines"]
    assert sorted(bare) == sorted(itertools.product([0, 4], [1.0, 50.0], [0, 1]))
    assert all(c.settings.baselines == ("only" if c.kind == "baselines" else "no") for c in cells)


def test_a_grid_at_equal_cost_gives_pairs_of_more_views_fewer_steps(tmp_path: Path) -> None:
    text = "grids: {a: {method: mimv, recipe: [two-view, amimv-views], views: [20000, 51200], baselines: no}}"
    cells = cells_of(text, tmp_path)
    steps = {(c.settings.recipe, c.settings.views): with_views_as_steps(*resolve(c.flags()))[0].steps for c in cells}
    assert steps == {
        ("two-view", 20000): 20000 // (2 * 256),
        ("amimv-views", 20000): 20000 // (5 * 256),
        ("two-view", 51200): 100,
        ("amimv-views", 51200): 40,
    }
    assert len({c.run for c in cells}) == 4


def test_a_grid_of_baselines_only_is_of_supervised_rivals(tmp_path: Path) -> None:
    text = "grids: {a: {supervised_loss: [cross-entropy, logit-adjusted], seed: [0, 1], baselines: only}}"
    text = f"settings: {{supervised_sampler: uniform}}\n{text}"
    cells = cells_of(text, tmp_path)
    assert {c.kind for c in cells} == {"baselines"}
    made = [(c.settings.seed, c.settings.supervised_loss) for c in cells]
    assert made == list(itertools.product([0, 1], ["cross-entropy", "logit-adjusted"]))
    assert len({c.run for c in cells}) == 4
    assert all(c.settings.baselines == "only" for c in cells)


def test_label_seeds_are_repeated_within_a_cell_and_leave_other_names_alone(tmp_path: Path) -> None:
    several = cells_of(SMALL + "    label_seeds: [0, 1, 2]\n", tmp_path)
    assert {c.settings.label_seeds for c in several} == {(0, 1, 2)}
    assert len(several) == len(cells_of(SMALL, tmp_path))
    assert {c.run for c in several}.isdisjoint(c.run for c in cells_of(SMALL, tmp_path))
    assert "--label-seeds 0 1 2" in several[0].command()


def test_seed_by_seed_and_baselines_first(tmp_path: Path) -> None:
    order = [(c.settings.seed, c.kind) for c in cells_of(SMALL, tmp_path)]
    assert order == [(s, k) for s in (0, 1) for k, n in (("baselines", 4), ("cell", 8)) for _ in range(n)]


def test_the_grid_wins_over_the_set_and_the_set_over_the_common_settings(tmp_path: Path) -> None:
    cells = cells_of(SMALL, tmp_path)
    assert {(c.settings.data_seed, c.settings.steps) for c in cells if c.kind == "cell"} == {(0, 3), (4, 7)}
    cells = cells_of(SMALL + "    steps: 9\n", tmp_path)
    assert {c.settings.steps for c in cells if c.kind == "cell"} == {9}


def test_words_and_scalars_of_a_study_are_those_of_a_config(tmp_path: Path) -> None:
    """And a cell's flags give the same settings again."""
    text = """
    settings: {steps: 3, mixed_precision: no, exclude_duplicates: yes, supervised_lr: 5e-3, seed: 9223372036854775807}
    grids:
      one: {method: simclr, finetune: [yes, off], label_fractions: 5e-1, total: 70.0, rho: 7, baselines: no}
      two: {method: simclr, seed: -1, baselines: on}
    """
    cells = cells_of(text, tmp_path)
    assert [(c.grid, c.kind) for c in cells] == [
        ("two", "baselines"),
        ("two", "cell"),
        ("one", "cell"),
        ("one", "cell"),
    ]
    for cell in cells:
        s = cell.settings
        assert (s.mixed_precision, s.exclude_duplicates, s.supervised_lr) in (
            ("no", "yes", (5e-3,)),
            ("no", "auto", (5e-3,)),
        )
        again = resolve(cell.flags())[0]
        assert {**vars(again), "preset": ""} == {**vars(s), "preset": ""}
    assert [(c.settings.finetune, c.settings.label_fractions) for c in cells[2:]] == [(True, (0.5,)), (False, (0.5,))]


def test_the_common_total_is_the_largest_that_every_ratio_reaches(tmp_path: Path) -> None:
    labels = load_store("phantom", split="train", seed=0).labels

    def reached(total: int) -> bool:
        try:
            return all(len(long_tail(labels, rho, "exp", 0, total)) == total for rho in (1, 50))
        except InputError:
            return False

    expected = max(total for total in range(7, 400) if reached(total))
    cells = [c for c in cells_of(SMALL, tmp_path) if c.settings.data_seed == 0]
    assert {c.settings.total for c in cells} == {expected}


@pytest.mark.parametrize(("name", "archive"), EACH)
def test_the_flags_of_a_cell_give_its_settings(
    name: str, archive: str, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMIMV_DATA", str(real_data))
    for cell in read_study(CONFIGS / name)[::7]:
        settings, _ = resolve(cell.flags())
        assert settings == cell.settings
        assert not cell.problem


@pytest.mark.parametrize(("name", "archive"), EACH)
def test_published_runs_are_cells_of_their_study(
    name: str, archive: str, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMIMV_DATA", str(real_data))
    cells = {cell.run for cell in read_study(CONFIGS / name)}
    published = {path.name for path in zipfile.Path(DOCS / f"{archive}.zip").iterdir() if path.is_dir()}
    assert published
    assert published <= cells


def test_commands_hold_when_an_alias_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [c for c in cells_of(SMALL, tmp_path) if c.kind == "cell"]
    monkeypatch.setitem(RECIPE_ALIASES, "amimv", "amimv-roles")
    for cell in cells:
        assert resolve(cell.flags())[0] == cell.settings
    assert {c.run for c in cells_of(SMALL, tmp_path)} >= {c.run for c in cells if c.settings.method == "simclr"}


def test_a_null_survives(tmp_path: Path) -> None:
    text = "grids: {a: {method: mimv, high: [null, 0.9], total: 70, steps: 2, batch_size: 8, baselines: false}}"
    cells = cells_of(text, tmp_path)
    assert [resolve(c.flags())[0].high for c in cells] == [None, 0.9]  # type: ignore[attr-defined]
    assert cells[0].run != cells[1].run


def test_equal_cells_are_one_run_and_different_ones_are_not(tmp_path: Path) -> None:
    base = "steps: 2, baselines: false, method: simclr"
    grids = {
        "natural": f"{{{base}, profile: natural}}",
        "capped": f"{{{base}, rho: 1}}",
        "again": f"{{{base}}}",
        "other-seed": f"{{{base}, seed: 1}}",
        "other-steps": f"{{{base}, steps: 3}}".replace("steps: 2, ", ""),
        "other-images": f"{{{base}, rho: 60}}",
        "other-labels": f"{{{base}, label_fractions: [0.5]}}",
        "other-temperature": f"{{{base}, temperature: 0.7}}",
    }
    text = "grids:\n" + "".join(f"  {name}: {grid}\n" for name, grid in grids.items())
    runs = {c.grid: c.run for c in cells_of(text, tmp_path)}
    assert runs["natural"] == runs["capped"] == runs["again"]
    assert len(set(runs.values())) == 6


def test_ratios_that_a_set_cannot_tell_apart_are_one_run(tmp_path: Path) -> None:
    """Capped at what each class has, phantom (40 : 1) is cut at neither of two small ratios."""
    cells = cells_of("grids: {a: {rho: [1, 1.00001, 60], steps: 2}}", tmp_path)
    natural, same, skewed = (c.run for c in cells if c.kind == "cell")
    assert natural == same != skewed
    assert len({c.run for c in cells if c.kind == "baselines"}) == 2


def test_a_sets_own_ratio_is_the_one_that_its_total_is_for(tmp_path: Path) -> None:
    text = "sets: {mine: {data: phantom, rho: 50}}\ngrids: {a: {data: mine, total: common, steps: 2}}"
    labels = load_store("phantom", split="train", seed=0).labels
    assert {c.settings.total for c in cells_of(text, tmp_path)} == {largest_total(labels, [50.0], "exp")}


def test_old_words_and_new_give_the_same_cells(tmp_path: Path) -> None:
    """And a command that makes the cell again, an override that is taken back included."""
    new = "grids: {a: {method: byol, steps: 2, preset: none, second: {blur_p: 0.5, solarise_p: null}}}"
    old = "grids: {a: {method: byol, steps: 2, preset: none, size: 0, second_blur_p: 0.5, second_solarise_p: null}}"
    cells = cells_of(new, tmp_path)
    assert [c.run for c in cells] == [c.run for c in cells_of(old, tmp_path)]
    (cell,) = (c for c in cells if c.kind == "cell")
    again, _ = resolve(cell.flags())
    assert again.second == cell.settings.second == ("blur_p=0.5",)
    assert resolve(["--method", "byol", "--preset", "none", "--steps", "2"])[0].second == ("solarise_p=0.2",)


def test_a_merged_mapping_may_be_overruled(tmp_path: Path) -> None:
    text = "grids:\n  a: &a {steps: 2, seed: 0}\n  b: &b {<<: *a, seed: 1}\n  c: {<<: *b, seed: 2}\n"
    assert [c.settings.seed for c in cells_of(text, tmp_path) if c.kind == "cell"] == [0, 1, 2]


def test_names_do_not_change_with_settings_that_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [c.run for c in cells_of(SMALL, tmp_path)]
    real = fields
    monkeypatch.setattr(study, "fields", lambda settings: [f for f in real(settings) if f.name != "sync_bn"])
    assert [c.run for c in cells_of(SMALL, tmp_path)] == before


def test_a_name_of_baselines_does_not_depend_on_the_training(tmp_path: Path) -> None:
    names = [
        {c.run for c in cells_of(SMALL + extra, tmp_path) if c.kind == "baselines"} for extra in ("", "    lr: 1\n")
    ]
    assert names[0] == names[1]


def test_the_plan_lists_every_point_with_a_command_that_makes_it(tmp_path: Path) -> None:
    cells = cells_of(SMALL, tmp_path)
    write_plan(cells, tmp_path / "plan.csv")
    rows = list(csv.DictReader((tmp_path / "plan.csv").open()))
    assert [row["run"] for row in rows] == [c.run for c in cells]
    python, script, *flags = shlex.split(rows[-1]["command"])
    assert (python, script) == ("python", "trainers/pretrain.py")
    assert resolve(flags)[0] == cells[-1].settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {}", r"unknown key 'grid': did you mean grids\?"),
        ("settings: {}", "has no grids"),
        ("grids: {a: 3}", "grid a is 3, expected lines"),
        ("grids: {a: {methd: simclr}}", "unknown setting 'methd': did you mean method"),
        ("grids: {a: {method: simclrr}}", "unknown method 'simclrr': did you mean simclr"),
        ("grids: {a: {data: retinamnits}}", "unknown data set 'retinamnits': did you mean retinamnist"),
        ("grids: {a: {data: missing.npz, steps: 2}}", "there is no file missing.npz"),
        ("grids: {a: {seed: []}}", "seed is an empty list"),
        ("grids: {a: {output: here}}", "output cannot be given"),
        (
            "grids: {a: {steps: 2, rho: 100, label_fractions: [0.9999, 1], label_seeds: [0, 1]}}",
            "rho 100: label_seeds asks for 2 draws of 99.99 % of phantom's labels, but only 1 can differ",
        ),
        ("grids: {a: {recipe: [two-view, amimv-views], views: 1200}}", "views is 1,200, but one step renders 1,280"),
        ("settings: {steps: 5}\ngrids: {a: {views: 90000}}", "gives both steps and views"),
        ("grids: {a: {minutes: 5}}", "minutes cannot be given: cells would differ in length"),
        ("grids: {a: {rho: [1, 100], total: 2900, steps: 2}}", "rho 1: total 2900 .* use a total of at most"),
        ("grids: {a: {steps: many}}", "steps is 'many', expected int"),
        ("grids: [", "not a readable YAML"),
        ("sets: 3\ngrids: {a: {}}", "sets is 3, expected lines"),
        ("sets: {mine: 3}\ngrids: {a: {}}", "set mine is 3, expected lines"),
        ("sets: {mine: {bogus: 3}}\ngrids: {a: {steps: 2}}", "set mine: unknown key 'bogus'"),
        ("grids: {a: {evaluate: false}}", "evaluate cannot be given"),
        ("grids: {a: {steps: 2, label_fractions: [2.0]}}", r"study.yaml: grid a: label fractions are \(2.0,\)"),
        ("sets: {mine: {name: x}}\ngrids: {a: {}}", "set mine: name cannot be given"),
        ("settings: {output: x}\ngrids: {a: {}}", "settings: output cannot be given"),
        ("grids: {a: {data: {b: 1}}}", "data is {'b': 1}, expected the name of a set"),
        ("grids: {a: {data: [[phantom]]}}", r"data is \['phantom'\], expected the name of a set"),
        ("grids: {a: {rho: [x, 2], total: common}}", "rho is 'x', expected float"),
        ("grids: {a: {rho: null, total: common}}", "rho is None, expected float"),
        ("settings: {rho: [1, 50]}\ngrids: {a: {total: common}}", r"rho is \[1, 50\], expected float"),
        ("grids: {a: {steps: 2}, a: {steps: 3}}", "'a' is given twice, again in line 1"),
        ("grids: {a: {baselines: alone}}", "grid a: baselines is 'alone', expected yes or no or only"),
        ("settings: {finetune: perhaps}\ngrids: {a: {}}", "finetune is 'perhaps', expected bool: yes or no"),
        ("grids: {a: {rho: [1, 50], profile: natural}}", "profile natural has no ratio, but rho is 50"),
        ("grids: {a: {rho: [1, 9000], total: common}}", "cannot reach this ratio: beside .* at most"),
    ],
)
def test_bad_input_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        cells_of(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_set_that_cannot_be_downloaded_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study._training_split.cache_clear()
    real, asked = study.load_split, []

    def load(settings: PretrainSettings, split: str, device: torch.device | str) -> object:
        asked.append(settings.data)
        if settings.data == "bloodmnist":
            raise NotDownloaded("bloodmnist.npz is missing and could not be downloaded")
        return real(settings, split, device)

    monkeypatch.setattr(study, "load_split", load)
    text = "grids: {a: {data: [phantom, bloodmnist], rho: [1, 9], total: common, steps: 2}}"
    cells = cells_of(text, tmp_path)
    problems = {(c.settings.data, bool(c.problem)) for c in cells}
    assert problems == {("phantom", False), ("bloodmnist", True)}
    assert asked.count("bloodmnist") == 1
    study._training_split.cache_clear()


def test_a_published_set_that_is_read_wrongly_is_refused(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMIMV_DATA", str(real_data))
    (tmp_path / "groups.csv").write_text("split,index,lesion\ntrain,0,a\n")
    for groups, message in (("missing.csv", "there is no file"), ("groups.csv", "has 1 rows of train")):
        text = f"grids: {{a: {{data: retinamnist, steps: 2, groups: '{tmp_path}/{groups}:lesion'}}}}"
        with pytest.raises(InputError, match=f"grid a: .*{message}") as caught:
            cells_of(text, tmp_path)
        assert "\n" not in str(caught.value)
