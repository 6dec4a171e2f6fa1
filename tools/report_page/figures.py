"""The figures of a report, as PNG files that stand in the page itself."""

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from amimv.tools.report_page.runs import Predictions, Study
from amimv.tools.report_page.tables import is_baseline, ordered, predicted

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
            found = (
                rows[rows["name"] == name].groupby(["rho", "seed"])[metric].mean().groupby("rho").agg(["mean", "std"])
            )
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


def collect(rows: pd.DataFrame, study: Study) -> dict[str, tuple[Predictions, np.ndarray]]:
    """What each row of one subset, label fraction and probe predicted, by name; without those that are unknown."""
    found = {name: predicted(rows[rows["name"] == name], study) for name in ordered(rows)}
    return dict([(name, one) for name, one in found.items() if one][:MOST])


def confusion(stored: Predictions, predictions: np.ndarray) -> np.ndarray:
    """``(C, C)`` share of the images of each true class (row) that each class was predicted for, over seeds; NaN for
    a class without images.
    """
    truth, classes = np.tile(stored.labels, len(predictions)), range(len(stored.class_names))
    counts = confusion_matrix(truth, predictions.ravel(), labels=classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(counts / counts.sum(axis=1, keepdims=True))


def draw_recalls(rows: pd.DataFrame, study: Study, title: str) -> Picture | None:
    """Recall of each class against its training images; of predictions as in `collect`, None without any."""
    found, styles = collect(rows, study), line_styles(rows)
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(8.2, 3.9), layout="constrained")
    for name, (stored, predictions) in found.items():
        counts, recalls = stored.train_counts, np.diag(confusion(stored, predictions))
        order = np.argsort(counts, kind="stable")
        axis.plot(counts[order], 100 * recalls[order], label=name, linewidth=1, markersize=5, **styles.get(name, {}))
    axis.set(xscale="log", xlabel="training images of the class", ylabel="recall (%)")
    axis.grid(alpha=0.25)
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return encode_figure(figure, f"recall of each class against its number of training images: {title}")


def _panels(names: Iterable[str], height: float, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel, and its name, for each of these."""
    titles = [name.replace(" on ", "\non ") for name in names]
    columns = min(4, len(titles))
    lines = math.ceil(len(titles) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(2.7 * columns, height * lines + 0.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip_longest(axes.flat, titles):
        axis.set_title(name or "", fontsize=7)
        axis.set(visible=name is not None)
    figure.suptitle(title, fontsize=10)
    return figure, list(axes.flat)[: len(titles)]


def draw_confusions(rows: pd.DataFrame, study: Study, title: str) -> Picture | None:
    """A confusion matrix a row, mean over seeds; of predictions as in `collect`, None without any."""
    found = collect(rows, study)
    if not found:
        return None
    figure, axes = _panels(found, 2.7, title)
    for axis, (stored, predictions) in zip(axes, found.values(), strict=True):
        names = [name if len(name) <= 8 else f"{name[:7]}." for name in stored.class_names]
        shown = ConfusionMatrixDisplay(100 * confusion(stored, predictions), display_labels=names)
        how: dict[str, Any] = {"text_kw": {"fontsize": 6}, "im_kw": {"vmin": 0, "vmax": 100}, "values_format": ".0f"}
        shown.plot(ax=axis, cmap="Blues", colorbar=False, include_values=len(names) <= 10, **how)
        for text in axis.texts:  # black or white by the shared range of colours, not by each matrix's own
            text.set_color("white" if float(text.get_text()) > 55 else "black")
        axis.set(xlabel="", ylabel="")
        axis.tick_params(labelsize=6)
        axis.tick_params(axis="x", labelrotation=90 if max(map(len, names)) > 2 else 0)
    figure.supxlabel("predicted class", fontsize=8)
    figure.supylabel("true class", fontsize=8)
    return encode_figure(figure, f"confusion matrices, % of each true class: {title}")


def draw_projections(rows: pd.DataFrame, study: Study, title: str, most: int = 1500) -> Picture | None:
    """First two principal components of each method's features of the test images, coloured by class, of its first
    seed; at most so many points a panel. None without any.
    """
    methods = collect(rows[~rows["baseline"]].sort_values("seed"), study)
    found = {name: stored for name, (stored, _) in methods.items() if len(stored.projection)}
    if not found:
        return None
    figure, axes = _panels(found, 2.5, title)
    first = next(iter(found.values()))
    colours = pyplot.get_cmap("tab10" if len(first.class_names) <= 10 else "tab20")
    for axis, one in zip(axes, found.values(), strict=True):
        chosen = np.random.default_rng(0).permutation(len(one.labels))[:most]
        # The smallest classes last, on top of the others.
        chosen = chosen[np.argsort(-one.train_counts[one.labels[chosen]], kind="stable")]
        x, y = one.projection[chosen].T
        axis.scatter(x, y, s=3, c=one.labels[chosen], cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, linewidths=0)
        axis.set(xticks=[], yticks=[])
    dots = [pyplot.Line2D([], [], color=colours(c), marker="o", linestyle="") for c in range(len(first.class_names))]
    labels = [f"{name} ({count:,})" for name, count in zip(first.class_names, first.train_counts, strict=True)]
    how: dict[str, Any] = {"ncols": 4, "fontsize": 7, "title_fontsize": 7, "frameon": False}
    figure.legend(dots, labels, loc="outside lower center", title="class (training images)", **how)
    return encode_figure(figure, f"principal components of the features of each method: {title}")
