"""The figures of a report, each as the text of an SVG."""

import io
from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, recall_score

from amimv.tools.report_tables import Study, describe_subset, order, subsets

matplotlib.use("Agg")
from matplotlib import pyplot

#: Panels of a figure of confusion matrices or of features.
PANELS = 6


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "amimv"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw_robustness(rows: pd.DataFrame, fraction: float) -> list[tuple[str, str]]:
    """Balanced and tail accuracy of the linear probe against rho: a line per method, its spread over seeds as bars.

    One figure for each data set, profile and total with two ratios or more: title and SVG.
    """
    figures = []
    for (data, profile, total), own in _linear(rows, fraction).groupby(["data", "profile", "total"]):
        rhos = sorted(own["rho"].unique())
        if len(rhos) < 2 or profile == "natural":
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharex=True)
        for axis, metric in zip(axes, ("balanced_accuracy", "tail"), strict=True):
            for i, label in enumerate(order(list(own["label"]))):
                values = own[own["label"] == label].groupby("rho")[metric].agg(["mean", "std"]) * 100
                style = "--" if (own.loc[own["label"] == label, "features"] != "pretrained").all() else "-"
                axis.errorbar(
                    values.index,
                    values["mean"],
                    yerr=values["std"].fillna(0),
                    label=label,
                    color=f"C{i % 10}",
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    linewidth=1,
                )
            axis.set(xscale="log", xticks=rhos, xticklabels=[f"{rho:g}" for rho in rhos], xlabel="imbalance ratio rho")
            axis.set_ylabel(f"{metric.replace('_', ' ')} (%)" if metric != "tail" else "accuracy on tail classes (%)")
            axis.minorticks_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
        shown = f"{data} (synthetic)" if data == "phantom" else data
        size = f"{total:,} images at every ratio" if total else "classes capped at what they have"
        figures.append((f"{shown}, profile {profile}, {size}", _svg(figure)))
    return figures


def _linear(rows: pd.DataFrame, fraction: float) -> pd.DataFrame:
    """Linear probes with these labels, a run once for each subset that it stands for."""
    own = rows[(rows["probe"] == "linear") & (rows["label_fraction"] == fraction)]
    return own.drop_duplicates(["run", "line", "profile", "rho", "total"])


def drops(rows: pd.DataFrame, fraction: float) -> pd.DataFrame:
    """What the linear probe's balanced accuracy loses from the lowest to the highest rho, in points."""
    found = []
    for (data, profile, total), own in _linear(rows, fraction).groupby(["data", "profile", "total"]):
        low, high = own["rho"].min(), own["rho"].max()
        if low == high or profile == "natural":
            continue
        means = own.groupby(["label", "rho"])["balanced_accuracy"].mean().unstack("rho") * 100
        for label in order(list(own["label"])):
            one = means.loc[label]
            values = {"at the lowest": one[low], "at the highest": one[high], "drop": one[low] - one[high]}
            setting = {"data": data, "profile": profile, "total": total, "rho": f"{low:g} to {high:g}"}
            found.append(setting | {"row": label} | values)
    return pd.DataFrame(found)


def sampler_gains(rows: pd.DataFrame, fraction: float) -> pd.DataFrame:
    """Balanced accuracy of the linear probe with each anchor sampler minus that with uniform ones, in points."""
    own = _linear(rows[rows["features"] == "pretrained"], fraction)
    keys = ["data", "profile", "rho", "total", "method", "recipe"]
    own = own[own["partner"].isin(["", "uniform"])]
    means = own.groupby([*keys, "sampler"])["balanced_accuracy"].mean().unstack("sampler") * 100
    if "uniform" not in means or means.shape[1] < 2:
        return pd.DataFrame()
    gains = means.drop(columns="uniform").sub(means["uniform"], axis=0)
    return gains.dropna(how="all").reset_index()


def _best_lines(study: Study, rows: pd.DataFrame, fraction: float) -> list[tuple[str, list[tuple[str, int]]]]:
    """For up to `PANELS` rows of a table, the best first: the runs and lines of its linear probe."""
    own = _linear(rows, fraction)
    own = own[(own["features"] == "pretrained") | (own["features"] == "supervised")]
    means = own.groupby("label")["balanced_accuracy"].mean().sort_values(ascending=False)
    chosen = [(label, own[own["label"] == label]) for label in means.index[:PANELS]]
    return [(label, list(zip(one["run"], one["line"], strict=True))) for label, one in chosen]


def draw_recalls(study: Study, rows: pd.DataFrame, fraction: float) -> str:
    """Recall of each class by its number of training images, a line per row, mean over its seeds."""
    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    drawn = False
    for label, lines in _best_lines(study, rows, fraction):
        recalls, counts = [], np.zeros(0)
        for run, line in lines:
            arrays = study.runs[run].arrays
            if f"row_{line:03d}" in arrays and arrays["labels"].ndim == 1:
                counts = arrays["train_counts"]
                args = {"labels": range(len(counts)), "average": None, "zero_division": np.nan}
                recalls.append(recall_score(arrays["labels"], arrays[f"row_{line:03d}"], **args))
        if recalls:
            by_size = np.argsort(counts, kind="stable")
            axis.plot(counts[by_size], 100 * np.mean(recalls, 0)[by_size], marker="o", markersize=4, label=label)
            drawn = True
    axis.set(xscale="log", xlabel="training images of the class", ylabel="recall (%)", ylim=(-2, 102))
    axis.legend(fontsize=7, frameon=False)
    svg = _svg(figure)
    return svg if drawn else ""


def _panels(
    study: Study, rows: pd.DataFrame, fraction: float, draw: Callable[[Axes, Study, list[tuple[str, int]]], bool]
) -> str:
    lines = _best_lines(study, rows, fraction)
    figure, axes = pyplot.subplots(1, max(1, len(lines)), figsize=(2.6 * max(1, len(lines)), 3), layout="constrained")
    drawn = False
    for axis, (label, own) in zip(np.atleast_1d(axes), lines, strict=False):
        if draw(axis, study, own):
            axis.set_title(label.replace(" on ", "\non "), fontsize=8)
            drawn = True
        else:
            axis.set_visible(False)
    handles, names = np.atleast_1d(axes)[-1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=6, markerscale=3, frameon=False)
    svg = _svg(figure)
    return svg if drawn else ""


def draw_confusions(study: Study, rows: pd.DataFrame, fraction: float) -> str:
    """Confusion matrices of linear probes, shares of each true class in %, mean over seeds."""

    def draw(axis: Axes, study: Study, lines: list[tuple[str, int]]) -> bool:
        found = []
        for run, line in lines:
            arrays = study.runs[run].arrays
            if f"row_{line:03d}" in arrays and arrays["labels"].ndim == 1:
                known = range(len(arrays["train_counts"]))
                truth, predicted = arrays["labels"], arrays[f"row_{line:03d}"]
                found.append(confusion_matrix(truth, predicted, labels=known, normalize="true"))
        if not found:
            return False
        matrix = 100 * np.mean(found, axis=0)
        axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(matrix):
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="w" if value > 60 else "k")
        ticks = range(len(matrix))
        axis.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true")
        axis.tick_params(labelsize=6)
        return True

    return _panels(study, rows, fraction, draw)


def draw_features(study: Study, rows: pd.DataFrame, fraction: float) -> str:
    """The first two principal components of the features of the test images, one seed, coloured by class."""

    def draw(axis: Axes, study: Study, lines: list[tuple[str, int]]) -> bool:
        arrays = study.runs[lines[0][0]].arrays
        if "projection" not in arrays or arrays["labels"].ndim > 1:
            return False
        names = arrays["class_names"]
        for c in np.unique(arrays["labels"]):
            points = arrays["projection"][arrays["labels"] == c][:200]
            name = f"{c} {str(names[c])[:28]}"
            axis.scatter(points[:, 0], points[:, 1], s=3, color=f"C{c % 10}", label=name, linewidths=0)
        axis.set(xticks=[], yticks=[])
        return True

    return _panels(study, rows, fraction, draw)


def figures_of(study: Study, fraction: float) -> list[dict[str, str]]:
    """For each subset: recall by class size, confusion matrices and pictures of the features."""
    found = []
    for key, own in subsets(study.rows):
        drawn = {
            "title": describe_subset(key, own),
            "recalls": draw_recalls(study, own, fraction),
            "confusions": draw_confusions(study, own, fraction),
            "features": draw_features(study, own, fraction),
        }
        if any(drawn[name] for name in ("recalls", "confusions", "features")):
            found.append(drawn)
    return found
