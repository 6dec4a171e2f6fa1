"""Whether scores without labels rank the runs of a data set as the linear probe does, as a table."""

import math

import pandas as pd

from amimv.tools.report_page.runs import SUBSET
from amimv.tools.report_page.tables import DASH, Table, describe_subset, percent
from amimv.trainers.evaluation.results import WITHOUT_LABELS
from amimv.trainers.rankings import FEWEST, Agreement, rank_agreement

#: Runs below which nothing is said.
FEWEST_RUNS = 6
REFERENCES = {"test": "balanced_accuracy", "validation": "val_balanced_accuracy"}
NOTES = (
    "Kendall's tau-b over the pre-training runs, between a score without labels and the linear probe's balanced "
    "accuracy: 1 if both put the runs into the same order, 0 if they have nothing to do with each other. In brackets "
    "the 95 % interval of a bootstrap over the rows of the other tables, each with its seeds; none of fewer than "
    f"{FEWEST} rows, or where no pair of runs disagrees.",
    "cluster_knn compares runs of the same augmentation alone.",
)


def agreements(rows: pd.DataFrame) -> pd.DataFrame:
    """`rank_agreement` of every score without labels with the linear probe.

    Args:
        rows: results of one data set, of any subsets and shares of labels; of several draws of the labels the mean.

    Returns:
        A line per subset, label fraction and score that six runs or more have: ``SUBSET``, ``label_fraction``,
        ``score``, and an `Agreement` each in the columns ``test`` and ``validation``.
    """
    linear = rows[(rows["features"] == "pretrained") & (rows["probe"] == "linear")]
    keys, found = [*SUBSET, "label_fraction"], []
    for place, part in linear.groupby(keys):
        runs = part.groupby(["anchor", "name"])[[*WITHOUT_LABELS, *REFERENCES.values()]].mean().reset_index()
        for score in WITHOUT_LABELS:
            known = runs.dropna(subset=[score, *REFERENCES.values()])
            if len(known) >= FEWEST_RUNS:
                told = {k: rank_agreement(known[score], known[c], known["name"]) for k, c in REFERENCES.items()}
                found.append(dict(zip(keys, place, strict=True)) | {"score": score} | told)
    return pd.DataFrame(found, columns=[*keys, "score", *REFERENCES])


def ranking_table(rows: pd.DataFrame) -> Table | None:
    """`agreements` for people; None with fewer than six runs that have the scores."""
    found = agreements(rows)
    if found.empty:
        return None
    several = len(found[SUBSET].drop_duplicates()) > 1
    subsets = found.apply(describe_subset, axis=1) + ", " if several else ""
    names = found["score"] + ", " + subsets + found["label_fraction"].map(percent) + " of the labels"
    texts, values = (found[list(REFERENCES)].map(made).set_axis(names) for made in (_words, lambda one: one.tau))
    counts = {"runs": [one.runs for one in found["test"]], "rows": [one.configurations for one in found["test"]]}
    return Table(
        "Choosing without labels: tau with the linear probe",
        texts.assign(**{name: list(map(str, own)) for name, own in counts.items()}),
        values.astype(float).assign(**counts),
        NOTES,
        ranked=False,
    )


def _words(one: Agreement) -> str:
    if math.isnan(one.tau):
        return DASH
    return f"{one.tau:+.2f}" + ("" if math.isnan(one.low) else f" [{one.low:+.2f}, {one.high:+.2f}]")
