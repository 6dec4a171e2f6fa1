"""The intervals that the published verdicts rest on, computed again from the stored predictions by other means.

Nothing here but the comparison at the end is the package's: archives are read with the standard library, and an
interval is the sum of three variances and Student's t instead of a bootstrap.
"""

import csv
import io
import math
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from amimv.tools.report import split_parts
from amimv.tools.report_page.runs import read_study
from amimv.tools.report_page.tables import judged
from amimv.tools.report_page.verdicts import choose, compute_leads

STUDIES = Path(__file__).parents[2] / "docs" / "study"
ARCHIVES = ["dermatoscopy.zip", "pairs.zip"]
#: What a method's row is told by.
Row = tuple[str, ...]
#: Right or wrong by (seed, draw of the labels), each ``(N,)``.
Answers = dict[tuple[str, str], np.ndarray]


def read_answers(archive: Path, probe: str) -> tuple[np.ndarray, dict[str, dict[Row, Answers]]]:
    """The test labels, and by share of the labels and row what was right: linear probes, of the supervised reference
    its own classifier."""
    found: dict[str, dict[Row, Answers]] = defaultdict(lambda: defaultdict(dict))
    labels = np.empty(0)
    with zipfile.ZipFile(archive) as members:
        for name in members.namelist():
            if not name.endswith("/results.csv"):
                continue
            stored = np.load(io.BytesIO(members.read(name.replace("results.csv", "predictions.npz"))))
            labels = stored["labels"]
            for i, row in enumerate(csv.DictReader(io.StringIO(members.read(name).decode()))):
                scratch = row["features"] == "supervised" and row["probe"] == "classifier"
                if scratch or (row["features"] in ("pretrained", "raw pixels") and row["probe"] == probe):
                    key = (row["features"], row["method"], row["recipe"], row["partner"])
                    level = row["seed"], row.get("label_seed", "")
                    found[row["label_fraction"]][key][level] = stored[f"row_{i:03d}"] == labels
    return labels, found


def interval(labels: np.ndarray, a: Answers, b: Answers) -> tuple[float, float, float]:
    """Difference in balanced accuracy and its 95 % interval: variances of images (within classes), seeds (of each)
    and draws (of both), one term each."""
    classes = np.unique(labels)

    def balanced(right: np.ndarray) -> float:
        return float(np.mean([right[labels == c].mean() for c in classes]))

    def by(answers: Answers, level: int) -> dict[str, float]:
        names = {key[level] for key in answers}
        return {n: float(np.mean([balanced(v) for k, v in answers.items() if k[level] == n])) for n in names}

    gain = np.mean([*a.values()], axis=0) - np.mean([*b.values()], axis=0)
    parts = [(sum(gain[labels == c].var() / (labels == c).sum() for c in classes) / len(classes) ** 2, math.inf)]
    one, two = by(a, 1), by(b, 1)
    for values in ([*by(a, 0).values()], [*by(b, 0).values()], [one[draw] - two[draw] for draw in one]):
        if len(values) > 1:
            parts.append((np.var(values, ddof=1) / len(values), len(values) - 1))
    total = sum(variance for variance, _ in parts)
    freedom = total**2 / sum(variance**2 / f for variance, f in parts) if len(parts) > 1 else math.inf
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(total)
    difference = balanced(gain)
    return difference, difference - reach, difference + reach


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHIVES)
def test_published_intervals_are_those_of_the_stored_predictions(name: str) -> None:
    """Differences to rounding; ends within what resamples of two or three seeds are off by: a tenth
    of the width."""
    labels, answers = read_answers(STUDIES / name, "linear")
    study = read_study([STUDIES / name], pool_grids=True)
    compared = 0
    for rows in split_parts(study.rows):
        own = judged(rows, "linear")
        reference = choose(own)
        keys = {
            row["name"]: tuple(row[column] or "" for column in ("features", "method", "recipe", "partner"))
            for row in own.astype(object).fillna("").to_dict("records")
        }
        ours = next(v for share, v in answers.items() if float(share) == float(rows["label_fraction"].iloc[0]))
        for other, lead in compute_leads(own, reference, study).items():
            if keys[other] in ours:
                plain = interval(labels, ours[keys[reference]], ours[keys[other]])
                assert lead.difference == pytest.approx(plain[0], abs=1e-9)
                few_levels = 0.002 + 0.1 * (plain[2] - plain[1])
                assert (lead.low, lead.high) == pytest.approx(plain[1:], abs=few_levels)
                compared += 1
    assert compared >= 12
