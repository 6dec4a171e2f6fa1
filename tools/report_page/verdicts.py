"""What the numbers say, in words: which method validation chooses, and what its lead on the test images is worth."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from amimv.models.methods import METHODS
from amimv.pipelines.recipes import ALIASES as RECIPE_ALIASES
from amimv.tools.report_page.runs import Study
from amimv.tools.report_page.tables import is_baseline, ordered, percent, predicted, spread
from amimv.trainers.comparisons import Interval, paired_bootstrap
from amimv.trainers.evaluation.results import FROZEN, SUPERVISED_INITIAL
from amimv.trainers.layers import settings_from
from amimv.trainers.settings import METHOD_ALIASES

#: What is said of a probe.
JUDGES = {"knn": "kNN", "linear": "linear probe", "classifier": "own classifier"}
#: Baselines that a verdict is about, beside frozen models, and what it calls them.
SCRATCH = {"supervised from scratch": "training from scratch", SUPERVISED_INITIAL: "training from the initial weights"}
SCRATCH |= {"raw pixels": "raw pixels"}


def contenders(own: pd.DataFrame) -> pd.DataFrame:
    """Results of methods that have validation scores; none of one seed where others have several."""
    methods = own[~own["baseline"] & own["val_balanced_accuracy"].notna()]
    seeds = methods.groupby("name")["seed"].transform("nunique")
    return methods[(seeds > 1) | (seeds.max() == 1)]


def choose(own: pd.DataFrame, wanted: str = "") -> str:
    """The row that others are compared with: the wanted row or method, of whose rows that with the most seeds and the
    shortest name; without such a row that with the highest mean on the validation split. Empty without any.
    """
    if wanted in set(own["name"]):
        return wanted
    start = f"{METHOD_ALIASES.get(wanted, wanted)} on {RECIPE_ALIASES.get(wanted, '')}"
    seeds = own[own["name"].str.startswith(start)].groupby("name")["seed"].nunique()
    if len(seeds):
        return min(seeds.index, key=lambda name: (-seeds[name], len(name), name))
    means = contenders(own).groupby("name")["val_balanced_accuracy"].mean()
    return str(means.idxmax()) if len(means) else ""


def compute_leads(own: pd.DataFrame, reference: str, study: Study) -> dict[str, Interval]:
    """How far the reference is ahead of each other row on the same test images and draws of the labels; without rows
    whose predictions are missing, multi-label, or of others.
    """
    base, leads = own[own["name"] == reference], {}
    for name in ordered(own):
        other = own[own["name"] == name]
        one, two = predicted(base, study), predicted(other, study)
        if name == reference or not one or not two or not np.array_equal(one[0].labels, two[0].labels):
            continue
        places = _places(base), _places(other)
        both = [draw for draw in places[0] if draw in places[1]]
        a, b = (
            found[place[both].dropna().to_numpy(int)] for (_, found), place in zip((one, two), places, strict=True)
        )
        if a.size and b.size:
            leads[name] = paired_bootstrap(one[0].labels, a, b)
    return leads


def _places(rows: pd.DataFrame) -> pd.DataFrame:
    """Where among these results is that of which seed (row) and draw of the labels (column)."""
    return rows.assign(place=range(len(rows))).pivot(index="seed", columns="label_seed", values="place")


def verdict(own: pd.DataFrame, leads: Mapping[str, Interval], reference: str) -> str:
    """The conclusion from one subset and label fraction.

    Args:
        own: its results, of one probe a row.
        leads: of the reference over other rows, by their names.
        reference: name of its row; empty without one.
    """
    images = int(own["n_train"].iloc[0])
    begin = f"With {percent(own['label_fraction'].iloc[0])} of the labels ({images:,} image{'s' * (images != 1)}), "
    if not reference:
        why = "only baselines were run" if own["baseline"].all() else "no method has scores on the validation split"
        return f"{begin}there is no verdict: {why}."
    result = own[own["name"] == reference]
    judge, score = str(result["probe"].iloc[0]), spread(result[["balanced_accuracy"]], result)[0].iloc[0, 0]
    seeds, draws = result["seed"].nunique(), result["label_seed"].nunique()
    few = ", one seed" * (seeds == 1) + f", {draws} draws of the labels" * (draws > 1)
    subject = f"{in_words(reference)} ({JUDGES.get(judge, judge)}, {score} %{few})"
    known = [name for name in ordered(own) if is_baseline(name)]
    baselines = [name for start in (*SCRATCH, f"{FROZEN} ") for name in known if name.startswith(start)]
    methods = sorted(contenders(own)["name"].unique())
    compared = {name: in_words(name) for name in (*baselines, *methods) if name != reference}
    said = _relations({words: leads[name] for name, words in compared.items() if name in leads})
    sentences = [f"{begin}{subject} {said or 'is compared with nothing'}."]
    asked = {"training": "training from scratch", "raw pixels": "raw pixels"}
    missing = [
        words for start, words in asked.items() if not any(said.startswith(start) for said in compared.values())
    ]
    if missing:
        sentences.append(f"Not run: {listed(missing)}.")
    if unknown := [words for name, words in compared.items() if name not in leads]:
        sentences.append(f"Without predictions of one class for each of the same test images: {listed(unknown)}.")
    return " ".join(sentences)


def _relations(leads: Mapping[str, Interval]) -> str:
    """What a method is ahead of, not told apart from, and behind; empty without anything."""
    ahead = [f"{name} by {_points(one.difference, one.low, one.high)}" for name, one in leads.items() if one.low > 0]
    level = [name for name, one in leads.items() if one.low <= 0 <= one.high]
    behind = [
        f"{name} by {_points(-one.difference, -one.high, -one.low)}" for name, one in leads.items() if one.high < 0
    ]
    groups = (("is ahead of", ahead), ("is not told apart from", level), ("is behind", behind))
    return "; it ".join(f"{words} {listed(names)}" for words, names in groups if names)


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"


def listed(words: Iterable[str]) -> str:
    """Words as a list within a sentence."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def in_words(name: str) -> str:
    """A row's name in a sentence: methods as their papers call them, without the recipe that they are published on."""
    head, *settings = name.split(", ")
    method, _, recipe = head.partition(" on ")
    if method in METHODS:
        title, colon, _ = (METHODS[method].settings.__doc__ or "").partition(":")
        published = settings_from({"method": method, "preset": "none"}, method).recipe
        head = (title if colon else method) + (f" on {recipe}" if recipe != published else "")
    return SCRATCH.get(head, head) + (f" ({', '.join(settings)})" if settings else "")
