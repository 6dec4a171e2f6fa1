"""The tables of a report: means over seeds, differences with their intervals, what imbalance costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from amimv.pipelines.recipes import ALIASES as RECIPE_ALIASES
from amimv.tools.report_page.runs import NAMES, SCORES, SUBSET, Predictions, Run, Study, read_predictions
from amimv.trainers.comparisons import paired_bootstrap
from amimv.trainers.evaluation import class_thirds
from amimv.trainers.settings import METHOD_ALIASES

#: Columns of probes: the label, and the probes in it. The majority class has none and stands in all.
PROBES = {
    "knn": ("kNN", ("knn", "")),
    "linear": ("linear", ("linear", "")),
    "fine-tuned": ("fine-tuned", ("fine-tuned", "classifier", "")),
}
SHORT = {
    "accuracy": "accuracy",
    "auc": "AUC",
    "macro_f1": "macro F1",
    "head": "head",
    "medium": "medium",
    "tail": "tail",
}
DASH = "-"


@dataclass(frozen=True)
class Cell:
    """A value as it is printed, what it is sorted by, and whether it is its column's best."""

    text: str
    sort: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A method or baseline: its cells, and (label, anchor) of the runs behind them."""

    name: str
    baseline: bool
    cells: tuple[Cell, ...]
    runs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def pick(rows: pd.DataFrame, probe: str) -> pd.DataFrame:
    """The results in a probe's column."""
    return rows[rows["probe"].isin(PROBES[probe][1])]


def ordered(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, results) of each row of a table: baselines first, then by name."""
    baselines = list(NAMES.values())

    def place(item: tuple[str, pd.DataFrame]) -> tuple[bool, int, str]:
        name, own = item
        is_baseline = bool(own["baseline"].iloc[0])
        return not is_baseline, baselines.index(name.split(",")[0]) if is_baseline else 0, name

    return sorted(((str(name), own) for name, own in rows.groupby("name", sort=False)), key=place)


def spread(values: pd.Series, sign: str = "") -> Cell:
    """Mean and standard deviation over seeds, in percent; no deviation of one seed."""
    values = values.dropna()
    if values.empty:
        return Cell(DASH)
    mean = 100 * float(values.mean())
    deviation = f" ± {100 * float(values.std()):.1f}" if len(values) > 1 else ""
    return Cell(f"{mean:{sign}.1f}{deviation}", mean)


def mark_best(rows: Sequence[Row], columns: Sequence[int]) -> tuple[Row, ...]:
    """The rows with the largest value of each column marked, among at least two methods that are no baselines."""
    best = {}
    for c in columns:
        values = [row.cells[c].sort for row in rows if not row.baseline]
        known = [value for value in values if value is not None]
        best[c] = max(known) if len(known) > 1 else math.inf

    def mark(row: Row) -> Row:
        cells = tuple(
            Cell(cell.text, cell.sort, c in best and not row.baseline and cell.sort == best[c])
            for c, cell in enumerate(row.cells)
        )
        return Row(row.name, row.baseline, cells, row.runs)

    return tuple(map(mark, rows))


def main_table(rows: pd.DataFrame, runs: Mapping[str, Run], probe: str) -> Table:
    """Balanced accuracy of every probe, on test and on validation, and all else of one, for the results of one subset
    and label fraction. A column without a value is left out.
    """
    labels = [label for label, _ in PROBES.values()]
    columns = [
        *labels,
        *(f"{PROBES[probe][0]}: {name}" for name in SHORT.values()),
        *(f"validation: {label}" for label in labels),
        "seeds",
    ]
    made = []
    for name, own in ordered(rows):
        seeds = own["seed"].nunique()
        cells = [spread(pick(own, p)["balanced_accuracy"]) for p in PROBES]
        cells += [spread(pick(own, probe)[metric]) for metric in SHORT]
        cells += [*(spread(pick(own, p)["val_balanced_accuracy"]) for p in PROBES), Cell(str(seeds), seeds)]
        behind = own.drop_duplicates("anchor").sort_values("seed")
        links = tuple((str(int(seed)), anchor) for seed, anchor in zip(behind["seed"], behind["anchor"], strict=True))
        made.append(Row(name, bool(own["baseline"].iloc[0]), tuple(cells), links))
    # The majority class stands in every column; so a column is kept for the others.
    others = [row for row in made if row.name != NAMES["majority"]] or made
    kept = [c for c in range(len(columns)) if any(row.cells[c].sort is not None for row in others)]
    shown = [Row(row.name, row.baseline, tuple(row.cells[c] for c in kept), row.runs) for row in made]
    marked = mark_best(shown, range(len(kept) - 1))
    return Table(describe(rows), tuple(columns[c] for c in kept), marked, tuple(notes(rows, runs)))


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def describe_subset(row: Mapping[str, object]) -> str:
    """The imbalance that was asked for."""
    profile, rho, total = row["profile"], float(str(row["rho"])), float(str(row["total"]))
    if profile == "indices":
        return f"given indices, {total:,.0f} images in total"
    if profile == "natural" or (profile == "exp" and rho == 1 and not total):
        return "natural distribution"
    return f"rho {rho:g} ({profile})" + (f", {total:,.0f} images in total" if total else "")


def describe(rows: pd.DataFrame) -> str:
    """A table's title: imbalance, labels, and what of it came true."""
    first = rows.iloc[0]
    counts = sorted(set(rows["n_train"].astype(int)))
    ratios = sorted({round(float(r), 1) for r in rows["realised_ratio"].dropna()})
    ratio = f", realised ratio {' to '.join(f'{r:.1f}' for r in {ratios[0]: 0, ratios[-1]: 0})}" if ratios else ""
    images = " to ".join(f"{n:,}" for n in {counts[0]: 0, counts[-1]: 0})
    return f"{describe_subset(first)}, {percent(first['label_fraction'])} of the labels ({images} images{ratio})"


def notes(rows: pd.DataFrame, runs: Mapping[str, Run]) -> list[str]:
    """What a reader of a table must know about how alike its runs are."""
    found = []
    own = rows[~rows["baseline"]]
    steps = {
        f"{step:,.0f} ({', '.join(sorted(set(group['name'])))})" for step, group in own.groupby("steps", sort=True)
    }
    if len(steps) > 1:
        found.append(f"Numbers of training steps differ: {'; '.join(sorted(steps))}.")
    evaluated = sorted(set(rows["revision"]) - {""})
    trained = sorted(
        {str(runs[a].environment["revision"]) for a in set(rows["anchor"]) if "revision" in runs[a].environment}
    )
    changed = any(revision.endswith("+") for revision in (*evaluated, *trained))
    if len(evaluated) > 1 or len(trained) > 1:
        found.append(
            f"Revisions of the code differ: training {', '.join(trained) or 'unknown'}; "
            f"evaluation {', '.join(evaluated) or 'unknown'}{' (+: changed since)' * changed}."
        )
    if rows["rho"].iloc[0] == 1 and rows["total"].iloc[0] and rows["profile"].iloc[0] != "natural":
        found.append("All classes are as large: which of them are head, medium and tail goes by their number alone.")
    seeds = sorted({int(own_rows["seed"].nunique()) for name, own_rows in ordered(rows)})
    if len(seeds) > 1:
        found.append(f"Rows have {seeds[0]} to {seeds[-1]} seeds: a mean of fewer is less sure.")
    return found


def find_reference(rows: pd.DataFrame, wanted: str) -> str:
    """The row that others are compared with: the wanted method or row, on uniform samplers if there is one. Where the
    alias ``amimv`` is missing, another reading of it, else its method, else the method with the most seeds. Empty
    without one.
    """
    if wanted in set(rows["name"]):
        return wanted
    method = METHOD_ALIASES.get(wanted, wanted)
    starts = [f"{method} on {RECIPE_ALIASES.get(wanted, '')}"]
    if wanted in METHOD_ALIASES:
        starts += [f"{method} on {wanted}", f"{method} on", ""]
    seeds = {name: own["seed"].nunique() for name, own in ordered(rows) if not own["baseline"].iloc[0]}
    for start in starts:
        found = [name for name in seeds if name.startswith(start)]
        if found:
            return min(found, key=lambda name: (-seeds[name], len(name)))
    return ""


def stored(own: pd.DataFrame, study: Study) -> list[tuple[Predictions, int]]:
    """(predictions of the run, line) of each result; empty if any of them has none."""
    found = []
    for anchor, line in zip(own["anchor"], own["line"], strict=True):
        predictions = read_predictions(study.runs[anchor].folder, study.lines[anchor])
        if predictions is None:
            return []
        found.append((predictions, int(line)))
    return found


def predicted(own: pd.DataFrame, study: Study) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels ``(N,)`` and predicted classes ``(S, N)`` of one row's seeds; None where some are missing, multi-label,
    or of other test images.
    """
    found = stored(own, study)
    if not found or found[0][0].labels.ndim != 1:
        return None
    labels = found[0][0].labels
    if not all(np.array_equal(labels, p.labels) for p, _ in found):
        return None
    return labels, np.stack([p.rows[line] for p, line in found])


def difference_table(rows: pd.DataFrame, study: Study, wanted: str) -> Table | None:
    """Balanced accuracy minus the reference's, with paired bootstrap intervals; None without a reference."""
    reference = find_reference(rows, wanted)
    if not reference:
        return None
    made, missing = [], False
    base = {p: predicted(pick(rows[rows["name"] == reference], p), study) for p in PROBES}
    for name, own in ordered(rows):
        if name == reference:
            continue
        cells = []
        for p in PROBES:
            results, other = pick(own, p), base[p]
            one = None if results.empty else predicted(results, study)
            if one is None or other is None or not np.array_equal(one[0], other[0]):
                missing |= not results.empty
                cells.append(Cell(DASH))
                continue
            found = paired_bootstrap(one[0], one[1], other[1])
            text = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
            cells.append(Cell(text, 100 * found.difference))
        made.append(Row(name, bool(own["baseline"].iloc[0]), tuple(cells)))
    if not made or all(cell.sort is None for row in made for cell in row.cells):
        return None
    note = (f"{DASH}: not judged by this probe, or without stored predictions for the same test images.",)
    columns = tuple(label for label, _ in PROBES.values())
    return Table(f"Difference from {reference}, points of balanced accuracy", columns, tuple(made), note * missing)


def paired_by_seed(one: pd.DataFrame, other: pd.DataFrame, metric: str) -> pd.Series:
    """Differences ``one - other`` of the seeds that both have."""
    return (one.set_index("seed")[metric] - other.set_index("seed")[metric]).dropna()


def with_fixed_tail(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    """The rows with a column ``fixed_tail``: mean recall over the classes that are the tail at the highest ratio.

    At rho 1 with a fixed total all classes are as large, and which are called the tail is chance: so the classes are
    held fixed when ratios are compared. NaN where predictions are missing.
    """
    rows = rows.assign(fixed_tail=math.nan)
    highest = stored(rows[rows["rho"] == rows["rho"].max()].head(1), study)
    if not highest or highest[0][0].labels.ndim != 1:
        return rows
    tail = class_thirds(highest[0][0].train_counts.tolist())[2]
    for index, anchor, line in zip(rows.index, rows["anchor"], rows["line"], strict=True):
        own = read_predictions(study.runs[anchor].folder, study.lines[anchor])
        if own is not None:
            right = own.rows[line] == own.labels
            recalls = [right[own.labels == c].mean() for c in tail if (own.labels == c).any()]
            rows.loc[index, "fixed_tail"] = np.mean(recalls) if recalls else math.nan
    return rows


def drop_table(rows: pd.DataFrame, probe: str) -> Table:
    """What is lost from the lowest to the highest ratio, for results of one data set, label fraction and probe that
    `with_fixed_tail` has seen.
    """
    low, high = rows["rho"].min(), rows["rho"].max()
    made = []
    for name, own in ordered(rows):
        first, last = own[own["rho"] == low], own[own["rho"] == high]
        cells: list[Cell] = []
        for metric in ("balanced_accuracy", "fixed_tail"):
            cells += [spread(first[metric]), spread(last[metric]), spread(paired_by_seed(first, last, metric))]
        if not first.empty and not last.empty:
            made.append(Row(name, bool(own["baseline"].iloc[0]), tuple(cells)))
    ends = (f"rho {low:g}", f"rho {high:g}", "drop")
    columns = (*(f"balanced accuracy: {end}" for end in ends), *(f"tail: {end}" for end in ends))
    labels = percent(rows["label_fraction"].iloc[0])
    title = f"Loss from rho {low:g} to rho {high:g}, {PROBES[probe][0]}, {labels} of the labels"
    return Table(title, columns, tuple(made))


def gain_table(rows: pd.DataFrame, probe: str) -> Table | None:
    """What each sampler gains over uniform ones of the same method, recipe and settings; None without another."""
    made = []
    rows = pick(rows[~rows["baseline"]], probe)
    for name, own in ordered(rows):
        row = own.iloc[0]
        samplers = [
            s for s in (row["sampler"], row["partner"] and f"partner {row['partner']}") if "uniform" not in s and s
        ]
        plain = name
        for sampler in samplers:
            plain = plain.replace(f", {sampler}", "", 1)
        base = rows[rows["name"] == plain]
        if samplers and not base.empty:
            gains = [
                spread(paired_by_seed(own, base, m), "+") for m in ("balanced_accuracy", "head", "medium", "tail")
            ]
            made.append(Row(name, False, tuple(gains)))
    if not made:
        return None
    title = f"Gain over uniform sampling, {PROBES[probe][0]}, points: {describe(rows)}"
    return Table(title, ("balanced accuracy", "head", "medium", "tail"), tuple(made))


def long_form(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per data set, subset, label fraction, row and probe: mean and standard deviation of each score over the
    seeds (fractions in [0, 1], six digits as in the results), the number of seeds and the runs.
    """
    keys = [*SUBSET, "label_fraction", "name", "probe"]
    grouped = rows.groupby(keys, sort=False)
    columns: dict[str, pd.Series] = {}
    for metric in (*SCORES, "val_balanced_accuracy"):
        columns[f"{metric}_mean"], columns[f"{metric}_std"] = grouped[metric].mean(), grouped[metric].std()
    columns["n_seeds"] = grouped["seed"].nunique()
    columns["n_train"], columns["realised_ratio"] = grouped["n_train"].mean(), grouped["realised_ratio"].mean()
    columns["runs"] = grouped["run"].agg(lambda runs: " ".join(sorted(set(runs))))
    made = pd.DataFrame(columns).reset_index().rename(columns={"name": "row"})
    return made.round(6).assign(rho=made["rho"].where(made["rho"] > 0))
