"""The report's table of scores without labels: which runs it is of, and what it says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from amimv.tools.report import ReportSettings, render_page
from amimv.tools.report_page.rankings import agreements, ranking_table
from amimv.tools.report_page.runs import read_study
from amimv.trainers.evaluation import COLUMNS

RUN = {"data": "retinamnist", "profile": "exp", "rho": 1.0, "total": 0, "n_train": 555, "features": "pretrained"}
RUN |= {"probe": "linear", "label_fraction": 1.0, "recipe": "two-view", "sampler": "uniform", "partner": "uniform"}
RUN |= {"steps": 400, "revision": "abc123"}
METHODS = ("barlow-twins", "byol", "mimv", "simclr", "simsiam", "swav", "vicreg")


def write_runs(folder: Path, seeds: int = 2, **more: Any) -> pd.DataFrame:
    """A run of each method and seed; beside the linear probe, others that would say the opposite."""
    rng, lines = np.random.default_rng(0), []
    for i, method in enumerate(METHODS):
        for seed in range(seeds):
            run = folder / f"{method}-{seed}"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(f"data: retinamnist\nmethod: {method}\nseed: {seed}\n")
            rank = (i + rng.normal()) / 10
            scores = {"rankme": 100 * rank + 10 * rng.normal(), "cluster_knn": rng.random()} | more
            own = RUN | {"run": run.name, "method": method, "seed": seed} | scores
            few = [own | {"label_fraction": 0.1, "label_seed": s, "balanced_accuracy": rng.random()} for s in (0, 1)]
            rows = [own | {"balanced_accuracy": rank}, *few]
            rows = [row | {"val_balanced_accuracy": -row["balanced_accuracy"]} for row in rows]
            rows.append(own | {"probe": "knn", "balanced_accuracy": -rank})
            rows.append(own | {"features": "random", "balanced_accuracy": -rank})
            pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(run / "results.csv", index=False)
            lines += rows
    return pd.DataFrame(lines)


def test_agreements_are_those_of_the_linear_probe_over_runs(tmp_path: Path) -> None:
    lines = write_runs(tmp_path)
    own = lines[(lines["features"] == "pretrained") & (lines["probe"] == "linear")]
    found = agreements(read_study([tmp_path]).rows).set_index(["label_fraction", "score"])
    assert list(found.index) == [(f, s) for f in (0.1, 1.0) for s in ("rankme", "cluster_knn")]
    for (fraction, score), line in found.iterrows():
        runs = own[own["label_fraction"] == fraction].groupby("run")
        assert len(runs) == 14
        tau = kendalltau(runs[score].mean(), runs["balanced_accuracy"].mean()).statistic
        assert line["test"].tau == pytest.approx(tau)
        assert line["validation"].tau == pytest.approx(-tau)
        assert (line["test"].runs, line["test"].configurations) == (14, 7)
    assert found.loc[(1.0, "rankme"), "test"].low > 0


def test_the_table_stands_in_the_page(tmp_path: Path) -> None:
    write_runs(tmp_path)
    study = read_study([tmp_path])
    table = ranking_table(study.rows)
    assert table is not None
    assert list(table.texts.index) == [
        f"{score}, {share} of the labels" for share in ("10 %", "100 %") for score in ("rankme", "cluster_knn")
    ]
    one = agreements(study.rows)["test"].iloc[2]
    text = f"{one.tau:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
    assert list(table.texts.loc["rankme, 100 % of the labels", ["test", "runs", "rows"]]) == [text, "14", "7"]
    skewed = pd.concat([study.rows, study.rows.assign(rho=50.0)])
    both = ranking_table(skewed)
    assert both is not None
    assert list(both.texts.index[[0, -1]]) == [
        "rankme, natural distribution, 10 % of the labels",
        "cluster_knn, rho 50 (exp), 100 % of the labels",
    ]
    assert not table.best().any(axis=None), "a large tau is no winner"
    page = render_page(study, ReportSettings(()))
    assert "retinamnist, Choosing without labels" in page
    assert f">{text}<" in page


def test_few_runs_or_none_with_scores_have_no_table(tmp_path: Path) -> None:
    write_runs(tmp_path / "old", rankme=None, cluster_knn=None)
    study = read_study([tmp_path / "old"])
    assert ranking_table(study.rows) is None
    assert "Choosing without labels" not in render_page(study, ReportSettings(()))
    write_runs(tmp_path / "new", seeds=1)
    rows = read_study([tmp_path / "new"]).rows
    assert ranking_table(rows) is not None
    assert ranking_table(rows[rows["method"] > "byol"]) is None, "five runs"
