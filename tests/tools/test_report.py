"""The report on small made-up runs: what its tables say, what is left out, and that a browser shows the page."""

import csv
import io
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score

from amimv import InputError
from amimv.tools.report import ReportSettings, _escape, report
from amimv.tools.report_page.archive import pack_predictions
from amimv.tools.report_page.runs import Study, read_study
from amimv.tools.report_page.tables import (
    Table,
    describe_subset,
    difference_table,
    drop_table,
    find_reference,
    gain_table,
    long_form,
    main_table,
    pick,
    with_fixed_tail,
)
from amimv.trainers.evaluation import COLUMNS
from amimv.trainers.study import PLAN_COLUMNS

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "head", "medium", "tail")
PUBLISHED = Path(__file__).parents[2] / "docs" / "study"
LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def write_run(folder: Path, results: list[dict[str, Any]], predictions: bool = True, **config: Any) -> None:
    """A run folder; a result's ``right`` is how many images of each class are classified rightly."""
    folder.mkdir(parents=True)
    settings = {"data": "retinamnist", "data_seed": 0, "backbone": "small", "seed": results[0].get("seed", 0)}
    (folder / "config.yaml").write_text("".join(f"{k}: {v}  # flag\n" for k, v in (settings | config).items()))
    environment = {"revision": "abc123", "python": "3.12", "packages": {"torch": "9.9"}, "threads": 1}
    environment |= {"command": ["pretrain.py", "--seed", "0"], "wall_seconds": {"training": 61.2}}
    (folder / "environment.json").write_text(json.dumps(environment))
    arrays: dict[str, np.ndarray] = {"labels": LABELS, "class_names": np.array(["naevus", "mole", "rare"])}
    arrays |= {"train_counts": np.array([500, 50, 5]), "projection": np.eye(100, 2, dtype=np.float32)}
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for i, result in enumerate(results):
            right = result.pop("right", (30, 15, 5))
            within = np.concatenate([np.arange(60) < right[0], np.arange(30) < right[1], np.arange(10) < right[2]])
            arrays[f"row_{i:03d}"] = np.where(within, LABELS, (LABELS + 1) % 3).astype(np.uint8)
            recalls = [right[0] / 60, right[1] / 30, right[2] / 10]
            line: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            line |= dict.fromkeys(SCORES, 0.5) | {
                "run": folder.name,
                "data": "retinamnist",
                "profile": "exp",
                "rho": 1.0,
            }
            line |= {
                "total": 0,
                "realised_ratio": 7.5,
                "n_train": 555,
                "features": "pretrained",
                "probe": "knn",
                "k": 5,
            }
            line |= {
                "label_fraction": 1.0,
                "seed": 0,
                "steps": 400,
                "revision": "abc123",
                "val_balanced_accuracy": 0.4,
            }
            line |= {"balanced_accuracy": mean(recalls), "head": recalls[0], "medium": recalls[1], "tail": recalls[2]}
            if result.get("features", "pretrained") == "pretrained":
                line |= {"method": "mimv", "recipe": "amimv-views", "sampler": "uniform", "partner": "uniform"}
            writer.writerow(line | result)
    if predictions:
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]


SIMCLR = {"method": "simclr", "recipe": "two-view"}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods at two ratios with two seeds, a sampler, and baselines."""
    folder = tmp_path / "runs"
    for seed in (0, 1):
        for rho, lost in ((1.0, 0), (50.0, 4)):
            at = {"rho": rho, "seed": seed}
            amimv = at | {"right": (50 + seed, 20, 8 - lost)}
            linear = at | {"probe": "linear", "k": "", "right": (40, 22, 9 - lost)}
            write_run(folder / f"amimv-{rho:g}-{seed}", [amimv, linear], seed=seed)
            write_run(folder / f"simclr-{rho:g}-{seed}", [at | SIMCLR | {"right": (55, 10, 6 - lost)}], seed=seed)
            raw = {"features": "raw pixels", "right": (59, 29, 9)}
            majority = {"features": "majority", "probe": "", "k": "", "right": (60, 0, 0)}
            scratch = {"features": "supervised", "probe": "classifier", "k": "", "right": (58, 28, 7)}
            write_run(folder / f"base-{rho:g}-{seed}", [at | one for one in (majority, raw, scratch)], seed=seed)
        balanced = {"rho": 50.0, "seed": seed, "sampler": "class-balanced", "right": (44, 20, 7)}
        write_run(folder / f"sampler-{seed}", [balanced], seed=seed)
    return folder


def test_settings_that_a_version_did_not_know_are_its_defaults(tmp_path: Path) -> None:
    write_run(tmp_path / "old", [{"seed": 0}], method="mimv", momentum=0.9)
    write_run(tmp_path / "new", [{"seed": 1}], method="mimv", momentum=0.9, spare_positives=False)
    write_run(tmp_path / "other", [{"seed": 0}], method="mimv", momentum=0.9, spare_positives=True)
    seeds = read_study([tmp_path]).rows.groupby("name")["seed"].nunique()
    assert sorted(seeds) == [1, 2]
    assert [name for name in seeds.index if "spare_positives True" in name]


def at_rho(study: Study, rho: float) -> pd.DataFrame:
    return study.rows[study.rows["rho"] == rho]


def texts(table: Table) -> dict[str, list[str]]:
    return {row.name: [cell.text for cell in row.cells] for row in table.rows}


def test_rows_columns_means_and_bold(runs: Path) -> None:
    study = read_study([runs])
    table = main_table(at_rho(study, 50), study.runs, "knn")
    assert [row.name for row in table.rows] == [
        *("majority class", "raw pixels", "supervised from scratch"),
        *("mimv on amimv-views", "mimv on amimv-views, class-balanced", "simclr on two-view"),
    ]
    both = [100 * (recall / 60 + 20 / 30 + 4 / 10) / 3 for recall in (50, 51)]
    found = texts(table)["mimv on amimv-views"]
    assert found[0] == f"{mean(both):.1f} ± {stdev(both):.1f}"
    assert found[1] == f"{100 * (40 / 60 + 22 / 30 + 5 / 10) / 3:.1f} ± 0.0"
    assert found[2] == "-"
    assert found[-1] == "2"
    assert texts(table)["majority class"][:3] == ["33.3 ± 0.0"] * 3
    assert texts(table)["supervised from scratch"][:2] == ["-", "-"]
    assert texts(table)["supervised from scratch"][2] == f"{100 * (58 / 60 + 28 / 30 + 7 / 10) / 3:.1f} ± 0.0"
    # Raw pixels are better than all, and a baseline; of one method alone in its column nothing is best.
    assert [row.name for row in table.rows if row.cells[0].best] == ["mimv on amimv-views, class-balanced"]
    assert not any(row.cells[1].best for row in table.rows)
    assert "rho 50 (exp)" in table.title
    assert table.columns[-4:] == ("validation: kNN", "validation: linear", "validation: fine-tuned", "seeds")
    assert found[-4:-1] == ["40.0 ± 0.0", "40.0 ± 0.0", "-"]
    assert [label for label, _ in table.rows[3].runs] == ["0", "1"]


def test_a_column_of_nobody_is_left_out(tmp_path: Path) -> None:
    majority = {"features": "majority", "probe": "", "k": ""}
    write_run(tmp_path / "a", [majority, {}])
    write_run(tmp_path / "b", [SIMCLR | {"auc": ""}])
    study = read_study([tmp_path])
    columns = main_table(study.rows, study.runs, "knn").columns
    assert columns[0] == "kNN"
    assert not {"linear", "fine-tuned", "validation: linear", "validation: fine-tuned"} & set(columns)
    assert {"validation: kNN", "kNN: AUC", "seeds"} <= set(columns)
    assert "kNN: medium" in columns


def test_at_a_fixed_total_and_no_imbalance_thirds_mean_nothing(tmp_path: Path) -> None:
    for name, total in (("fixed", 70), ("capped", 0)):
        write_run(tmp_path / name / "a", [{"total": total}])
        study = read_study([tmp_path / name])
        notes = main_table(study.rows, study.runs, "knn").notes
        assert any("All classes are as large" in note for note in notes) == (name == "fixed")


def test_differences_are_paired_with_the_reference_over_seeds(runs: Path) -> None:
    study = read_study([runs])
    table = difference_table(at_rho(study, 50), study, "amimv")
    assert table is not None
    assert "Difference from mimv on amimv-views," in table.title
    found = texts(table)["simclr on two-view"]
    expected = 100 * ((55 / 60 - 50.5 / 60) + (10 - 20) / 30 + (2 - 4) / 10) / 3
    difference, low, high = map(float, re.findall(r"[-+][\d.]+", found[0]))
    assert difference == pytest.approx(expected, abs=0.051)
    assert low < difference < high
    assert found[1:] == ["-", "-"]
    assert "mimv on amimv-views" not in texts(table)
    swapped = difference_table(at_rho(study, 50), study, "simclr")
    assert swapped is not None
    assert texts(swapped)["mimv on amimv-views"][0].startswith(f"{-expected:+.1f}")


def test_predictions_of_other_images_or_none_give_no_interval(runs: Path) -> None:
    (runs / "simclr-50-0" / "predictions.npz").write_bytes(b"PK torn")
    with np.load(runs / "sampler-1" / "predictions.npz") as stored:
        np.savez(runs / "sampler-1" / "predictions.npz", **{**stored, "labels": LABELS[::-1]})
    study = read_study([runs])
    table = difference_table(at_rho(study, 50), study, "amimv")
    assert table is not None
    assert texts(table)["simclr on two-view"] == ["-", "-", "-"]
    assert texts(table)["mimv on amimv-views, class-balanced"] == ["-", "-", "-"]
    assert texts(table)["raw pixels"][0] != "-"
    assert "without stored predictions" in table.notes[0]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("amimv", "mimv on amimv-views"),
        ("simclr", "simclr on two-view"),
        ("raw pixels", "raw pixels"),
        ("byol", ""),
        ("mimv on amimv-views, class-balanced", "mimv on amimv-views, class-balanced"),
    ],
)
def test_the_reference(runs: Path, wanted: str, expected: str) -> None:
    assert find_reference(at_rho(read_study([runs]), 50), wanted) == expected


def test_the_reference_where_amimv_is_missing(tmp_path: Path) -> None:
    kinds = {"two": SIMCLR, "byol": {"method": "byol", "recipe": "two-view"}}
    for seed in (0, 1):
        write_run(tmp_path / f"two-{seed}", [kinds["two"] | {"seed": seed}])
    write_run(tmp_path / "byol", [kinds["byol"] | {"seed": 0}])
    assert find_reference(read_study([tmp_path]).rows, "amimv") == "simclr on two-view"  # the most seeds
    write_run(tmp_path / "mimv", [{"recipe": "mimv"}])
    assert find_reference(read_study([tmp_path]).rows, "amimv") == "mimv on mimv"
    write_run(tmp_path / "roles", [{"recipe": "amimv-roles"}])
    assert find_reference(read_study([tmp_path]).rows, "amimv") == "mimv on amimv-roles"


def test_drop_with_ratio_and_gain_of_a_sampler(runs: Path) -> None:
    study = read_study([runs])
    rows = with_fixed_tail(pick(study.rows, "knn"), study)
    drops = texts(drop_table(rows, "knn"))
    assert drops["simclr on two-view"][3:] == ["60.0 ± 0.0", "20.0 ± 0.0", "40.0 ± 0.0"]
    assert drops["simclr on two-view"][2] == "13.3 ± 0.0"
    # Run at the highest ratio only.
    assert "mimv on amimv-views, class-balanced" not in drops
    gains = gain_table(at_rho(study, 50), "knn")
    assert gains is not None
    lost = [100 * (44 - right) / 60 for right in (50, 51)]
    expected = [f"{mean(lost):+.1f} ± {stdev(lost):.1f}", "+0.0 ± 0.0", "+30.0 ± 0.0"]
    assert texts(gains)["mimv on amimv-views, class-balanced"][1:] == expected
    assert gain_table(at_rho(study, 1), "knn") is None


def test_the_tail_is_the_same_classes_at_every_ratio(runs: Path) -> None:
    for folder in runs.glob("*-1-*"):  # balanced: equal counts, so that the last class is no smaller
        with np.load(folder / "predictions.npz") as stored:
            np.savez(folder / "predictions.npz", **{**stored, "train_counts": np.array([9, 20, 30])})
    study = read_study([runs])
    rows = with_fixed_tail(pick(study.rows, "knn"), study)
    assert set(rows[(rows["name"] == "simclr on two-view") & (rows["rho"] == 1)]["fixed_tail"]) == {0.6}


def test_settings_that_tell_rows_apart_are_named_unless_usual(tmp_path: Path) -> None:
    for seed in (0, 1):
        for online in ("hard", "hard", "soft"):
            name = f"{online}-{seed}" if not (tmp_path / f"{online}-{seed}").exists() else f"again-{seed}"
            write_run(tmp_path / name, [{"seed": seed}], online=online, seed=seed)
    study = read_study([tmp_path])
    assert set(study.rows["name"]) == {"mimv on amimv-views", "mimv on amimv-views, online soft"}
    assert study.repeats == 2
    assert len(study.rows) == 4


def test_runs_that_differ_in_many_settings_stay_apart(tmp_path: Path) -> None:
    many = {"crop_min": 0.1, "brightness": 0.1, "contrast": 0.1, "hue": 0.01}
    for i, rotation in enumerate((180, 5)):
        write_run(tmp_path / f"r{rotation}", [{"seed": i}], rotation=rotation, seed=i, **many)
    for i, other in enumerate(({"crop_min": 0.9}, {"hue": 0.5})):
        changed = dict.fromkeys(many, 0.3) | other
        write_run(tmp_path / f"o{i}", [{"seed": 0}], rotation=i, **changed)
    study = read_study([tmp_path])
    assert study.repeats == 0
    assert study.rows.groupby("name")["seed"].count().tolist() == [1, 1, 1, 1]
    assert sum("rotation 180" in name for name in study.rows["name"]) == 1


def test_settings_of_fine_tuning_tell_its_rows_apart_and_no_others(tmp_path: Path) -> None:
    for i, steps in enumerate((5, 60)):
        results = [{"probe": "knn"}, {"probe": "fine-tuned", "k": "", "right": (30 + i, 15, 5)}]
        write_run(tmp_path / f"run-{i}", results, method="mimv", supervised_steps=steps)
    study = read_study([tmp_path])
    names = {probe: set(rows["name"]) for probe, rows in study.rows.groupby("probe")}
    plain = "mimv on amimv-views"
    assert names == {
        "knn": {plain},
        "fine-tuned": {f"{plain}, supervised_steps 5", f"{plain}, supervised_steps 60"},
    }
    assert study.repeats == 1  # of kNN


def test_baselines_that_see_other_pixels_are_apart(tmp_path: Path) -> None:
    for size in (0, 20):
        features = ("raw pixels", "random", "majority")
        write_run(tmp_path / f"run-{size}", [{"features": name} for name in features], view_size=size)
    counts = read_study([tmp_path]).rows.groupby("features")["name"].nunique().to_dict()
    assert counts == {"raw pixels": 2, "random": 2, "majority": 1}


def test_a_class_without_a_label_is_no_reason_to_leave_a_run_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [{"realised_ratio": "inf"}])
    study = read_study([tmp_path])
    assert "realised ratio inf" in main_table(study.rows, study.runs, "knn").title


@pytest.mark.parametrize("spoiled", [{"train_counts": np.arange(2)}, {"projection": np.eye(3)}, None])
def test_foreign_predictions_cost_the_pictures_only(tmp_path: Path, spoiled: dict[str, np.ndarray] | None) -> None:
    write_run(tmp_path / "runs" / "a", [{}])
    path = tmp_path / "runs" / "a" / "predictions.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    if spoiled is None:
        with path.open("wb") as file:
            np.save(file, arrays["labels"])
    else:
        np.savez(path, **(arrays | spoiled))  # type: ignore[arg-type]
    environment = {"packages": ["torch"], "wall_seconds": {"training": "long"}, "training_counts": 3}
    (tmp_path / "runs" / "a" / "environment.json").write_text(json.dumps(environment))
    report(ReportSettings((str(tmp_path / "runs"),), output=str(tmp_path / "page.html")))
    assert "mimv on amimv-views" in (tmp_path / "page.html").read_text()


def test_other_images_are_other_tables(tmp_path: Path) -> None:
    for data_seed in (7, 8):
        write_run(tmp_path / f"seed{data_seed}", [{"data": "phantom"}], data="phantom", data_seed=data_seed)
    write_run(tmp_path / "large", [{}], size=64)
    names = {"phantom (synthetic), data seed 7", "phantom (synthetic), data seed 8", "retinamnist, 64 px"}
    assert set(read_study([tmp_path]).rows["data"]) == names


def write_plan(folder: Path, lines: list[dict[str, Any]]) -> None:
    with (folder / "plan.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, PLAN_COLUMNS)
        writer.writeheader()
        writer.writerows(dict.fromkeys(PLAN_COLUMNS, "") | {"profile": "exp", "total": 0} | line for line in lines)


def test_a_plan_gives_grids_failures_and_what_is_to_run(runs: Path) -> None:
    (runs / "amimv-1-1" / "results.csv").unlink()
    lines = [{"grid": "fixed", "run": "amimv-1-0", "rho": 1, "total": 100, "command": "python trainers/x.py --seed 0"}]
    lines += [{"grid": "capped", "run": "amimv-1-0", "rho": rho} for rho in (1, 10)]
    lines += [{"grid": "fixed", "run": name, "rho": 1} for name in ("nobody", "amimv-1-1", "broken")]
    write_plan(runs, lines)
    (runs / "failed").mkdir()
    (runs / "failed" / "broken.txt").write_text("loss is not finite at step 3\n")
    (runs / "failed" / "simclr-1-0.txt").write_text("it is done by now\n")
    study = read_study([runs])
    own = study.rows[study.rows["run"] == "amimv-1-0"]
    points = set(zip(own["grid"], own["rho"], own["total"], strict=True))
    assert points == {("fixed", 1, 100), ("capped", 1, 0), ("capped", 10, 0)}
    assert study.failed == [("broken", "loss is not finite at step 3")]
    assert study.pending == ["nobody", "amimv-1-1"]
    assert study.left_out == []
    assert study.runs["run-amimv-1-0"].command == "python trainers/x.py --seed 0"
    pooled = read_study([runs], pool_grids=True)
    assert set(pooled.rows["grid"]) == {""}
    assert pooled.repeats == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "not finished: it has no results.csv"),
        ("", "lacks the column 'run'"),
        (",".join(COLUMNS) + "\n", "has no lines"),
        (",".join([*COLUMNS, "colour"]) + "\n", "unknown column 'colour'"),
        (",".join(COLUMNS) + "\nrun,retina", "line 2: torn"),
    ],
)
def test_runs_that_cannot_be_used_are_left_out_with_a_reason(runs: Path, content: str | None, reason: str) -> None:
    path = runs / "simclr-1-0" / "results.csv"
    path.unlink()
    if content is not None:
        path.write_text(content)
    (runs / "holiday-pictures").mkdir()
    left_out = dict(read_study([runs]).left_out)
    assert reason in left_out[str(runs / "simclr-1-0")]
    assert left_out[str(runs / "holiday-pictures")] == "not a run folder: it has no config.yaml"
    assert len(left_out) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", 'run,data\n"' + "x" * 200_000),
        ("results.csv", "run\n\0"),
        ("config.yaml", "a: 2024-99-99"),
        ("config.yaml", "a: " + "[" * 3000),
    ],
)
def test_a_foreign_file_costs_its_own_folder_only(runs: Path, name: str, content: str) -> None:
    (runs / "simclr-1-0" / name).write_text(content)
    (runs / "plan.csv").write_text("a,b\n1,2\n")
    left_out = dict(read_study([runs]).left_out)
    assert set(left_out) == {str(runs / "simclr-1-0"), str(runs / "plan.csv")}
    assert all(reason and "\n" not in reason for reason in left_out.values())


@pytest.mark.parametrize("command", [3, {"a": 1}, ["pretrain.py", 3]])
def test_odd_values_in_good_runs_are_no_error(runs: Path, command: object) -> None:
    (runs / "simclr-1-0" / "environment.json").write_text(json.dumps({"command": command}))
    with (runs / "simclr-1-0" / "config.yaml").open("a") as file:
        file.write("data_seed: [1]\n")
    assert read_study([runs]).left_out == []


@pytest.mark.parametrize(
    ("name", "value"), [("balanced_accuracy", "58.1"), ("seed", ""), ("tail", "nan"), ("probe", "x")]
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, name: str, value: str) -> None:
    write_run(tmp_path / "bad", [{name: value}])
    with pytest.raises(InputError, match=rf"no finished run in .*results\.csv, line 2: .*{name}"):
        read_study([tmp_path])


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "old", [{}], predictions=False)
    path = tmp_path / "old" / "results.csv"
    old = pd.read_csv(path).drop(columns=["total", "partner", "steps", "val_balanced_accuracy"])
    old.to_csv(path, index=False)
    report(ReportSettings((str(tmp_path),), output=str(tmp_path / "page.html")))
    assert "mimv on amimv-views" in (tmp_path / "page.html").read_text()


def test_nothing_to_report_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        report(ReportSettings((str(tmp_path / "nowhere"),)))
    with pytest.raises(InputError, match="no run folder in it"):
        report(ReportSettings((str(tmp_path),)))


def test_an_unknown_baseline_lists_the_near_ones(runs: Path) -> None:
    with pytest.raises(InputError, match="did you mean simclr"):
        report(ReportSettings((str(runs),), baseline="simcrl", output=str(runs / "page.html")))


def test_runs_on_given_indices_are_a_table_of_their_own(runs: Path, tmp_path: Path) -> None:
    """They have no ratio: results say so by an empty one."""
    own = {"profile": "indices", "rho": "", "total": 40, "n_train": 40}
    write_run(runs / "given", [own | SIMCLR | {"right": (30, 15, 5)}])
    study = read_study([runs])
    assert not study.left_out or all("given" not in name for name, _ in study.left_out)
    titles = {describe_subset(row) for row in study.rows.to_dict("records")}
    assert titles == {"given indices, 40 images in total", "natural distribution", "rho 50 (exp)"}
    report(ReportSettings((str(runs),), output=str(tmp_path / "page.html")))
    assert "given indices, 40 images in total" in (tmp_path / "page.html").read_text()
    table = long_form(study.rows)
    assert (table["rho"].isna() == (table["profile"] == "indices")).all()
    results = runs / "given" / "results.csv"
    results.write_text(results.read_text().replace("indices", "exp"))
    assert any("rho is ''" in reason for _, reason in read_study([runs]).left_out)


def test_csv_is_the_long_form(runs: Path, tmp_path: Path) -> None:
    report(ReportSettings((str(runs),), format="csv", output=str(tmp_path / "out.csv")))
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (3 + 2 + 1) + 1
    own = next(one for one in lines if (one["row"], one["probe"], one["rho"]) == ("mimv on amimv-views", "knn", "1.0"))
    both = [(recall / 60 + 20 / 30 + 8 / 10) / 3 for recall in (50, 51)]
    assert float(own["balanced_accuracy_mean"]) == pytest.approx(mean(both), abs=1e-6)
    assert float(own["balanced_accuracy_std"]) == pytest.approx(stdev(both), abs=1e-6)
    assert (own["n_seeds"], own["runs"]) == ("2", "amimv-1-0 amimv-1-1")


def test_an_archive_is_read_as_its_folder_is(runs: Path, tmp_path: Path) -> None:
    write_plan(runs, [{"grid": "fixed", "run": name, "rho": 1} for name in ("amimv-1-0", "nobody", "broken")])
    (runs / "failed").mkdir()
    (runs / "failed" / "broken.txt").write_text("loss is not finite at step 3\n")
    (runs / "amimv-1-0" / "curves.png").write_bytes(b"not kept")
    for name in ("one", "two"):
        report(ReportSettings((str(runs),), archive=str(tmp_path / f"{name}.zip")))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        kept = {name.rpartition("/")[2] for name in archive.namelist()}
    assert kept == {"plan.csv", "broken.txt", "config.yaml", "environment.json", "results.csv", "predictions.npz"}
    for source in (runs, tmp_path / "one.zip"):
        for form in ("html", "md", "csv"):
            report(ReportSettings((str(source),), format=form, output=str(tmp_path / f"{source.stem}.{form}")))
    for form in ("md", "csv"):
        assert (tmp_path / f"one.{form}").read_text() == (tmp_path / f"runs.{form}").read_text()
    pages = [re.sub('base64,[^"]+', "", (tmp_path / f"{name}.html").read_text()) for name in ("runs", "one")]
    assert pages[0] == pages[1].replace(str(tmp_path / "one.zip"), str(runs))
    report(ReportSettings((str(runs),), format="csv", output=str(tmp_path / "again.csv")))
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "again.csv").read_text()


def test_packed_predictions_are_exact_and_projections_near(tmp_path: Path) -> None:
    path, random = tmp_path / "predictions.npz", np.random.default_rng(0)
    arrays = {"labels": LABELS, "row_000": random.integers(0, 300, 100), "class_names": np.array(["a", "b"])}
    projection = random.normal(size=(100, 2)) * [1, 50]
    np.savez(path, projection=projection, **arrays)  # type: ignore[arg-type]
    with np.load(io.BytesIO(pack_predictions(path))) as packed:
        assert (packed["labels"].dtype, packed["row_000"].dtype) == (np.uint8, np.uint16)
        assert all((packed[name] == values).all() for name, values in arrays.items())
        scaled = (projection - projection.min(axis=0)) / np.ptp(projection, axis=0)
        assert np.abs(packed["projection"] / 255 - scaled).max() <= 0.5 / 255 + 1e-9


def test_only_one_folder_of_runs_is_packed(runs: Path, tmp_path: Path) -> None:
    report(ReportSettings((str(runs),), archive=str(tmp_path / "one.zip")))
    for paths in ((runs, runs), (runs / "amimv-1-0",), (tmp_path / "one.zip",)):
        with pytest.raises(InputError, match="packs one folder of runs"):
            report(ReportSettings(tuple(map(str, paths)), archive=str(tmp_path / "two.zip")))
    with pytest.raises(InputError, match=r"ends in \.zip"):
        report(ReportSettings((str(runs),), archive=str(tmp_path / "two.csv")))
    assert not (tmp_path / "two.csv").exists()


def test_published_archives_are_small_and_agree_with_the_tables_beside_them(tmp_path: Path) -> None:
    files = list(PUBLISHED.iterdir())
    assert sum(path.stat().st_size for path in files) < 2**22
    assert {path.suffix for path in files} == {".md", ".zip", ".csv"}
    for path in PUBLISHED.glob("*.zip"):
        study = read_study([path], pool_grids=True)
        assert not study.left_out
        assert long_form(study.rows).to_csv(index=False) == path.with_suffix(".csv").read_text()


def test_markdown_and_latex(runs: Path, tmp_path: Path) -> None:
    for form in ("md", "latex"):
        report(ReportSettings((str(runs),), format=form, output=str(tmp_path / form)))
    markdown, latex = (tmp_path / "md").read_text(), (tmp_path / "latex").read_text()
    assert re.search(r"\| mimv on amimv-views, class-balanced \| +\*\*70\.0 ± 0\.0\*\* \|", markdown)
    assert r"mimv on amimv-views, class-balanced & \textbf{70.0 $\pm$ 0.0} &" in latex
    assert re.search(r"(?<!\\)%", latex) is None
    assert not {"\x02", "\x03"} & set(latex)
    assert markdown.count("###") == latex.count(r"\caption") == 2


def test_latex_escapes_what_a_grid_may_be_called() -> None:
    assert _escape(r"b_$^{x}\~&%#±") == (r"b\_\$\textasciicircum{}\{x\}\textbackslash{}\textasciitilde{}\&\%\#$\pm$")


@pytest.fixture
def page(runs: Path, tmp_path: Path) -> Path:
    write_run(runs / "toy", [{"data": "phantom"}], data="phantom")
    (runs / "half").mkdir()
    (runs / "half" / "config.yaml").write_text("data: '<script>alert(1)</script>'\n")
    path = tmp_path / "page.html"
    report(ReportSettings((str(runs),), output=str(path)))
    return path


def test_the_page_stands_alone_and_leads_to_every_run(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"""(src|href)=["']?(https?:)?//""", text) is None
    assert "phantom is synthetic" in text
    anchors = set(re.findall(r'href="#([^"]+)"', text))
    assert anchors <= set(re.findall(r'id="([^"]+)"', text))
    assert {f"run-{name}" for name in ("amimv-1-0", "simclr-50-1", "base-1-1", "toy")} <= anchors
    assert "not finished: it has no results.csv" in text
    assert text.count("<script>") == 1
    assert "python trainers/pretrain.py --seed 0" in text
    assert "training 61 s" in text
    balanced = 50 * (1 / 60 + 1 / 30 + 1 / 10) ** 0.5 / 3
    assert (
        f"accuracy near 50 % is 5.0 points, and of a balanced accuracy with every recall near 50 %, {balanced:.1f}"
        in text
    )
    # Robustness, recalls, confusions and projections of one set; the last three of the other.
    assert text.count("data:image/png;base64,") == 7


def test_without_phantom_there_is_no_banner(runs: Path, tmp_path: Path) -> None:
    report(ReportSettings((str(runs),), output=str(tmp_path / "page.html")))
    assert "synthetic" not in (tmp_path / "page.html").read_text()


def test_a_browser_shows_and_sorts_the_tables(page: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a browser: no chromium, chromium-browser or google-chrome on the PATH")
    click = (
        '<script>document.querySelector("section table.sortable").tHead.querySelectorAll("button")[1].click()</script>'
    )
    page.write_text(page.read_text().replace("</body>", click + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [browser, *flags, profile, "--virtual-time-budget=5000", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    table = re.search(r"<table.*?</table>", shown.stdout[shown.stdout.index("<section") :], re.DOTALL)
    assert table is not None
    values = [float(v) for v in re.findall(r'</th><td data-sort="([^"]+)"', table[0])]
    assert len(values) > 3
    assert values == sorted(values, reverse=True)
    assert 'aria-sort="descending"' in table[0]


def test_stored_classes_agree_with_scikit_learn(runs: Path) -> None:
    """The made-up predictions say what the made-up results say."""
    with np.load(runs / "simclr-50-0" / "predictions.npz") as stored:
        expected = balanced_accuracy_score(stored["labels"], stored["row_000"])
    assert pd.read_csv(runs / "simclr-50-0" / "results.csv")["balanced_accuracy"][0] == pytest.approx(expected)
