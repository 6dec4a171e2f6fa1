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
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from amimv import InputError
from amimv.tools.report import ReportSettings, _escape, build_part, render_tables, report, split_parts
from amimv.tools.report_page.archive import pack_predictions
from amimv.tools.report_page.runs import Study, read_study
from amimv.tools.report_page.tables import Table, describe_subset, drop_table, gain_table, judged, long_form, pick
from amimv.tools.report_page.tables import with_fixed_tail as fixed
from amimv.tools.report_page.verdicts import choose
from amimv.trainers.evaluation import COLUMNS
from amimv.trainers.study import PLAN_COLUMNS

PUBLISHED = Path(__file__).parents[2] / "docs" / "study"
LABELS = np.repeat([0, 1, 2], [60, 30, 10])
ALL, HALF, NONE = {"right": (60, 30, 10)}, {"right": (30, 15, 5)}, {"right": (0, 0, 0)}
MIMV = {"method": "mimv", "recipe": "amimv-views", "sampler": "uniform", "partner": "uniform"}
SIMCLR, VICREG = ({"method": name, "recipe": "two-view"} for name in ("simclr", "vicreg"))
PIXELS, SCRATCH = {"features": "raw pixels"}, {"features": "supervised", "probe": "classifier"}
LINE = {"data": "retinamnist", "profile": "exp", "rho": 1.0, "total": 0, "realised_ratio": 7.5, "n_train": 555}
LINE |= {"features": "pretrained", "probe": "knn", "label_fraction": 1.0, "seed": 0, "steps": 400}
LINE |= {"revision": "abc123", "val_balanced_accuracy": 0.4, "accuracy": 0.5, "macro_f1": 0.5, "auc": 0.5}
VAL, RESULTS, CONFIG, ENVIRONMENT = "val_balanced_accuracy", "results.csv", "config.yaml", "environment.json"


def write_run(folder: Path, results: list[dict[str, Any]], predictions: bool = True, **config: Any) -> None:
    """A run folder; a result's ``right`` is how many images of each class are classified rightly."""
    folder.mkdir(parents=True)
    settings = {"data": "retinamnist", "data_seed": 0, "backbone": "small", "seed": results[0].get("seed", 0)}
    (folder / CONFIG).write_text("".join(f"{k}: {v}  # flag\n" for k, v in (settings | config).items()))
    environment = {"revision": "abc123", "python": "3.12", "packages": {"torch": "9.9"}, "threads": 1}
    environment |= {"command": ["pretrain.py", "--seed", "0"], "wall_seconds": {"training": 61.2}}
    (folder / ENVIRONMENT).write_text(json.dumps(environment))
    arrays: dict[str, np.ndarray] = {"labels": LABELS, "class_names": np.array(["naevus", "mole", "rare"])}
    arrays |= {"train_counts": np.array([500, 50, 5]), "projection": np.eye(100, 2, dtype=np.float32)}
    lines = []
    for i, result in enumerate(results):
        right = result.get("right", HALF["right"])
        within = np.concatenate([np.arange(n) < r for n, r in zip((60, 30, 10), right, strict=True)])
        arrays[f"row_{i:03d}"] = np.where(within, LABELS, (LABELS + 1) % 3).astype(np.uint8)
        thirds = dict(zip(("head", "medium", "tail"), (right[0] / 60, right[1] / 30, right[2] / 10), strict=True))
        scores = thirds | {"balanced_accuracy": mean(thirds.values()), "run": folder.name}
        lines.append(LINE | scores | ({} if "features" in result else MIMV) | result)
    pd.DataFrame(lines).reindex(columns=COLUMNS).to_csv(folder / RESULTS, index=False)
    if predictions:
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]


def spoil(folder: Path, **arrays: np.ndarray) -> None:
    with np.load(folder / "predictions.npz") as stored:
        np.savez(folder / "predictions.npz", **(dict(stored) | arrays))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods at two ratios with two seeds, a sampler, and baselines."""
    folder = tmp_path_factory.mktemp("study") / "runs"
    for seed in (0, 1):
        for rho, lost in ((1.0, 0), (50.0, 4)):
            at = {"rho": rho, "seed": seed}
            linear = at | {"probe": "linear", "right": (40, 22, 9 - lost)}
            write_run(folder / f"amimv-{rho:g}-{seed}", [at | {"right": (50 + seed, 20, 8 - lost)}, linear], seed=seed)
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


def at_rho(study: Study, rho: float) -> pd.DataFrame:
    return study.rows[study.rows["rho"] == rho]


def table_at(study: Study, rho: float, **settings: Any) -> Table:
    return build_part(at_rho(study, rho), study, ReportSettings((), **settings)).table


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., str]:
    """The verdict on one run of these results."""

    def conclude(*results: dict[str, Any]) -> str:
        write_run(tmp_path / "run", list(results))
        study = read_study([tmp_path])
        return build_part(study.rows, study, ReportSettings(())).verdict

    return conclude


def test_a_verdict_whose_numbers_are_known(told: Callable[..., str]) -> None:
    """All images against none is 100 points whatever is drawn; equal predictions are none."""
    mine = (ALL | {VAL: 0.9}, NONE | {"probe": "linear"})
    words = told(*mine, SIMCLR | NONE, VICREG | ALL, SCRATCH | NONE, PIXELS | NONE)
    hundred = "by 100.0 points [100.0, 100.0]"
    assert words == (
        "With 100 % of the labels (555 images), MIMV on amimv-views (kNN, 100.0 %, one seed) is ahead of training "
        f"from scratch {hundred}, raw pixels {hundred} and SimCLR {hundred}; it is not told apart from VICReg."
    )


WORDS = {
    "SimCLR (kNN, 50.0 %, one seed) is compared with nothing. Not run: training from scratch and raw p": [SIMCLR],
    "one seed) is not told apart from training from scratch and raw pixels.": [SIMCLR, SCRATCH, PIXELS],
    "is behind raw pixels by 100.0 points [100.0, 100.0]. Not run: training": [SIMCLR | NONE, PIXELS | ALL],
    "is not told apart from training from the initial weights, raw pixels and frozen resnet18.": [
        *(SIMCLR, PIXELS, SCRATCH | {"features": "supervised from initial weights"}, {"features": "frozen resnet18"})
    ],
    "there is no verdict: only baselines were run.": [PIXELS, SCRATCH],
    "there is no verdict: no method has scores on the validation split.": [SIMCLR | {VAL: ""}, PIXELS],
    "With 1 % of the labels (1 image), SimCLR": [SIMCLR | {"n_train": 1, "label_fraction": 0.01}],
    "is not told apart from SimCLR on mimv.": [SIMCLR | {"recipe": "mimv"}, {"recipe": "mimv"}],
    "is not told apart from MIMV on amimv-views (square-root).": [{}, {"sampler": "square-root"}],
    # One seed does not stand beside two, and what is best on test is not what validation chooses.
    "SimCLR (kNN, 50.0 ± 0.0 %) is compared": [SIMCLR, SIMCLR | {"seed": 1}, {VAL: 1}],
    "SimCLR (kNN, 0.0 %, one seed) is behind MIMV on amimv-views by 100.0": [
        *(SIMCLR | NONE | {VAL: 0.6}, SIMCLR | ALL | {VAL: 0.5, "probe": "linear"}, ALL | {VAL: 0.5})
    ],
}


@pytest.mark.parametrize("expected", WORDS)
def test_the_words_of_a_verdict(told: Callable[..., str], expected: str) -> None:
    words = told(*WORDS[expected])
    assert expected in words
    assert words.endswith(".")


def test_one_probe_or_one_method_may_be_asked_for(study: Study) -> None:
    own = judged(at_rho(study, 50), "kNN")
    assert set(own["probe"]) == {"knn", "", "classifier"}
    wanted = ("", "simclr", "amimv", "raw pixels", "byol")
    first = "mimv on amimv-views"
    assert [choose(own, one) for one in wanted] == [first, "simclr on two-view", first, "raw pixels", first]
    published = own.replace({"name": {"simclr on two-view": "mimv on mimv"}})
    assert [choose(published, one) for one in ("amimv", "mimv")] == [first, "mimv on mimv"]


def by_image(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[float]:
    """Difference in balanced accuracy and its interval in points: images of each class drawn one by one; and seeds."""
    random, gain = np.random.default_rng(77), 100 * ((a == labels).mean(axis=0) - (b == labels).mean(axis=0))
    classes = [gain[labels == c] for c in np.unique(labels)]
    drawn = np.mean([random.choice(one, (8000, len(one))).mean(axis=1) for one in classes], axis=0)
    difference, variances = np.mean([one.mean() for one in classes]), [drawn.var()]
    for scores in ([100 * balanced_accuracy_score(labels, one) for one in method] for method in (a, b)):
        drawn += random.choice(scores, (8000, len(scores) - 1)).mean(axis=1) - np.mean(scores)
        variances.append(np.var(scores, ddof=1) / len(scores))
    freedom = sum(variances) ** 2 / sum(one**2 / 2 for one in variances[1:])  # of three seeds two
    expansion = stats.t.ppf(0.975, freedom) / 1.96
    return [float(difference), *(difference + expansion * (np.percentile(drawn, [2.5, 97.5]) - difference))]


def predictions_of(archive: zipfile.ZipFile, row: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of all seeds of a line of the published table, from the files of its runs."""
    features = "pretrained" if " on " in row["row"] else row["row"].replace(" from scratch", "")
    found = []
    for run in row["runs"].split():
        lines = pd.read_csv(io.BytesIO(archive.read(f"{run}/results.csv")))
        same = (lines["features"] == features) & (lines["probe"] == row["probe"])
        (i,) = np.flatnonzero(same & (lines["label_fraction"] == row["label_fraction"]))
        stored = np.load(io.BytesIO(archive.read(f"{run}/predictions.npz")))
        found.append(stored[f"row_{i:03d}"])
    return stored["labels"], np.stack(found)


def test_published_verdicts_are_those_of_another_computation() -> None:
    """Choices from the CSV beside the archive, predictions from its files, and a bootstrap by image."""
    table = pd.read_csv(PUBLISHED / "dermatoscopy.csv", keep_default_na=False)
    study, text = read_study([PUBLISHED / "dermatoscopy.zip"], True), (PUBLISHED / "before.md").read_text()
    names = {"supervised from scratch": "training from scratch", "raw pixels": "raw pixels"}
    names |= {"simclr on two-view": "SimCLR", "vicreg on two-view": "VICReg"}
    names |= {f"mimv on amimv-{name}": f"MIMV on amimv-{name}" for name in ("strength", "views")}
    table = table[
        table["row"].isin(names) & ((table["row"] != "supervised from scratch") | (table["probe"] == "classifier"))
    ]
    for part in split_parts(study.rows):
        own = table[table["label_fraction"] == part["label_fraction"].iloc[0]]
        own = own.loc[own.groupby("row")[f"{VAL}_mean"].idxmax()].set_index("row", drop=False)
        best = own[own["row"].str.contains(" on ")][f"{VAL}_mean"].idxmax()
        verdict = build_part(part, study, ReportSettings(())).verdict
        assert verdict in re.sub(r"[\s>]+", " ", text)
        assert f"images), {names[best]} (" in verdict
        with zipfile.ZipFile(PUBLISHED / "dermatoscopy.zip") as archive:
            labels, a = predictions_of(archive, own.loc[best])
            others = {
                row: by_image(labels, a, predictions_of(archive, own.loc[row])[1]) for row in set(names) - {best}
            }
        for row, (difference, low, high) in others.items():
            said = re.search(rf"{names[row]} by ([\d.]+) points \[([\d.]+), ([\d.]+)\]", verdict)
            level = names[row] in verdict.partition("not told apart from ")[2]
            if min(abs(low), abs(high)) > 0.15:  # nearer to zero another draw may be on its other side
                assert level == (said is None) == (low <= 0 <= high)
            if said:
                assert list(map(float, said.groups())) == pytest.approx([difference, low, high], abs=0.4)
                assert float(said[1]) == pytest.approx(difference, abs=0.051)
    few = next(split_parts(study.rows))
    other = build_part(few, study, ReportSettings((), baseline="vicreg")).verdict
    assert "training from scratch by 10.4 points [6.2, 14.6] and raw pixels by 9.0 points [5.0, 13.0]" in other
    assert "pre-training is worth ten points over training from scratch (VICReg +10.4 [+6.2, +14.6])" in re.sub(
        r"\s+", " ", (PUBLISHED.parents[1] / "README.md").read_text()
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two methods with two seeds, three draws of half of the labels, and all labels; the reference without draw 7."""
    folder = tmp_path_factory.mktemp("drawn")
    for seed in (0, 1):
        for name, method, gain in (("amimv", {}, 3), ("simclr", SIMCLR, 0)):
            results: list[dict[str, Any]] = [
                method
                | {"seed": seed, "label_fraction": 0.5, "label_seed": draw, "right": (40 + gain + seed + i, 20, 5)}
                for i, draw in enumerate((5, 6, 8) if name == "amimv" else (5, 6, 7, 8))
            ]
            write_run(folder / f"{name}-{seed}", [*results, method | {"seed": seed, "label_seed": ""}], seed=seed)
    return read_study([folder])


def test_draws_of_the_labels_are_a_source_of_their_own(drawn: Study) -> None:
    half = drawn.rows[drawn.rows["label_fraction"] == 0.5]
    part = build_part(half, drawn, ReportSettings((), baseline="amimv"))
    texts = part.table.texts
    assert texts.loc["mimv on amimv-views", ["seeds", "draws"]].tolist() == ["2", "3"]
    scores = np.array([[((43 + seed + i) / 60 + 20 / 30 + 5 / 10) / 3 for i in range(3)] for seed in (0, 1)])
    mean_, over_seeds, over_draws = (
        100 * one for one in (scores.mean(), stdev(scores.mean(axis=1)), stdev(scores.mean(axis=0)))
    )
    assert texts.loc["mimv on amimv-views", "kNN"] == f"{mean_:.1f} ± {over_seeds:.1f} ± {over_draws:.1f}"
    # Of the draws that both have, the first, second and last: 3, 3 and 2 images of 60 more in one of three classes.
    lead = [100 / 3 * (3 + 3 + 2) / 3 / 60, 100 * stats.sem([3 / 180, 3 / 180, 2 / 180])]
    assert texts.loc["simclr on two-view", "lead"].startswith(f"{lead[0]:+.1f} [")
    (column,) = [column for column in texts if column.startswith("lead: ±")]
    assert column == "lead: ± images, draws, seeds"
    seeds = 100 * np.hypot(1, 1) * stats.sem([0, 1 / 180])
    assert texts.loc["simclr on two-view", column].split(", ")[1:] == [f"{lead[1]:.1f}", f"{seeds:.1f}"]
    assert ", 3 draws of the labels) " in part.verdict
    titles = [line for line in render_tables(drawn, ReportSettings((), format="md")).splitlines() if "###" in line]
    assert [title.endswith("over seeds ± std over draws of the labels") for title in titles] == [True, False]
    whole = build_part(drawn.rows[drawn.rows["label_fraction"] == 1], drawn, ReportSettings((), baseline="amimv"))
    assert "draws" not in whole.table.texts.columns
    assert "draws of the labels" not in whole.verdict
    numbers = long_form(drawn.rows).set_index(["row", "label_fraction"])
    assert numbers.loc[("mimv on amimv-views", 0.5), "n_draws"] == 3
    assert numbers.loc[("mimv on amimv-views", 0.5), "balanced_accuracy_std_draws"] == pytest.approx(
        over_draws / 100, abs=1e-6
    )


def test_results_of_an_earlier_version_are_of_the_draw_by_the_data_seed(tmp_path: Path) -> None:
    result = {"label_fraction": 0.5, "label_seed": ""}
    write_run(tmp_path / "old", [result, {}], data_seed=4)
    write_run(tmp_path / "new", [result | {"label_seed": 4}, result | {"label_seed": 5}], data_seed=4)
    study = read_study([tmp_path])
    assert sorted(study.rows["label_seed"]) == ["", "4", "5"]
    assert study.repeats == 1


def test_rows_columns_means_and_bold(study: Study) -> None:
    table = table_at(study, 50)
    baselines = ["majority class", "raw pixels", "supervised from scratch"]
    methods = ["mimv on amimv-views", "mimv on amimv-views, class-balanced", "simclr on two-view"]
    assert list(table.texts.index) == baselines + methods
    found, probes = table.texts.loc["mimv on amimv-views"], ["kNN", "linear", "fine-tuned"]
    both = [100 * (recall / 60 + 20 / 30 + 4 / 10) / 3 for recall in (50, 51)]
    linear = f"{100 * (40 / 60 + 22 / 30 + 5 / 10) / 3:.1f} ± 0.0"
    assert list(found[probes]) == [f"{mean(both):.1f} ± {stdev(both):.1f}", linear, "-"]
    assert list(found[["judged by", "lead", "seeds", "validation: kNN"]]) == ["knn", "-", "2", "40.0 ± 0.0"]
    assert list(table.texts.loc["majority class", probes]) == ["33.3 ± 0.0"] * 3
    scratch = f"{100 * (58 / 60 + 28 / 30 + 7 / 10) / 3:.1f} ± 0.0"
    assert list(table.texts.loc["supervised from scratch", probes]) == ["-", "-", scratch]
    # Raw pixels are better than all, and a baseline; of one method alone in its column nothing is best.
    best = table.best()
    assert list(best.index[best["kNN"]]) == ["mimv on amimv-views, class-balanced"]
    assert not best[["linear", "lead", "seeds"]].any(axis=None)
    assert list(table.texts)[table.more - 1 : table.more + 1] == ["seeds", "accuracy"]
    assert "rho 50 (exp)" in table.title
    assert [seed for seed, _ in (table.runs or {})["simclr on two-view"]] == [0, 1]


def test_leads_are_paired_over_seeds(study: Study) -> None:
    lead = table_at(study, 50).texts.loc["simclr on two-view", "lead"]
    difference, low, high = map(float, re.findall(r"[-+][\d.]+", lead))
    expected = 100 * ((50.5 - 55) / 60 + (20 - 10) / 30 + (4 - 2) / 10) / 3
    assert difference == pytest.approx(expected, abs=0.051)
    assert low < difference < high
    swapped = table_at(study, 50, baseline="simclr").texts["lead"]
    assert swapped["mimv on amimv-views"].startswith(f"{-expected:+.1f}")


def test_columns_of_nobody_and_what_a_reader_must_know(study: Study, tmp_path: Path) -> None:
    at = {"total": 70}
    majority = {"features": "majority", "probe": ""}
    write_run(
        tmp_path / "a", [at, at | SIMCLR | {"steps": 9}, at | SIMCLR | {"seed": 1, "revision": "def+"}, at | majority]
    )
    table = table_at(read_study([tmp_path]), 1)
    assert list(table.texts)[:4] == ["kNN", "judged by", "lead", "seeds"]
    assert not {"linear", "fine-tuned", "validation: linear"} & set(table.texts)
    notes = " ".join(table.notes)
    for words in ("All classes are as large", "steps differ: 9 (simclr on two-view); 400", "Rows have 1 to 2 seeds"):
        assert words in notes
    assert "Revisions of the code differ: training abc123; evaluation abc123, def+ (+: changed since)." in notes
    assert all(note.startswith("lead: ") for note in table_at(study, 1).notes)


def test_drop_with_ratio_and_gain_of_a_sampler(runs: Path, study: Study, tmp_path: Path) -> None:
    drops = drop_table(fixed(pick(study.rows, "kNN"), study)).texts
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
    # Where all classes are as large, the last is no smaller: the tail is that of the highest ratio.
    copy = Path(shutil.copytree(runs, tmp_path / "runs"))
    for folder in copy.glob("*-1-*"):
        spoil(folder, train_counts=np.array([9, 20, 30]))
    again = read_study([copy])
    assert drop_table(fixed(pick(again.rows, "kNN"), again)).texts.equals(drops)


def names_of(folder: Path, *configs: dict[str, Any], results: tuple[dict[str, Any], ...] = ({},)) -> Study:
    for i, config in enumerate(configs):
        write_run(folder / f"{i}", [one | {"seed": config.get("seed", 0)} for one in results], **config)
    return read_study([folder])


def test_settings_that_tell_rows_apart_are_named_unless_usual(tmp_path: Path) -> None:
    study = names_of(tmp_path / "few", *({"online": o, "seed": s} for s in (0, 1) for o in ("hard", "hard", "soft")))
    assert set(study.rows["name"]) == {"mimv on amimv-views", "mimv on amimv-views, online soft"}
    assert (study.repeats, len(study.rows)) == (2, 4)
    many = {"crop_min": 0.1, "brightness": 0.1, "contrast": 0.1, "hue": 0.01}
    others = [dict.fromkeys(many, 0.3) | {"rotation": 0, "crop_min": 0.9}, dict.fromkeys(many, 0.3) | {"rotation": 1}]
    study = names_of(tmp_path / "many", many | {"rotation": 180}, many | {"rotation": 5, "seed": 1}, *others)
    assert (study.repeats, study.rows["name"].nunique()) == (0, 4)
    assert sum("rotation 180" in name for name in study.rows["name"]) == 1


def test_unset_is_unset_however_it_is_written(tmp_path: Path) -> None:
    """0 or an empty text in older runs, nothing in newer ones; and a setting that a version did not know."""
    old, new = {"view_size": 0, "cache": "''", "rotation": 180.0}, {"view_size": "null", "rotation": 180}
    plain = "mimv on amimv-views"
    for folder, more in (("any", {}), ("known", {"method": "mimv"})):
        study = names_of(tmp_path / folder, *(one | more for one in (old, new | {"seed": 1}, old | {"view_size": 20})))
        seeds = study.rows.groupby("name")["seed"].apply(list).to_dict()
        assert seeds == {plain: [0, 1], f"{plain}, view_size 20": [0]}
    known = ({}, {"seed": 1, "spare_positives": False}, {"spare_positives": True})
    study = names_of(tmp_path / "versions", *({"method": "mimv"} | one for one in known))
    assert set(study.rows["name"]) == {plain, f"{plain}, spare_positives True"}


def test_each_kind_of_features_depends_on_its_own_settings(tmp_path: Path) -> None:
    features = tuple({"features": name} for name in ("raw pixels", "random", "majority"))
    study = names_of(tmp_path / "pixels", {"view_size": 0}, {"view_size": 20}, results=features)
    counts = study.rows.groupby("features")["name"].nunique().to_dict()
    assert counts == {"raw pixels": 2, "random": 2, "majority": 1}
    probes = ({"probe": "knn"}, {"probe": "fine-tuned"})
    study = names_of(tmp_path / "tuned", {"supervised_steps": 5}, {"supervised_steps": 60}, results=probes)
    assert study.rows.groupby("probe")["name"].nunique().to_dict() == {"knn": 1, "fine-tuned": 2}
    assert study.repeats == 1  # of kNN


def test_other_images_are_other_tables(tmp_path: Path) -> None:
    for seed in (7, 8):
        write_run(tmp_path / f"seed{seed}", [{"data": "phantom"}], data="phantom", data_seed=seed)
    # Given indices have no ratio: results say so by an empty one.
    write_run(tmp_path / "large", [{"profile": "indices", "rho": "", "total": 40, "realised_ratio": "inf"}], size=64)
    study = read_study([tmp_path])
    names = {"phantom (synthetic), data seed 7", "phantom (synthetic), data seed 8", "retinamnist, 64 px"}
    assert set(study.rows["data"]) == names
    assert describe_subset(at_rho(study, 0).iloc[0]) == "given indices, 40 images in total"
    assert "realised ratio inf" in table_at(study, 0).title
    assert long_form(at_rho(study, 0))["rho"].isna().all()


def test_other_splits_of_one_set_are_other_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "official", [PIXELS])
    for i, config in enumerate(({}, {"split_seed": 1}, {"resplit": "true"})):
        write_run(tmp_path / f"cut{i}", [PIXELS], split="[0.7, 0.1, 0.2]", **config)
    study = read_study([tmp_path])
    cut = "retinamnist, split 0.7 0.1 0.2, seed"
    anew = cut.replace("split ", "split anew ")
    assert set(study.rows["data"]) == {"retinamnist, own splits", f"{cut} 0", f"{cut} 1", f"{anew} 0"}
    assert study.repeats == 0
    assert len(study.rows) == 4
    assert set(read_study([tmp_path / "cut2"]).rows["data"]) == {"retinamnist"}


def test_scores_without_leaks_are_a_column_where_there_are_some(study: Study, tmp_path: Path) -> None:
    name = "unleaked_balanced_accuracy"
    for seed, (knn, linear) in enumerate([(0.25, 0.5), (0.75, 0.5)]):
        probes = ({VAL: 0.9, name: knn}, {VAL: 0.1, name: linear, "probe": "linear"}, PIXELS)
        write_run(tmp_path / f"run{seed}", [{"seed": seed} | one for one in probes], seed=seed)
    found = read_study([tmp_path])
    table = build_part(found.rows, found, ReportSettings(())).table
    mine = table.texts.loc["mimv on amimv-views"]
    assert (mine["leak-free"], table.texts.loc["raw pixels"]["leak-free"]) == ("50.0 ± 35.4", "-")  # of kNN
    assert list(table.texts).index("leak-free") < table.more
    assert any(note.startswith("leak-free: on test images of no patient") for note in table.notes)
    assert long_form(found.rows)[f"{name}_mean"].dropna().tolist() == [0.5, 0.5]
    assert "leak-free" not in table_at(study, 1.0).texts
    assert not [column for column in long_form(study.rows) if "unleaked" in column]


def write_plan(folder: Path, lines: list[dict[str, Any]]) -> None:
    empty = dict.fromkeys(PLAN_COLUMNS, "") | {"profile": "exp", "total": 0}
    pd.DataFrame([empty | line for line in lines]).to_csv(folder / "plan.csv", index=False)
    (folder / "failed").mkdir()
    (folder / "failed" / "broken.txt").write_text("loss is not finite at step 3\n")


def test_a_plan_gives_grids_failures_and_what_is_to_run(tmp_path: Path) -> None:
    for name in ("done", "half", "other"):
        write_run(tmp_path / name, [{}])
    (tmp_path / "half" / RESULTS).unlink()
    lines = [{"grid": "fixed", "run": "done", "rho": 1, "total": 100, "command": "python trainers/x.py --seed 0"}]
    lines += [{"grid": "capped", "run": "done", "rho": rho, "total": ""} for rho in (1, 10)]
    lines += [{"grid": "fixed", "run": name, "rho": 1} for name in ("nobody", "half", "broken")]
    write_plan(tmp_path, lines)
    (tmp_path / "failed" / "other.txt").write_text("it is done by now\n")
    study = read_study([tmp_path])
    own = study.rows[study.rows["run"] == "done"]
    points = set(zip(own["grid"], own["rho"], own["total"], strict=True))
    assert points == {("fixed", 1, 100), ("capped", 1, 0), ("capped", 10, 0)}
    assert study.failed == [("broken", "loss is not finite at step 3")]
    assert (study.pending, study.left_out) == (["nobody", "half"], [])
    assert study.runs["run-done"].command == "python trainers/x.py --seed 0"
    pooled = read_study([tmp_path], pool_grids=True)
    assert (set(pooled.rows["grid"]), pooled.repeats) == ({""}, 1)


DAMAGED = {
    (RESULTS, None): "not finished: it has no results.csv",
    (RESULTS, ""): "results.csv cannot be read: EmptyDataError",
    (RESULTS, ",".join(COLUMNS) + "\n"): "results.csv has no data in line 2",
    (RESULTS, ",".join(COLUMNS) + "\nrun,retina"): "results.csv has no features in line 2: torn",
    (RESULTS, "a,b\n1,2\n"): "results.csv has no data in line 2",
    (RESULTS, 'run,data\n"' + "x" * 200_000): "results.csv cannot be read",
    (CONFIG, "a: 2024-99-99"): "config.yaml cannot be read: ValueError",
    (CONFIG, "a: " + "[" * 3000): "config.yaml cannot be read",
    (CONFIG, "words"): "config.yaml cannot be read",
    (ENVIRONMENT, '{"packages": ["torch"]}'): "environment.json cannot be read",
    (ENVIRONMENT, "{"): "environment.json cannot be read: JSONDecodeError",
}


def test_a_damaged_run_costs_itself_alone(tmp_path: Path) -> None:
    for i, (name, content) in enumerate(DAMAGED):
        write_run(tmp_path / f"{i}", [{}])
        (tmp_path / f"{i}" / name).unlink()
        if content is not None:
            (tmp_path / f"{i}" / name).write_text(content)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "plan.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        InputError, match=rf"^no finished run in {tmp_path}: .*plan.csv cannot be read.*{tmp_path}/0: not"
    ):
        read_study([tmp_path])
    write_run(tmp_path / "good", [{}])
    left_out = {Path(folder).name: reason for folder, reason in read_study([tmp_path]).left_out}
    expected = dict(zip(map(str, range(len(DAMAGED))), DAMAGED.values(), strict=True))
    expected |= {"pictures": "not a run folder: it has no config.yaml", "plan.csv": "plan.csv cannot be read"}
    assert set(left_out) == set(expected)
    for name, reason in left_out.items():
        assert reason.startswith(expected[name])
        assert "\n" not in reason


def test_foreign_or_missing_predictions_cost_pictures_and_intervals_only(tmp_path: Path) -> None:
    one_hot = np.eye(3, dtype=np.uint8)[LABELS]
    spoiled: list[dict[str, np.ndarray]] = [{"train_counts": np.arange(2)}, {"projection": np.eye(3)}, {}]
    spoiled += [{"labels": one_hot, "row_000": one_hot, "row_001": one_hot}, {"row_001": LABELS[1:]}]
    for i, arrays in enumerate(spoiled):  # each in a table of its own
        write_run(tmp_path / "runs" / f"{i}", [one | {"rho": 2.0 + i} for one in (SIMCLR, PIXELS)])
        spoil(tmp_path / "runs" / f"{i}", **arrays)
    (tmp_path / "runs" / "2" / "predictions.npz").write_bytes(b"PK torn")
    report(ReportSettings((str(tmp_path / "runs"),), output=str(tmp_path / "page.html")))
    nothing = "is compared with nothing. Not run: training from scratch. Without predictions of one class for each of"
    assert (tmp_path / "page.html").read_text().count(nothing) == len(spoiled)


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "old", [{}], predictions=False)
    path = tmp_path / "old" / RESULTS
    pd.read_csv(path).drop(columns=["total", "partner", "steps", VAL]).to_csv(path, index=False)
    report(ReportSettings((str(tmp_path),), format="md", output=str(tmp_path / "page.md")))
    assert "there is no verdict: no method has scores on the validation split." in (tmp_path / "page.md").read_text()


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


def test_an_archive_is_read_as_its_folder_is(tmp_path: Path) -> None:
    runs, written = tmp_path / "runs", {}
    for seed in (0, 1):
        write_run(runs / f"a{seed}", [{"seed": seed, "right": (50 + seed, 20, 8)}, PIXELS | {"seed": seed}], seed=seed)
    write_plan(runs, [{"grid": "fixed", "run": name, "rho": 1} for name in ("a0", "nobody", "broken")])
    (runs / "a0" / "curves.png").write_bytes(b"not kept")
    for name in ("one", "two"):
        report(ReportSettings((str(runs),), archive=str(tmp_path / f"{name}.zip")))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        kept = {name.rpartition("/")[2] for name in archive.namelist()}
    assert kept == {"plan.csv", "broken.txt", CONFIG, ENVIRONMENT, RESULTS, "predictions.npz"}
    for source in (runs, tmp_path / "one.zip"):
        for form in ("md", "csv"):
            report(ReportSettings((str(source),), format=form, pool_grids=True, output=str(tmp_path / "out")))
            text = (tmp_path / "out").read_text()
            assert written.setdefault(form, text) == text
        study = read_study([source])
        assert (study.failed, study.pending) == ([("broken", "loss is not finite at step 3")], ["nobody"])
        assert len(study.runs["run-a0"].told) == len(study.runs["run-a1"].told) == 3
    # Mean and deviation over the seeds, in the long form.
    own = next(one for one in csv.DictReader(written["csv"].splitlines()) if one["row"] == "mimv on amimv-views")
    both = [(recall / 60 + 20 / 30 + 8 / 10) / 3 for recall in (50, 51)]
    found = [float(own[f"balanced_accuracy_{name}"]) for name in ("mean", "std")]
    assert found == pytest.approx([mean(both), stdev(both)], abs=1e-6)
    assert (own["n_seeds"], own["runs"]) == ("2", "a0 a1")


def test_packed_predictions_are_exact_and_projections_near(tmp_path: Path) -> None:
    path, random = tmp_path / "predictions.npz", np.random.default_rng(0)
    arrays = {"labels": LABELS, "row_000": random.integers(0, 300, 100), "class_names": np.array(["a", "b"])}
    projection = random.normal(size=(100, 2)) * [1, 50]
    np.savez(path, projection=projection, **arrays)  # type: ignore[arg-type]
    once = pack_predictions(path)
    path.write_bytes(once)
    assert pack_predictions(path) == once
    with np.load(io.BytesIO(once)) as packed:
        assert (packed["labels"].dtype, packed["row_000"].dtype) == (np.uint8, np.uint16)
        assert all((packed[name] == values).all() for name, values in arrays.items())
        scaled = (projection - projection.min(axis=0)) / np.ptp(projection, axis=0)
        assert np.abs(packed["projection"] / 255 - scaled).max() <= 0.5 / 255 + 1e-9


def test_published_files_are_few_and_small_and_links_to_them_lead_somewhere() -> None:
    archives = {path.stem for path in PUBLISHED.glob("*.zip")}
    files = {"README.md", "before.md", *(f"{name}.{kind}" for name in archives for kind in ("zip", "csv"))}
    assert {path.name for path in PUBLISHED.iterdir()} == files
    assert sum(path.stat().st_size for path in PUBLISHED.iterdir()) < 2**22
    for page in (*PUBLISHED.parent.rglob("*.md"), *PUBLISHED.parents[1].glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


LARGE = ("small", "ablation")
NIGHTLY = {True: [pytest.mark.slow], False: []}


@pytest.mark.parametrize(
    "name", [pytest.param(p.stem, marks=NIGHTLY[p.stem in LARGE]) for p in PUBLISHED.glob("*.zip")]
)
def test_published_archives_agree_with_the_tables_beside_them(name: str) -> None:
    study = read_study([PUBLISHED / f"{name}.zip"], pool_grids=True)
    assert not study.left_out
    assert long_form(study.rows).to_csv(index=False) == (PUBLISHED / f"{name}.csv").read_text()


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
    (folder / "more" / "half" / CONFIG).write_text("data: '<script>alert(1)</script>'\n")
    write_run(folder / "more" / "tuned", [{"probe": "fine-tuned", "rho": rho} for rho in (1.0, 50.0)])
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


#: Of a page in a frame: how far its boxes are wider than they look, without and with the further columns; a column
#: after a click on its head.
MEASURE = """
const found = [...document.querySelectorAll("iframe")].map(frame => {
  const own = frame.contentDocument, table = own.querySelector("section table");
  const over = one => one.scrollWidth - one.clientWidth;
  const wide = () => [own.documentElement, ...own.querySelectorAll(".wide")].map(over);
  table.querySelectorAll("button")[1].click();
  const values = [...table.tBodies[0].rows].map(row => row.cells[1].dataset.sort).filter(value => value);
  const before = wide();
  own.querySelectorAll("input").forEach(one => one.click());
  const order = table.querySelector("[aria-sort]").ariaSort;
  return {width: own.defaultView.innerWidth, boxes: [before, wide()], values, order};
});
document.querySelector("pre").textContent = JSON.stringify(found);
"""


def test_the_page_fits_windows_and_sorts_its_tables(page: Path) -> None:
    """At 1280 and 400 pixels nothing but a box of its own scrolls sideways, at 1280 not even that."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a browser: no chromium, chromium-browser or google-chrome on the PATH")
    frames = page.with_name("frames.html")
    inner = "".join(f'<iframe src="page.html" width={width}></iframe>' for width in (1280, 400))
    frames.write_text(f"<body>{inner}<pre></pre><script>onload = () => {{{MEASURE}}}</script>")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--allow-file-access-from-files",
    ]
    flags += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([browser, *flags, frames.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    (words,) = re.findall(r"<pre>(.+)</pre>", shown.stdout)
    large, small = json.loads(words)
    assert (large["width"], small["width"]) == (1280, 400)
    assert len(large["boxes"][0]) > 4
    assert not any(map(any, large["boxes"]))
    assert [boxes[0] for boxes in small["boxes"]] == [0, 0]
    for one in (large, small):
        values = [float(value) for value in one["values"]]
        assert len(values) > 3
        assert values == sorted(values, reverse=True)
        assert one["order"] == "descending"
