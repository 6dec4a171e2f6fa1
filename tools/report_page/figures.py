"""The figures of a report, as PNG files that stand in the page itself."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from amimv.tools.report_page.runs import Study
from amimv.tools.report_page.tables import is_baseline, ordered, predicted, stored

#: Methods that a figure can tell apart; the tables hold them all.
MOST = 20
COLOURS = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
MARKERS = "osD^v"


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, with the words that stand for it."""

    source: str
    words: str


def encode_figure(figure: Figure, words: str) -> Picture:
    """The figure in 64 colours: a third of the bytes, and no difference that one sees in lines and points."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    pyplot.close(figure)
    Image.open(buffer).convert("RGB").quantize(64).save(small, "png", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(small.getvalue()).decode(), words)


def line_styles(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """How each row is drawn: baselines grey and dashed, methods in colour."""
    styles: dict[str, dict[str, Any]] = {}
    greys = methods = 0
    for name in ordered(rows):
        if is_baseline(name):
            styles[name] = {"color": str(0.25 + 0.13 * (greys % 4)), "linestyle": "--", "marker": "x+*1"[greys % 4]}
            greys += 1
        elif methods < MOST:
            marker = MARKERS[methods // len(COLOURS) % len(MARKERS)]
            styles[name] = {"color": COLOURS[methods % len(COLOURS)], "linestyle": "-", "marker": marker}
            methods += 1
    return styles


def draw_robustness(rows: pd.DataFrame, title: str) -> Picture:
    """Balanced accuracy and tail accuracy against rho; bars are one standard deviation over seeds.

    Args:
        rows: results of one data set, label fraction and probe, with ``fixed_tail``.
        title: of the figure.
    """
    rhos = sorted(rows["rho"].unique())
    panels = {"balanced_accuracy": "balanced accuracy (%)", "fixed_tail": "tail accuracy (%)"}
    panels = {metric: label for metric, label in panels.items() if rows[metric].notna().any()}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels) + 2.6, 3.9), squeeze=False)
    styles = line_styles(rows)
    for axis, (metric, label) in zip(axes[0], panels.items(), strict=True):
        for i, (name, style) in enumerate(styles.items()):
            found = rows[rows["name"] == name].groupby("rho")[metric].agg(["mean", "std"])
            # Set a little apart, so that bars do not cover each other.
            x = found.index.to_numpy(float) * (1 + 0.012 * (i - len(styles) / 2))
            bars = 100 * found["std"].fillna(0)
            axis.errorbar(x, 100 * found["mean"], bars, label=name, linewidth=1.3, markersize=5, capsize=2, **style)
        axis.set(xscale="log", xlabel="imbalance ratio rho", ylabel=label)
        axis.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    figure.set_layout_engine("constrained")
    return encode_figure(figure, f"{' and '.join(panels.values())} of each method against rho: {title}")


def confusion(labels: np.ndarray, predictions: np.ndarray, n_classes: int) -> np.ndarray:
    """``(C, C)`` share of the images of each true class (row) that each class was predicted for, over seeds; NaN for
    a class without images.
    """
    counts = np.zeros((n_classes, n_classes))
    for one in predictions:
        np.add.at(counts, (labels, one), 1)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def draw_recalls(rows: pd.DataFrame, study: Study, title: str) -> Picture | None:
    """Recall of each class against its training images, for the results of one subset, label fraction and probe."""
    figure, axis = pyplot.subplots(figsize=(8.2, 3.9), layout="constrained")
    drawn = False
    for name, style in line_styles(rows).items():
        own = rows[rows["name"] == name]
        one, behind = predicted(own, study), stored(own, study)
        if one is None or not behind:
            continue
        counts = behind[0][0].train_counts
        recalls = np.diag(confusion(*one, len(counts)))
        order = np.argsort(counts, kind="stable")
        axis.plot(counts[order], 100 * recalls[order], label=name, linewidth=1, markersize=5, **style)
        drawn = True
    if not drawn:
        pyplot.close(figure)
        return None
    axis.set(xscale="log", xlabel="training images of the class", ylabel="recall (%)")
    axis.grid(alpha=0.25)
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return encode_figure(figure, f"recall of each class against its number of training images: {title}")


def _grid(count: int, height: float) -> tuple[Figure, list[Any]]:
    columns = min(4, count)
    lines = math.ceil(count / columns)
    size = (2.7 * columns, height * lines + 0.5)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_axis_off()
    return figure, flat[:count]


def draw_confusions(rows: pd.DataFrame, study: Study, title: str) -> Picture | None:
    """A confusion matrix per method, mean over seeds, for the results of one subset, label fraction and probe."""
    found = []
    for name in ordered(rows):
        own = rows[rows["name"] == name]
        one, behind = predicted(own, study), stored(own, study)
        if one is not None and behind:
            names = behind[0][0].class_names
            found.append((name, 100 * confusion(*one, len(names)), names))
    if not found:
        return None
    found = found[:MOST]
    figure, axes = _grid(len(found), 2.7)
    for axis, (name, matrix, names) in zip(axes, found, strict=True):
        axis.imshow(matrix, vmin=0, vmax=100, cmap="Blues")
        axis.set_title(name.replace(" on ", "\non "), fontsize=7)
        short = [label if len(label) <= 8 else label[:7] + "." for label in names]
        axis.set_xticks(range(len(names)), short, fontsize=6, rotation=90 if max(map(len, short)) > 2 else 0)
        axis.set_yticks(range(len(names)), short, fontsize=6)
        if len(names) <= 10:
            for (true, guess), value in np.ndenumerate(matrix):
                if not np.isnan(value):
                    colour = "white" if value > 55 else "black"
                    axis.text(guess, true, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    figure.supxlabel("predicted class", fontsize=8)
    figure.supylabel("true class", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return encode_figure(figure, f"confusion matrices, % of each true class: {title}")


def draw_projections(rows: pd.DataFrame, study: Study, title: str, most: int = 1500) -> Picture | None:
    """First two principal components of each method's features of the test images, coloured by class; one seed.

    Args:
        rows: results of one subset and label fraction.
        study: that they are of.
        title: of the figure.
        most: points a panel, drawn with a fixed seed.
    """
    found = []
    for name in ordered(rows[~rows["baseline"]]):
        behind = stored(rows[rows["name"] == name].sort_values("seed").head(1), study)
        if behind and len(behind[0][0].projection) and behind[0][0].labels.ndim == 1:
            found.append((name, behind[0][0]))
    if not found:
        return None
    found = found[:MOST]
    figure, axes = _grid(len(found), 2.5)
    colours = pyplot.get_cmap("tab10" if len(found[0][1].class_names) <= 10 else "tab20")
    for axis, (name, one) in zip(axes, found, strict=True):
        chosen = np.random.default_rng(0).permutation(len(one.labels))[:most]
        # The smallest classes last, on top of the others.
        rank = np.argsort(np.argsort(-one.train_counts, kind="stable"))
        chosen = chosen[np.argsort(rank[one.labels[chosen]], kind="stable")]
        x, y = one.projection[chosen].T
        axis.scatter(x, y, s=3, c=one.labels[chosen], cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, linewidths=0)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name.replace(" on ", "\non "), fontsize=7)
    names, counts = found[0][1].class_names, found[0][1].train_counts
    dots = [pyplot.Line2D([], [], color=colours(c), marker="o", linestyle="") for c in range(len(names))]
    labels = [f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)]
    how: dict[str, Any] = {"ncols": 4, "fontsize": 7, "title_fontsize": 7, "frameon": False}
    figure.legend(dots, labels, loc="outside lower center", title="class (training images)", **how)
    figure.suptitle(title, fontsize=10)
    return encode_figure(figure, f"principal components of the features of each method: {title}")
