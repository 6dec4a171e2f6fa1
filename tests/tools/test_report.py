"""The report on small made-up runs and on the published ones: what it concludes, its tables, and that a browser shows
the page.
"""

import csv
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest

from amimv import InputError
from amimv.tools.report import ReportSettings, _escape, build_part, report, split_parts
from amimv.tools.report_page.archive import pack_predictions
from amimv.tools.report_page.runs import Study, read_study
from amimv.tools.report_page.tables import (
    Table,
    describe_subset,
    drop_table,
    gain_table,
    judged,
    long_form,
    pick,
    with_fixed_tail,
)
from amimv.tools.report_page.verdicts import choose
from amimv.trainers.evaluation import COLUMNS
from amimv.trainers.study import PLAN_COLUMNS

PUBLISHED = Path(__file__).parents[2] / "docs" / "study"
LABELS = np.repeat([0, 1, 2], [60, 30, 10])
SIMCLR = {"method": "simclr", "recipe": "two-view"}
VICREG = {"method": "vicreg", "recipe": "two-view"}
PIXELS = {"features": "raw pixels"}
SCRATCH = {"features": "supervised", "probe": "classifier"}
LINE = {
    **{"data": "retinamnist", "profile": "exp", "rho": 1.0, "total": 0, "realised_ratio": 7.5, "n_train": 555},
    **{"features": "pretrained", "probe": "knn", "label_fraction": 1.0, "seed": 0, "steps": 400, "revision": "abc123"},
    **{"val_balanced_accuracy": 0.4, "accuracy": 0.5, "macro_f1": 0.5, "auc": 0.5},
}
MIMV = {"method": "mimv", "recipe": "amimv-views", "sampler": "uniform", "partner": "uniform"}


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
            right = result.get("right", (30, 15, 5))
            within = np.concatenate([np.arange(n) < r for n, r in zip((60, 30, 10), right, strict=True)])
            arrays[f"row_{i:03d}"] = np.where(within, LABELS, (LABELS + 1) % 3).astype(np.uint8)
            head, medium, tail = right[0] / 60, right[1] / 30, right[2] / 10
            line = LINE | {
                "balanced_accuracy": (head + medium + tail) / 3,
                "head": head,
                "medium": medium,
                "tail": tail,
            }
            line |= {} if "features" in result else MIMV
            writer.writerow(line | {"run": folder.name} | {k: v for k, v in result.items() if k != "right"})
    if predictions:
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]


def change_predictions(folder: Path, **arrays: np.ndarray) -> None:
    with np.load(folder / "predictions.npz") as stored:
        np.savez(folder / "predictions.npz", **(dict(stored) | arrays))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods at two ratios with two seeds, a sampler, and baselines."""
    folder = tmp_path_factory.mktemp("study") / "runs"
    for seed in (0, 1):
        for rho, lost in ((1.0, 0), (50.0, 4)):
            at = {"rho": rho, "seed": seed}
            amimv = at | {"right": (50 + seed, 20, 8 - lost)}
            linear = at | {"probe": "linear", "right": (40, 22, 9 - lost)}
            write_run(folder / f"amimv-{rho:g}-{seed}", [amimv, linear], seed=seed)
            write_run(folder / f"simclr-{rho:g}-{seed}", [at | SIMCLR | {"right": (55, 10, 6 - lost)}], seed=seed)
            majority = {"features": "majority", "probe": "", "right": (60, 0, 0)}
            beside = (majority, PIXELS | {"right": (59, 29, 9)}, SCRATCH | {"right": (58, 28, 7)})
            write_run(folder / f"base-{rho:g}-{seed}", [at | one for one in beside], seed=seed)
        balanced = {"rho": 50.0, "seed": seed, "sampler": "class-balanced", "right": (44, 20, 7)}
        write_run(folder / f"sampler-{seed}", [balanced], seed=seed)
    return folder


@pytest.fixture(scope="module")
def study(runs: Path) -> Study:
    return read_study([runs])


@pytest.fixture
def own_runs(runs: Path, tmp_path: Path) -> Path:
    """A copy of them to be spoiled."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., str]:
    """The verdict on runs of these results each."""

    def conclude(*each: list[dict[str, Any]], predictions: bool = True, **settings: Any) -> str:
        for i, results in enumerate(each):
            write_run(tmp_path / f"{i}", results, predictions)
        study = read_study([tmp_path])
        return build_part(study.rows, study, ReportSettings((), **settings)).verdict

    return conclude


def at_rho(study: Study, rho: float) -> pd.DataFrame:
    return study.rows[study.rows["rho"] == rho]


def table_at(study: Study, rho: float, **settings: Any) -> Table:
    return build_part(at_rho(study, rho), study, ReportSettings((), **settings)).table


# What is concluded.

ALL, HALF, NONE = (60, 30, 10), (30, 15, 5), (0, 0, 0)


def test_a_verdict_whose_numbers_are_known(told: Callable[..., str]) -> None:
    """All images against none of them is 100 points whatever is drawn, equal predictions are none."""
    mine = [{"right": ALL, "val_balanced_accuracy": 0.9}, {"right": NONE, "probe": "linear"}]
    words = told(mine, [SIMCLR | {"right": NONE}], [VICREG | {"right": ALL}, SCRATCH | {"right": NONE}, PIXELS])
    assert words.startswith("With 100 % of the labels (555 images), MIMV on amimv-views (kNN, 100.0 %, one seed) ")
    assert "is ahead of training from scratch by 100.0 points [100.0, 100.0], raw pixels by 50.0 points [" in words
    assert "] and SimCLR by 100.0 points [100.0, 100.0]; it is not told apart from VICReg." in words


@pytest.mark.parametrize(
    ("runs_of", "expected"),
    [
        ([[SIMCLR]], "SimCLR (kNN, 50.0 %, one seed) is compared with nothing. Not run: "),
        ([[SIMCLR, SCRATCH, PIXELS]], "one seed) is not told apart from training from scratch and raw pixels."),
        ([[SIMCLR | {"right": NONE}, PIXELS]], "is behind raw pixels by 50.0 points ["),
        ([[PIXELS, SCRATCH]], "there is no verdict: only baselines were run."),
        ([[SIMCLR | {"val_balanced_accuracy": ""}, PIXELS]], "no verdict: no method has scores on the val"),
        ([[SIMCLR | {"n_train": 1, "label_fraction": 0.01}]], "With 1 % of the labels (1 image), SimCLR"),
        ([[SIMCLR | {"recipe": "mimv"}, {"recipe": "mimv"}]], "is not told apart from SimCLR on mimv."),
        ([[{}, {"sampler": "square-root"}]], "is not told apart from MIMV on amimv-views (square-root)."),
        ([[SIMCLR, SIMCLR | {"seed": 1}, {"val_balanced_accuracy": 1}]], "SimCLR (kNN, 50.0 ± 0.0 %) is compared"),
    ],
)  # fmt: skip
def test_the_words_of_a_verdict(told: Callable[..., str], runs_of: list[list[dict[str, Any]]], expected: str) -> None:
    words = told(*runs_of)
    assert expected in words
    assert words.endswith(".")
    assert ".." not in words


def test_a_verdict_without_predictions_says_so(told: Callable[..., str], tmp_path: Path) -> None:
    without = "Without predictions of one class for each of the same test images: raw pixels."
    assert without in told([SIMCLR, PIXELS], predictions=False)


def test_no_verdict_on_multi_label_predictions_but_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", [SIMCLR, PIXELS])
    both = np.eye(3, dtype=np.uint8)[LABELS]
    change_predictions(tmp_path / "runs" / "a", labels=both, row_000=both, row_001=both)
    report(ReportSettings((str(tmp_path / "runs"),), output=str(tmp_path / "page.html")))
    assert "is compared with nothing. Not run: training from scratch. Without" in (tmp_path / "page.html").read_text()


def test_validation_chooses_method_and_probe_whatever_the_test_split_says(told: Callable[..., str]) -> None:
    bad, good = {"right": HALF, "val_balanced_accuracy": 0.6}, {"right": ALL, "val_balanced_accuracy": 0.5}
    words = told([SIMCLR | bad, SIMCLR | good | {"probe": "linear"}], [good])
    assert "SimCLR (kNN, 50.0 %, one seed) is behind MIMV on amimv-views by 50.0 points [" in words


def test_one_probe_or_one_method_may_be_asked_for(study: Study) -> None:
    own = judged(at_rho(study, 50), "kNN")
    assert set(own["probe"]) == {"knn", "", "classifier"}
    assert choose(own) == "mimv on amimv-views"
    assert choose(own, "simclr") == "simclr on two-view"
    assert choose(own, "amimv") == "mimv on amimv-views"
    assert choose(own, "raw pixels") == "raw pixels"
    assert choose(own, "byol") == "mimv on amimv-views"


def by_image(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Difference in balanced accuracy and its interval, in points: images of each class drawn one by one."""
    random, gain = np.random.default_rng(77), 100 * ((a == labels).mean(axis=0) - (b == labels).mean(axis=0))
    classes = [gain[labels == c] for c in np.unique(labels)]
    drawn = np.mean([random.choice(one, (4000, len(one))).mean(axis=1) for one in classes], axis=0)
    return np.array([np.mean([one.mean() for one in classes]), *np.percentile(drawn, [2.5, 97.5])])


def test_published_verdicts_are_those_of_another_computation() -> None:
    """Choices from the CSV beside the archive, predictions from its files, and a bootstrap by image."""
    table = pd.read_csv(PUBLISHED / "dermatoscopy.csv", keep_default_na=False)
    study = read_study([PUBLISHED / "dermatoscopy.zip"], pool_grids=True)
    names = {
        "supervised from scratch": "training from scratch",
        "raw pixels": "raw pixels",
        "simclr on two-view": "SimCLR",
    }
    names |= {"vicreg on two-view": "VICReg"} | {
        f"mimv on {r}": f"MIMV on {r}" for r in ("amimv-strength", "amimv-views")
    }
    with zipfile.ZipFile(PUBLISHED / "dermatoscopy.zip") as archive:

        def predictions(row: Any) -> tuple[np.ndarray, np.ndarray]:
            found = []
            for run in row["runs"].split():
                lines = csv.DictReader(io.StringIO(archive.read(f"{run}/results.csv").decode()))
                kind = "pretrained" if " on " in row["row"] else row["row"].replace(" from scratch", "")
                wanted = (kind, row["probe"], f"{row['label_fraction']:g}")
                (i,) = (
                    i
                    for i, one in enumerate(lines)
                    if (one["features"], one["probe"], f"{float(one['label_fraction']):g}") == wanted
                )
                stored = np.load(io.BytesIO(archive.read(f"{run}/predictions.npz")))
                found.append(stored[f"row_{i:03d}"])
            return stored["labels"], np.stack(found)

        for share, part in zip((0.01, 0.1, 1.0), split_parts(study.rows), strict=True):
            own = table[(table["label_fraction"] == share) & table["row"].isin(names)]
            own = own[(own["row"] != "supervised from scratch") | (own["probe"] == "classifier")]
            own = own.loc[own.groupby("row")["val_balanced_accuracy_mean"].idxmax()].set_index("row", drop=False)
            best = own[own["row"].str.contains(" on ")]["val_balanced_accuracy_mean"].idxmax()
            verdict = build_part(part, study, ReportSettings(())).verdict
            assert verdict in re.sub(r"[\s>]+", " ", (PUBLISHED / "README.md").read_text())
            if share == 0.01:
                other = build_part(part, study, ReportSettings((), baseline="vicreg")).verdict
                assert (
                    "training from scratch by 10.4 points [6.4, 14.5] and raw pixels by 9.0 points [5.1, 13.3]"
                    in other
                )
            assert verdict.startswith(f"With {100 * share:g} % of the labels (")
            assert f"images), {names[best]} (" in verdict
            level = verdict.partition("not told apart from ")[2]
            for row in set(names) - {best}:
                labels, a = predictions(own.loc[best])
                expected = by_image(labels, a, predictions(own.loc[row])[1])
                if min(abs(expected[1:])) < 0.15:
                    continue  # too near to zero to be told by another draw
                said = re.search(rf"{names[row]} by ([\d.]+) points \[([\d.]+), ([\d.]+)\]", verdict)
                assert (said is None) == (names[row] in level) == (expected[1] <= 0 <= expected[2])
                if said:
                    assert float(said[1]) == pytest.approx(expected[0], abs=0.051)
                    assert [float(said[2]), float(said[3])] == pytest.approx(expected[1:].tolist(), abs=0.4)


# Tables.


def test_rows_columns_means_and_bold(study: Study) -> None:
    table = table_at(study, 50)
    baselines = ["majority class", "raw pixels", "supervised from scratch"]
    methods = ["mimv on amimv-views", "mimv on amimv-views, class-balanced", "simclr on two-view"]
    assert list(table.texts.index) == baselines + methods
    found = table.texts.loc["mimv on amimv-views"]
    both = [100 * (recall / 60 + 20 / 30 + 4 / 10) / 3 for recall in (50, 51)]
    assert found["kNN"] == f"{mean(both):.1f} ± {stdev(both):.1f}"
    assert found["linear"] == f"{100 * (40 / 60 + 22 / 30 + 5 / 10) / 3:.1f} ± 0.0"
    assert list(found[["fine-tuned", "judged by", "lead", "seeds"]]) == ["-", "knn", "-", "2"]
    assert found["validation: kNN"] == "40.0 ± 0.0"
    assert list(table.texts.loc["majority class"][["kNN", "linear", "fine-tuned"]]) == ["33.3 ± 0.0"] * 3
    scratch = f"{100 * (58 / 60 + 28 / 30 + 7 / 10) / 3:.1f} ± 0.0"
    assert list(table.texts.loc["supervised from scratch"][["kNN", "linear", "fine-tuned"]]) == ["-", "-", scratch]
    # Raw pixels are better than all, and a baseline; of one method alone in its column nothing is best.
    best = table.best()
    assert list(best.index[best["kNN"]]) == ["mimv on amimv-views, class-balanced"]
    assert not best[["linear", "lead", "seeds"]].any(axis=None)
    assert list(table.texts)[table.more - 1 : table.more + 1] == ["seeds", "accuracy"]
    assert "rho 50 (exp)" in table.title
    assert [seed for seed, _ in (table.runs or {})["simclr on two-view"]] == [0, 1]


def test_a_column_of_nobody_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [{"features": "majority", "probe": ""}, {}])
    write_run(tmp_path / "b", [SIMCLR | {"auc": ""}])
    columns = list(table_at(read_study([tmp_path]), 1).texts)
    assert columns[:4] == ["kNN", "judged by", "lead", "seeds"]
    assert {"validation: kNN", "AUC", "medium"} <= set(columns)
    assert not {"linear", "fine-tuned", "validation: linear"} & set(columns)


def test_what_a_reader_must_know_stands_below(study: Study, tmp_path: Path) -> None:
    fixed = {"total": 70, "rho": 1.0}
    write_run(tmp_path / "a", [fixed, fixed | SIMCLR | {"steps": 9}, fixed | SIMCLR | {"seed": 1, "revision": "def+"}])
    notes = " ".join(table_at(read_study([tmp_path]), 1).notes)
    for words in ("All classes are as large", "steps differ: 9 (simclr on two-view); 400", "Rows have 1 to 2 seeds"):
        assert words in notes
    assert "Revisions of the code differ: training abc123; evaluation abc123, def+ (+: changed since)." in notes
    assert all(note.startswith("lead: ") for note in table_at(study, 1).notes)


def test_leads_are_paired_over_seeds(study: Study) -> None:
    lead = table_at(study, 50).texts.loc["simclr on two-view", "lead"]
    difference, low, high = map(float, re.findall(r"[-+][\d.]+", lead))
    expected = 100 * ((50.5 - 55) / 60 + (20 - 10) / 30 + (4 - 2) / 10) / 3
    assert difference == pytest.approx(expected, abs=0.051)
    assert low < difference < high
    swapped = table_at(study, 50, baseline="simclr").texts["lead"]
    assert swapped["mimv on amimv-views"].startswith(f"{-expected:+.1f}")


def test_predictions_of_other_images_or_none_give_no_interval(own_runs: Path) -> None:
    (own_runs / "simclr-50-0" / "predictions.npz").write_bytes(b"PK torn")
    change_predictions(own_runs / "sampler-1", labels=LABELS[::-1])
    leads = table_at(read_study([own_runs]), 50).texts["lead"]
    assert list(leads[leads == "-"].index) == [
        "mimv on amimv-views", "mimv on amimv-views, class-balanced", "simclr on two-view"
    ]  # fmt: skip


def test_drop_with_ratio_and_gain_of_a_sampler(study: Study) -> None:
    drops = drop_table(with_fixed_tail(pick(study.rows, "kNN"), study)).texts
    own = drops.loc["simclr on two-view"]
    assert list(own[["tail: rho 1", "tail: rho 50", "tail: drop"]]) == ["60.0 ± 0.0", "20.0 ± 0.0", "40.0 ± 0.0"]
    assert own["balanced accuracy: drop"] == "13.3 ± 0.0"
    assert "mimv on amimv-views, class-balanced" not in drops.index  # run at the highest ratio only
    gains = gain_table(judged(at_rho(study, 50)))
    assert gains is not None
    lost = [100 * (44 - right) / 60 for right in (50, 51)]
    expected = [f"{mean(lost):+.1f} ± {stdev(lost):.1f}", "+0.0 ± 0.0", "+30.0 ± 0.0"]
    assert list(gains.texts.loc["mimv on amimv-views, class-balanced"])[1:] == expected
    assert gain_table(judged(at_rho(study, 1))) is None


def test_the_tail_is_the_same_classes_at_every_ratio(own_runs: Path) -> None:
    for folder in own_runs.glob("*-1-*"):  # balanced: the last class is no smaller
        change_predictions(folder, train_counts=np.array([9, 20, 30]))
    study = read_study([own_runs])
    rows = with_fixed_tail(pick(study.rows, "kNN"), study)
    assert set(rows[(rows["name"] == "simclr on two-view") & (rows["rho"] == 1)]["fixed_tail"]) == {0.6}


# Which runs are one row.


def names_of(folder: Path, *configs: dict[str, Any], results: list[dict[str, Any]] | None = None) -> Study:
    for i, config in enumerate(configs):
        seed = config.get("seed", 0)
        write_run(folder / f"{i}", [one | {"seed": seed} for one in results or [{}]], **config)
    return read_study([folder])


def test_settings_that_tell_rows_apart_are_named_unless_usual(tmp_path: Path) -> None:
    study = names_of(tmp_path, *({"online": o, "seed": s} for s in (0, 1) for o in ("hard", "hard", "soft")))
    assert set(study.rows["name"]) == {"mimv on amimv-views", "mimv on amimv-views, online soft"}
    assert (study.repeats, len(study.rows)) == (2, 4)


def test_unset_is_unset_however_it_is_written(tmp_path: Path) -> None:
    """0 or an empty text in older runs, nothing in newer ones; and a setting that a version did not know."""
    old, new = {"view_size": 0, "cache": "''", "rotation": 180.0}, {"view_size": "null", "rotation": 180}
    study = names_of(tmp_path, old | {"seed": 0}, new | {"seed": 1}, old | {"seed": 2, "view_size": 20})
    assert study.rows.groupby("name")["seed"].apply(list).to_dict() == {
        "mimv on amimv-views": [0, 1],
        "mimv on amimv-views, view_size 20": [2],
    }
    known = ({"seed": 0}, {"seed": 1, "spare_positives": False}, {"spare_positives": True})
    study = names_of(tmp_path / "versions", *({"method": "mimv"} | one for one in known))
    assert set(study.rows["name"]) == {"mimv on amimv-views", "mimv on amimv-views, spare_positives True"}


def test_runs_that_differ_in_many_settings_stay_apart(tmp_path: Path) -> None:
    many = {"crop_min": 0.1, "brightness": 0.1, "contrast": 0.1, "hue": 0.01}
    others = [dict.fromkeys(many, 0.3) | {"rotation": 0, "crop_min": 0.9}, dict.fromkeys(many, 0.3) | {"rotation": 1}]
    study = names_of(tmp_path, many | {"rotation": 180}, many | {"rotation": 5, "seed": 1}, *others)
    assert study.repeats == 0
    assert study.rows["name"].nunique() == 4
    assert sum("rotation 180" in name for name in study.rows["name"]) == 1


def test_each_kind_of_features_depends_on_its_own_settings(tmp_path: Path) -> None:
    features = [{"features": name} for name in ("raw pixels", "random", "majority")]
    study = names_of(tmp_path / "pixels", {"view_size": 0}, {"view_size": 20}, results=features)
    counts = study.rows.groupby("features")["name"].nunique().to_dict()
    assert counts == {"raw pixels": 2, "random": 2, "majority": 1}
    results = [{"probe": "knn"}, {"probe": "fine-tuned"}]
    study = names_of(tmp_path / "tuned", {"supervised_steps": 5}, {"supervised_steps": 60}, results=results)
    assert study.rows.groupby("probe")["name"].nunique().to_dict() == {"knn": 1, "fine-tuned": 2}
    assert study.repeats == 1  # of kNN


def test_other_images_are_other_tables(tmp_path: Path) -> None:
    for seed in (7, 8):
        write_run(tmp_path / f"seed{seed}", [{"data": "phantom"}], data="phantom", data_seed=seed)
    write_run(tmp_path / "large", [{}], size=64)
    names = {"phantom (synthetic), data seed 7", "phantom (synthetic), data seed 8", "retinamnist, 64 px"}
    assert set(read_study([tmp_path]).rows["data"]) == names


def test_given_indices_are_a_table_of_their_own(tmp_path: Path) -> None:
    """They have no ratio: results say so by an empty one."""
    write_run(tmp_path / "given", [{"profile": "indices", "rho": "", "total": 40, "realised_ratio": "inf"}])
    study = read_study([tmp_path])
    assert describe_subset(study.rows.iloc[0]) == "given indices, 40 images in total"
    assert "realised ratio inf" in table_at(study, 0).title
    assert long_form(study.rows)["rho"].isna().all()


# What is read, and what is left out.


def write_plan(folder: Path, lines: list[dict[str, Any]]) -> None:
    with (folder / "plan.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, PLAN_COLUMNS)
        writer.writeheader()
        writer.writerows(dict.fromkeys(PLAN_COLUMNS, "") | {"profile": "exp", "total": 0} | line for line in lines)
    (folder / "failed").mkdir()
    (folder / "failed" / "broken.txt").write_text("loss is not finite at step 3\n")


def test_a_plan_gives_grids_failures_and_what_is_to_run(own_runs: Path) -> None:
    (own_runs / "amimv-1-1" / "results.csv").unlink()
    lines = [{"grid": "fixed", "run": "amimv-1-0", "rho": 1, "total": 100, "command": "python trainers/x.py --seed 0"}]
    lines += [{"grid": "capped", "run": "amimv-1-0", "rho": rho, "total": ""} for rho in (1, 10)]
    lines += [{"grid": "fixed", "run": name, "rho": 1} for name in ("nobody", "amimv-1-1", "broken")]
    write_plan(own_runs, lines)
    (own_runs / "failed" / "simclr-1-0.txt").write_text("it is done by now\n")
    study = read_study([own_runs])
    own = study.rows[study.rows["run"] == "amimv-1-0"]
    points = set(zip(own["grid"], own["rho"], own["total"], strict=True))
    assert points == {("fixed", 1, 100), ("capped", 1, 0), ("capped", 10, 0)}
    assert study.failed == [("broken", "loss is not finite at step 3")]
    assert (study.pending, study.left_out) == (["nobody", "amimv-1-1"], [])
    assert study.runs["run-amimv-1-0"].command == "python trainers/x.py --seed 0"
    pooled = read_study([own_runs], pool_grids=True)
    assert (set(pooled.rows["grid"]), pooled.repeats) == ({""}, 0)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("results.csv", None, "not finished: it has no results.csv"),
        ("results.csv", "", "results.csv cannot be read: EmptyDataError"),
        ("results.csv", ",".join(COLUMNS) + "\n", "results.csv has no data in line 2"),
        ("results.csv", ",".join(COLUMNS) + "\nrun,retina", "results.csv has no features in line 2: torn"),
        ("results.csv", "a,b\n1,2\n", "results.csv has no data in line 2"),
        ("results.csv", 'run,data\n"' + "x" * 200_000, "results.csv cannot be read"),
        ("config.yaml", "a: 2024-99-99", "config.yaml cannot be read: ValueError"),
        ("config.yaml", "a: " + "[" * 3000, "config.yaml cannot be read"),
        ("config.yaml", "words", "config.yaml cannot be read"),
        ("environment.json", '{"packages": ["torch"]}', "environment.json cannot be read"),
        ("environment.json", "{", "environment.json cannot be read: JSONDecodeError"),
    ],
)
def test_a_damaged_run_costs_itself_alone(tmp_path: Path, name: str, content: str | None, reason: str) -> None:
    for run in ("good", "bad"):
        write_run(tmp_path / run, [{}])
    (tmp_path / "holiday-pictures").mkdir()
    (tmp_path / "plan.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad" / name).unlink()
    if content is not None:
        (tmp_path / "bad" / name).write_text(content)
    left_out = dict(read_study([tmp_path]).left_out)
    assert left_out[str(tmp_path / "bad")].startswith(reason)
    assert left_out[str(tmp_path / "holiday-pictures")] == "not a run folder: it has no config.yaml"
    assert set(left_out) == {str(tmp_path / one) for one in ("bad", "holiday-pictures", "plan.csv")}
    assert all("\n" not in words for words in left_out.values())
    shutil.rmtree(tmp_path / "good")
    with pytest.raises(InputError, match=rf"no finished run in .*: {tmp_path}/bad: {reason[:20]}|plan.csv"):
        read_study([tmp_path])


@pytest.mark.parametrize("spoiled", [{"train_counts": np.arange(2)}, {"projection": np.eye(3)}, None])
def test_foreign_predictions_cost_pictures_and_intervals_only(
    tmp_path: Path, spoiled: dict[str, np.ndarray] | None
) -> None:
    write_run(tmp_path / "runs" / "a", [{}, PIXELS])
    if spoiled:
        change_predictions(tmp_path / "runs" / "a", **spoiled)
    else:
        np.save(tmp_path / "other.npy", LABELS)
        (tmp_path / "other.npy").rename(tmp_path / "runs" / "a" / "predictions.npz")
    report(ReportSettings((str(tmp_path / "runs"),), output=str(tmp_path / "page.html")))
    assert "is compared with nothing. Not run: training from scratch. Without" in (tmp_path / "page.html").read_text()


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "old", [{}], predictions=False)
    path = tmp_path / "old" / "results.csv"
    pd.read_csv(path).drop(columns=["total", "partner", "steps", "val_balanced_accuracy"]).to_csv(path, index=False)
    report(ReportSettings((str(tmp_path),), output=str(tmp_path / "page.html")))
    assert "there is no verdict: no method has scores on the validation split." in (tmp_path / "page.html").read_text()


def test_what_cannot_be_reported_is_one_line(runs: Path, tmp_path: Path) -> None:
    for paths, settings, words in (
        ([tmp_path / "nowhere"], {}, "there is no folder"),
        ([tmp_path], {}, "no run folder in it"),
        ([], {}, "no folder of runs is given"),
        ([runs], {"baseline": "simcrl"}, "did you mean simclr"),
        ([runs], {"probe": "kn"}, "did you mean knn"),
        ([runs, runs], {"archive": "two.zip"}, "packs one folder of runs"),
        ([runs / "amimv-1-0"], {"archive": "two.zip"}, "packs one folder of runs"),
        ([runs], {"archive": "two.csv"}, r"ends in \.zip"),
    ):
        with pytest.raises(InputError, match=words):
            report(ReportSettings(tuple(map(str, paths)), output=str(tmp_path / "page.html"), **settings))
    assert not list(tmp_path.iterdir())


# What is written.


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


def test_an_archive_is_read_as_its_folder_is(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write_run(runs / f"a{seed}", [{"seed": seed}, PIXELS | {"seed": seed}], seed=seed)
    write_plan(runs, [{"grid": "fixed", "run": name, "rho": 1} for name in ("a0", "nobody", "broken")])
    (runs / "a0" / "curves.png").write_bytes(b"not kept")
    for name in ("one", "two"):
        report(ReportSettings((str(runs),), archive=str(tmp_path / f"{name}.zip")))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        kept = {name.rpartition("/")[2] for name in archive.namelist()}
    assert kept == {"plan.csv", "broken.txt", "config.yaml", "environment.json", "results.csv", "predictions.npz"}
    written = {}
    for source in (runs, tmp_path / "one.zip"):
        for form in ("html", "csv"):
            report(ReportSettings((str(source),), format=form, output=str(tmp_path / "out")))
            text = re.sub('base64,[^"]+', "", (tmp_path / "out").read_text()).replace(str(source), "")
            assert written.setdefault(form, text) == text
    assert (tmp_path / "one.csv").read_text() == written["csv"]


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


def test_published_archives_are_small_and_agree_with_the_tables_and_words_beside_them() -> None:
    files = list(PUBLISHED.iterdir())
    assert sum(path.stat().st_size for path in files) < 2**22
    assert {path.suffix for path in files} == {".md", ".zip", ".csv"}
    for path in PUBLISHED.glob("*.zip"):
        study = read_study([path], pool_grids=True)
        assert not study.left_out
        assert long_form(study.rows).to_csv(index=False) == path.with_suffix(".csv").read_text()


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (*PUBLISHED.parent.rglob("*.md"), *PUBLISHED.parents[1].glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_markdown_and_latex(runs: Path, tmp_path: Path) -> None:
    for form in ("md", "latex"):
        report(ReportSettings((str(runs),), format=form, output=str(tmp_path / form)))
    markdown, latex = (tmp_path / "md").read_text(), (tmp_path / "latex").read_text()
    assert re.search(r"\| mimv on amimv-views, class-balanced \| +\*\*70\.0 ± 0\.0\*\* \|", markdown)
    assert r"mimv on amimv-views, class-balanced & \textbf{70.0 $\pm$ 0.0} &" in latex
    assert re.search(r"(?<!\\)%", latex) is None
    assert not {"\x02", "\x03"} & set(latex + markdown)
    assert markdown.count("###") == latex.count(r"\caption") == 2
    assert markdown.count("With 100 % of the labels (555 images), MIMV on amimv-views") == 2
    assert _escape(r"b_$^{x}\~&%#±") == r"b\_\$\textasciicircum{}\{x\}\textbackslash{}\textasciitilde{}\&\%\#$\pm$"


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_run(folder / "more" / "toy", [{"data": "phantom"}], data="phantom")
    (folder / "more" / "half").mkdir()
    (folder / "more" / "half" / "config.yaml").write_text("data: '<script>alert(1)</script>'\n")
    report(ReportSettings((str(runs), str(folder / "more")), output=str(folder / "page.html")))
    return folder / "page.html"


def test_the_page_stands_alone_and_leads_to_every_run(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"""(src|href)=["']?(https?:)?//""", text) is None
    anchors = set(re.findall(r'href="#([^"]+)"', text))
    assert anchors <= set(re.findall(r'id="([^"]+)"', text))
    assert {f"run-{name}" for name in ("amimv-1-0", "simclr-50-1", "base-1-1", "toy")} <= anchors
    assert text.count("<script>") == 1
    balanced = 50 * (1 / 60 + 1 / 30 + 1 / 10) ** 0.5 / 3
    for words in (
        *(
            "not finished: it has no results.csv",
            "python trainers/pretrain.py --seed 0",
            "training 61 s (, 1 threads)",
        ),
        *("phantom is synthetic", "phantom (synthetic)</a>", "no evidence about medicine"),
        f"near 50 % is 5.0 points, and of a balanced accuracy with every recall near 50 %, {balanced:.1f} points",
    ):
        assert words in text
    # Robustness, recalls, confusions and projections of one set; the last three of the other.
    assert text.count("data:image/png;base64,") == 7
    places = [text.index(words) for words in ("MIMV on amimv-views (kNN", "data:image/png", "<table>")]
    assert places == sorted(places)  # words, then figures, then tables


def test_the_page_fits_windows_and_sorts_its_tables(page: Path) -> None:
    """At 1280 and 400 pixels nothing but a box of its own scrolls sideways, at 1280 not even that, with the further
    columns or without.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a browser: no chromium, chromium-browser or google-chrome on the PATH")
    published = page.with_name("published.html")
    report(ReportSettings((str(PUBLISHED / "pixels.zip"),), pool_grids=True, output=str(published)))
    frames = "".join(f'<iframe src="{one.name}" width={w}></iframe>' for one in (page, published) for w in (1280, 400))
    page.with_name("frames.html").write_text(f"""<body>{frames}<pre></pre><script>onload = () => {{
      const found = [...document.querySelectorAll("iframe")].map(frame => {{
        const own = frame.contentDocument, over = one => one.scrollWidth - one.clientWidth;
        const wide = () => [own.documentElement, ...own.querySelectorAll(".wide")].map(over);
        const before = wide();
        own.querySelectorAll("input").forEach(one => one.click());
        const table = own.querySelector("section table"), after = wide();
        table.querySelectorAll("button")[1].click();
        const values = [...table.tBodies[0].rows].map(row => row.cells[1].dataset.sort);
        const order = table.querySelector("[aria-sort]").ariaSort;
        return {{width: own.defaultView.innerWidth, before, after, values, order}};
      }});
      document.querySelector("pre").textContent = JSON.stringify(found);
    }}</script>""")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",
    ]
    flags += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    command = [browser, *flags, page.with_name("frames.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    (words,) = re.findall(r"<pre>(.+)</pre>", shown.stdout)
    for found in json.loads(words):
        assert found["before"][0] == found["after"][0] == 0
        if found["width"] == 1280:
            assert len(found["before"]) > 4
            assert not any(found["before"] + found["after"])
        values = [float(value) for value in found["values"] if value]
        assert len(values) > 2
        assert values == sorted(values, reverse=True)
        assert found["order"] == "descending"
