"""The tables of a report: means over seeds, leads with their intervals, what imbalance costs, what samplers gain."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from amimv.tools.report_page.runs import BASELINES, SUBSET, Predictions, Run, Study, read_predictions
from amimv.trainers.comparisons import SOURCES, Interval
from amimv.trainers.evaluation import class_thirds
from amimv.trainers.evaluation.metrics import SCORES
from amimv.trainers.evaluation.results import FROZEN, LEAK_FREE, SUPERVISED_INITIAL, UNLEAKED

#: Columns of probes, with the probes in them. The majority class has none and stands in all.
PROBES = {"kNN": ("knn", ""), "linear": ("linear", ""), "fine-tuned": ("fine-tuned", "classifier", "")}
#: Columns that have no best value.
UNRANKED = ("judged by", "lead", "seeds", "draws")
#: What a row's results come from, several times each.
LEVELS = ("seed", "label_seed")
DASH = "-"


@dataclass(frozen=True)
class Table:
    """Rows of methods and baselines.

    Attributes:
        title: what it is about.
        texts: what is printed.
        values: what that is sorted by, NaN last.
        notes: what a reader must know.
        more: the first column that a page shows on demand only.
        runs: (seed, anchor) of the runs behind each row, by its name.
        ranked: whether the largest value of a column is the best.
    """

    title: str
    texts: pd.DataFrame
    values: pd.DataFrame
    notes: tuple[str, ...] = ()
    more: int = 99
    runs: Mapping[str, list[tuple[int, str]]] | None = None
    ranked: bool = True

    def best(self) -> pd.DataFrame:
        """Whether a value is its column's largest, of two or more that are of no baseline."""
        unranked = [column for column in self.values if column.startswith(UNRANKED)]
        methods = self.values.loc[~self.values.index.map(is_baseline)].drop(columns=unranked)
        best = (methods == methods.max()) & (methods.count() > 1) & self.ranked
        return best.reindex(index=self.values.index, columns=self.values.columns, fill_value=False)

    def lines(self) -> Iterator[tuple[str, bool, list[tuple[str, float, bool]]]]:
        """(name, whether it is a baseline, cells) of each row; a cell is its text, value, and whether it is best."""
        for name, texts, values, best in zip(
            self.texts.index, *(f.to_numpy() for f in (self.texts, self.values, self.best())), strict=True
        ):
            yield name, is_baseline(name), list(zip(texts, values, best, strict=True))


def _place(name: str) -> int:
    """Of a baseline's row in a table; all methods are behind them."""
    first = FROZEN if name.startswith(f"{FROZEN} ") else name.split(",")[0]
    known = [name for name, _ in BASELINES.values()]
    return known.index(first) if first in known else len(known)


def is_baseline(name: str) -> bool:
    return _place(name) < len(BASELINES)


def ordered(rows: pd.DataFrame) -> list[str]:
    """The names of a table's rows: baselines first, then by name."""
    return sorted(rows["name"].unique(), key=lambda name: (_place(name), name))


def pick(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The results in a probe's column."""
    return rows[rows["probe"].isin(PROBES[column])]


def judged(rows: pd.DataFrame, column: str = "") -> pd.DataFrame:
    """Of each row the results of one probe: those of this column, or where it is empty, of that with the highest mean
    on the validation split; of training from scratch those of its own classifier.
    """
    scratch = rows[rows["probe"] == "classifier"]
    rows = rows[~rows["features"].isin(("supervised", SUPERVISED_INITIAL))]
    means = {c: pick(rows, c).groupby("name")["val_balanced_accuracy"].mean().fillna(-1) for c in PROBES}
    best = rows["name"].map(pd.DataFrame(means).idxmax(axis=1))
    found = [pick(rows, column)] if column else [pick(rows[best == c], c) for c in PROBES]
    return pd.concat([*found, scratch]).sort_index()


def spread(values: pd.DataFrame, rows: pd.DataFrame, sign: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """(texts, means) of each column by the rows' names, in percent: mean ± standard deviation over seeds ± that over
    draws of the labels; one alone has none.
    """
    by_seed, by_draw = (values.groupby([rows["name"], rows[level]]).mean().groupby("name") for level in LEVELS)
    every = (by_seed.mean(), by_seed.std(), by_draw.std())
    mean, std, std_draws = (100 * one.reindex(ordered(rows)) for one in every)
    numbers = mean.map(lambda value: DASH if math.isnan(value) else f"{value:{sign}.1f}")
    spreads = [one.map(lambda value: "" if math.isnan(value) else f" ± {value:.1f}") for one in (std, std_draws)]
    return numbers + spreads[0] + spreads[1], mean


def main_table(
    rows: pd.DataFrame, own: pd.DataFrame, leads: Mapping[str, Interval], reference: str, runs: Mapping[str, Run]
) -> Table:
    """Balanced accuracy of every probe and the lead of the reference; on demand more of the probe by which a row is
    judged, which ``leak-free`` is by, too. A column without a value is left out.

    Args:
        rows: results of one subset and label fraction.
        own: of them those by which each row is judged.
        leads: of the reference over other rows, by their names.
        reference: name of its row; empty without one.
        runs: by anchor.
    """
    columns = {c: pick(rows, c)["balanced_accuracy"] for c in PROBES}
    columns[LEAK_FREE] = own[UNLEAKED]
    more = [score for score in SCORES if score != "balanced_accuracy"]
    columns |= {score.replace("_f1", " F1").replace("auc", "AUC"): own[score] for score in more}
    columns |= {f"validation: {c}": pick(rows, c)["val_balanced_accuracy"] for c in PROBES}
    texts, values = spread(pd.DataFrame(columns), rows)
    # The majority class stands in every column; so a column is kept for the others.
    others = values.drop(index="majority class") if len(values) > 1 and "majority class" in values.index else values
    names, notes = rows.groupby("name"), describe_runs(rows, runs)
    beside = {"judged by": (own.groupby("name")["probe"].first(), None)}
    if leads:
        ahead = pd.Series({name: 100 * one.difference for name, one in leads.items()})
        beside["lead"] = (pd.Series({name: _interval(one) for name, one in leads.items()}), ahead)
        notes.insert(0, f"lead: how far {reference} is ahead, points of balanced accuracy [95 % interval].")
    for column, level in zip(("seeds", "draws"), LEVELS, strict=True):
        if column == "seeds" or rows[level].nunique() > 1:
            beside[column] = (names[level].nunique().astype(str), names[level].nunique())
    shown = [c for c in values if others[c].notna().any()]
    place = sum(c in (*PROBES, LEAK_FREE) for c in shown)
    if LEAK_FREE in shown:
        notes.append(f"{LEAK_FREE}: on test images of no patient, lesion or slide that training images are of.")
    texts = texts.assign(**{c: text for c, (text, _) in beside.items()}).replace("", DASH).fillna(DASH)
    values = values.assign(**{c: value for c, (_, value) in beside.items()}).astype(float)
    if leads:
        part, told, errors = _lead_parts(leads)
        texts, values, shown = texts.assign(**{part: told}), values.assign(**{part: errors}), [*shown, part]
        texts[part] = texts[part].fillna(DASH)
    order = [*shown[:place], *beside, *shown[place:]]
    behind = {str(name): sorted(set(zip(one["seed"].astype(int), one["anchor"], strict=True))) for name, one in names}
    return Table(describe(rows), texts[order], values[order], tuple(notes), place + len(beside), behind)


def _lead_parts(leads: Mapping[str, Interval]) -> tuple[str, pd.Series, pd.Series]:
    """Standard errors of the leads by what they come from, in points: a column's name, texts and values."""
    errors = 100 * pd.DataFrame({name: one.errors for name, one in leads.items()}).reindex(SOURCES).T.astype(float)
    errors = errors[[source for source in SOURCES if errors[source].notna().any()]]
    texts = errors.map(lambda value: DASH if math.isnan(value) else f"{value:.1f}").agg(", ".join, axis=1)
    return f"lead: ± {', '.join(errors)}", texts, (errors**2).sum(axis=1) ** 0.5


def _interval(one: Interval) -> str:
    return f"{100 * one.difference:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def describe_subset(row: Mapping[str, object]) -> str:
    """The imbalance that was asked for."""
    profile, rho, total = row["profile"], float(str(row["rho"])), float(str(row["total"]))
    images = f", {total:,.0f} images in total" if total else ""
    if profile == "indices":
        return f"given indices{images}"
    if profile == "natural" or (profile == "exp" and rho == 1 and not total):
        return "natural distribution"
    return f"rho {rho:g} ({profile}){images}"


def describe(rows: pd.DataFrame) -> str:
    """A table's title: imbalance, labels, and what of it came true."""
    ratios, counts = rows["realised_ratio"].dropna().round(1), rows["n_train"]
    ratio = f", realised ratio {_between(ratios, '.1f')}" if len(ratios) else ""
    share = percent(rows["label_fraction"].iloc[0])
    return f"{describe_subset(rows.iloc[0])}, {share} of the labels ({_between(counts, ',.0f')} images{ratio})"


def _between(values: pd.Series, form: str) -> str:
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (values.min(), values.max())))


def describe_runs(rows: pd.DataFrame, runs: Mapping[str, Run]) -> list[str]:
    """What a reader of a table must know about how alike its runs are."""
    found, own = [], rows[~rows["baseline"]]
    if own["steps"].nunique() > 1:
        steps = [f"{step:,.0f} ({', '.join(sorted(set(names)))})" for step, names in own.groupby("steps")["name"]]
        found.append(f"Numbers of training steps differ: {'; '.join(steps)}.")
    evaluated, trained = set(rows["revision"]) - {""}, {runs[a].revision for a in rows["anchor"]} - {""}
    if len(evaluated) > 1 or len(trained) > 1:
        of = (
            f"{what} {', '.join(sorted(one)) or 'unknown'}"
            for what, one in (("training", trained), ("evaluation", evaluated))
        )
        changed = " (+: changed since)" * any(revision.endswith("+") for revision in evaluated | trained)
        found.append(f"Revisions of the code differ: {'; '.join(of)}{changed}.")
    if rows["rho"].iloc[0] == 1 and rows["total"].iloc[0] and rows["profile"].iloc[0] != "natural":
        found.append("All classes are as large: which of them are head, medium and tail goes by their number alone.")
    seeds = rows.groupby("name")["seed"].nunique()
    if seeds.nunique() > 1:
        found.append(f"Rows have {seeds.min()} to {seeds.max()} seeds: a mean of fewer is less sure.")
    return found


def predicted(own: pd.DataFrame, study: Study) -> tuple[Predictions, np.ndarray] | None:
    """What the first of these results' runs stored, and the classes ``(S, N)`` that all of them predicted; None where
    some are missing, multi-label, or of other test images.
    """
    runs = [study.runs[anchor] for anchor in own["anchor"]]
    found = [one for run in runs if (one := read_predictions(run.folder, run.lines))]
    if not found or len(found) < len(runs) or found[0].labels.ndim != 1:
        return None
    if not all(np.array_equal(found[0].labels, one.labels) for one in found):
        return None
    return found[0], np.stack([one.rows[int(line)] for one, line in zip(found, own["line"], strict=True)])


def with_fixed_tail(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    """The rows with a column ``fixed_tail``: mean recall over the classes that are the tail at the highest ratio.

    At rho 1 with a fixed total all classes are as large, and which are called the tail is chance: so the classes are
    held fixed when ratios are compared. NaN where predictions are missing.
    """
    highest = predicted(rows[rows["rho"] == rows["rho"].max()].head(1), study)
    tail = class_thirds(highest[0].train_counts.tolist())[2] if highest else []

    def recall(index: int) -> float:
        one = predicted(rows.loc[[index]], study)
        recalls = [np.mean(one[1][0, one[0].labels == c] == c) for c in tail if c in one[0].labels] if one else []
        return float(np.mean(recalls)) if recalls else math.nan

    return rows.assign(fixed_tail=[recall(index) for index in rows.index])


def drop_table(rows: pd.DataFrame) -> Table:
    """What is lost from the lowest to the highest ratio, for results of one data set and label fraction that
    `with_fixed_tail` has seen, of one probe a row.
    """
    low, high = rows["rho"].min(), rows["rho"].max()
    ends = {f"rho {rho:g}": rows[rows["rho"] == rho].set_index(["name", *LEVELS]) for rho in (low, high)}
    first, last = ends.values()
    columns: dict[str, pd.Series] = {}
    for metric, label in (("balanced_accuracy", "balanced accuracy"), ("fixed_tail", "tail")):
        columns |= {f"{label}: {end}": one[metric] for end, one in ends.items()}
        columns[f"{label}: drop"] = first[metric] - last[metric]
    frame = pd.DataFrame(columns).reset_index()
    frame = frame[frame["name"].isin(first.index.unique(0)) & frame["name"].isin(last.index.unique(0))]
    texts, values = spread(frame[list(columns)], frame)
    title = f"Loss from rho {low:g} to rho {high:g}, {percent(rows['label_fraction'].iloc[0])} of the labels"
    return Table(title, texts, values)


def gain_table(own: pd.DataFrame) -> Table | None:
    """What each sampler gains over uniform ones of the same method, recipe and settings; None without another."""
    metrics = {"balanced_accuracy": "balanced accuracy", "head": "head", "medium": "medium", "tail": "tail"}
    rows = own[~own["baseline"]].set_index(list(LEVELS))
    gains = []
    for name, one in rows.groupby("name"):
        samplers = {one["sampler"].iloc[0], f"partner {one['partner'].iloc[0]}"}
        plain = ", ".join(word for word in str(name).split(", ") if word not in samplers)
        base = rows[rows["name"] == plain]
        if plain != name and len(base):
            gains.append((one[list(metrics)] - base[list(metrics)]).dropna(how="all").assign(name=name))
    if not gains:
        return None
    found = pd.concat(gains).reset_index().rename(columns=metrics)
    texts, values = spread(found[list(metrics.values())], found, "+")
    return Table(f"Gain over uniform sampling, points: {describe(own)}", texts, values)


def long_form(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per data set, subset, label fraction, row and probe: mean and standard deviation of each score over the
    seeds (fractions in [0, 1], six digits as in the results), the number of seeds and the runs; where the labels were
    drawn several times the standard deviation over the draws, and their number, too.
    """
    keys = [*SUBSET, "label_fraction", "name", "probe"]
    grouped, several = rows.groupby(keys, sort=False), rows.groupby(keys)["label_seed"].nunique().max() > 1
    columns: dict[str, pd.Series] = {}
    leak_free = [UNLEAKED] if rows[UNLEAKED].notna().any() else []
    for metric in (*sorted(SCORES, key="balanced_accuracy".__ne__), *leak_free, "val_balanced_accuracy"):
        by_seed, by_draw = (rows.groupby([*keys, level])[metric].mean().groupby(keys) for level in LEVELS)
        columns[f"{metric}_mean"], columns[f"{metric}_std"] = by_seed.mean(), by_seed.std()
        columns |= {f"{metric}_std_draws": by_draw.std()} if several else {}
    columns = {name: column.reindex(grouped["seed"].first().index) for name, column in columns.items()}
    columns["n_seeds"] = grouped["seed"].nunique()
    columns |= {"n_draws": grouped["label_seed"].nunique()} if several else {}
    columns["n_train"], columns["realised_ratio"] = grouped["n_train"].mean(), grouped["realised_ratio"].mean()
    columns["runs"] = grouped["run"].agg(lambda runs: " ".join(sorted(set(runs))))
    made = pd.DataFrame(columns).reset_index().rename(columns={"name": "row"})
    return made.round(6).assign(rho=made["rho"].where(made["rho"] > 0))
