"""One page from many runs: ``python tools/report.py runs/study -o report.html``.

Tables with spread and intervals, robustness figures, and behind every number the runs, their commands, settings and
versions. ``--format md``, ``csv`` or ``latex`` give the tables alone, for papers. The page needs no network.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from amimv import InputError, check_choice, run_command
from amimv.tools.report_figures import draw_robustness, drops, figures_of, sampler_gains
from amimv.tools.report_tables import (
    BASELINES,
    PROBES,
    Study,
    compare,
    describe_subset,
    long_form,
    order,
    read_study,
    subsets,
    summarise,
)

logger = logging.getLogger("amimv")

SUFFIXES = {"html": ".html", "md": ".md", "csv": ".csv", "latex": ".tex"}
#: Of the second tables.
METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "auc", "head", "medium", "tail")


@dataclass(frozen=True)
class ReportSettings:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of run folders, such as a study's"""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """the report; empty: report.html (or .md, .csv, .tex) in the first folder"""
    format: str = "html"
    """html, md, csv or latex"""
    reference: str = "mimv on amimv-strength"
    """the row that others are compared with"""


def percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def share(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def main_table(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """A subset's table: mean and spread as text, means as numbers, and which rows are pre-trained.

    Rows: baselines, then methods; columns: probe by label fraction, and the number of seeds.
    """
    summary = summarise(rows)
    summary = summary.assign(column=[f"{share(f)} {p}" for f, p in summary[["label_fraction", "column"]].to_numpy()])
    names = list(dict.fromkeys(PROBES.values()))
    fractions = sorted(rows["label_fraction"].unique())
    columns = [f"{share(f)} {p}" for f in fractions for p in names if f"{share(f)} {p}" in set(summary["column"])]
    means = summary.pivot_table(index="label", columns="column", values="mean").reindex(order(list(summary["label"])))
    stds = summary.pivot(index="label", columns="column", values="std").reindex(means.index)
    text = pd.DataFrame("", index=means.index, columns=columns)
    for label in means.index:
        for column in columns:
            mean, std = means.loc[label, column], stds.loc[label, column]
            # Nothing to tell of what no seed changes.
            text.loc[label, column] = percent(mean) + (f" ± {percent(std)}" if std > 0 else "")
    seeds = summary.groupby("label")["count"].max().reindex(means.index)
    text["seeds"] = seeds.astype(int).astype(str)
    pretrained = sorted(set(summary.loc[~summary["baseline"], "label"]))
    return text, means[columns], pretrained


def metrics_table(study: Study, rows: pd.DataFrame, fraction: float, reference: str) -> pd.DataFrame:
    """All metrics of the linear probe with these labels, and the difference from the reference row."""
    own = rows[(rows["label_fraction"] == fraction) & (rows["probe"].isin(["linear", ""]))]
    columns = {metric: summarise(own, metric).set_index("label")["mean"].map(percent) for metric in METRICS}
    table = pd.DataFrame(columns)
    table = table.reindex(order(list(own["label"]))).rename(columns=lambda name: name.replace("_", " "))
    if reference in table.index:
        against = {
            label: compare(own, study, label, reference, fraction) for label in table.index if label != reference
        }
        table[f"against {reference} [95 %]"] = [
            f"{100 * i.difference:+.1f} [{100 * i.low:+.1f}, {100 * i.high:+.1f}]" if (i := against.get(label)) else ""
            for label in table.index
        ]
    return table


def links(rows: pd.DataFrame) -> dict[str, str]:
    """For each row of a table, links to the runs behind it, by their seeds."""
    found = {}
    for label, own in rows.groupby("label"):
        runs = own[["seed", "run"]].drop_duplicates().sort_values("seed").to_numpy()
        anchors = (f'<a href="#{escape(run)}" title="{escape(run)}">{seed}</a>' for seed, run in runs)
        found[str(label)] = f' <span class="spread">seed {" ".join(anchors)}</span>'
    return found


def to_html(
    table: pd.DataFrame,
    means: pd.DataFrame | None = None,
    pretrained: Sequence[str] = (),
    head: str = "",
    runs: Mapping[str, str] | None = None,
) -> str:
    """A table with the best of the pre-trained rows of each column in bold, and links to the runs of each row."""
    best = {} if means is None or not len(pretrained) else means.loc[list(pretrained)].max().round(3).to_dict()
    lines = [f"<table><thead><tr><th>{escape(head)}</th>"]
    lines += [f"<th>{escape(str(c)).replace(' % ', ' %<br>')}</th>" for c in table.columns] + ["</tr></thead><tbody>"]
    for label, row in table.iterrows():
        kind = ' class="baseline"' if label in BASELINES.values() else ""
        lines.append(f"<tr{kind}><td>{escape(str(label))}{(runs or {}).get(str(label), '')}</td>")
        for column, value in row.items():
            shown = escape(str(value)).replace(" ± ", ' <span class="spread">± ')
            shown += "</span>" if "spread" in shown else ""
            bold = (
                means is not None
                and label in pretrained
                and round(means.loc[label].get(column, -1), 3) == best.get(column)
            )
            lines.append(f"<td>{f'<strong>{shown}</strong>' if bold else shown}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def note_on(study: Study, rows: pd.DataFrame) -> str:
    """How far the numbers of a subset can be trusted, and what differs between its runs."""
    runs = [study.runs[name] for name in dict.fromkeys(rows["run"])]
    sizes = {len(run.arrays["labels"]) for run in runs if "labels" in run.arrays}
    parts = []
    if sizes:
        n = max(sizes)
        parts.append(f"{n:,} test images: one standard error of an accuracy of 50 % is {50 / math.sqrt(n):.1f} points")
    steps = sorted(int(s) for s in rows.loc[rows["features"] == "pretrained", "steps"].dropna().unique())
    if steps:
        parts.append(f"pre-trained for {' or '.join(f'{s:,}' for s in steps)} steps")
    revisions = {str(run.environment.get("revision")) for run in runs}
    if len(revisions) > 1:
        parts.append(f"run by {len(revisions)} revisions of the code")
    return "; ".join(parts) + "."


def plain(table: pd.DataFrame) -> str:
    """A data frame of names and points as HTML."""
    if table.empty:
        return ""
    shown = table.copy()
    for column in shown.columns:
        if shown[column].dtype == float:
            shown[column] = shown[column].map(lambda value: "" if math.isnan(value) else f"{value:.1f}")
    return to_html(shown.set_index(shown.columns[0]), head=str(shown.columns[0]))


def render_html(study: Study, title: str, reference: str) -> str:
    """The whole page."""
    rows, fraction = study.rows, float(study.rows["label_fraction"].max())
    tables = []
    for key, own in subsets(rows):
        text, means, pretrained = main_table(own)
        extras = []
        for one in sorted(own["label_fraction"].unique()):
            extra = metrics_table(study, own, one, reference)
            extras.append(
                {"title": f"Linear probe, {share(one)} of the labels: all metrics", "html": Markup(to_html(extra))}
            )
        html = Markup(to_html(text, means, pretrained, runs=links(own)))
        tables.append(
            {"title": describe_subset(key, own), "note": note_on(study, own), "html": html, "extras": extras}
        )
    runs = [
        {
            "name": name,
            "seconds": f"{run.seconds:,.0f}",
            "revision": run.environment.get("revision", ""),
            "command": run.command,
            "config": run.config,
            "packages": json.dumps(run.environment.get("packages", {}), indent=2),
        }
        for name, run in sorted(study.runs.items())
    ]
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=select_autoescape(default=True, default_for_string=True))
    return environment.get_template("report.html.jinja").render(
        title=title,
        summary=describe(study),
        synthetic=(rows["data"] == "phantom").any(),
        tables=tables,
        labels=share(fraction),
        robustness=[(name, Markup(svg)) for name, svg in draw_robustness(rows, fraction)],
        drops=Markup(plain(drops(rows, fraction))),
        gains=Markup(plain(sampler_gains(rows, fraction))),
        figures=[{k: v if k == "title" else Markup(v) for k, v in f.items()} for f in figures_of(study, fraction)],
        runs=runs,
        versions=versions(study),
        failed=study.failed,
        not_run=study.not_run,
        left_out=study.left_out,
    )


def describe(study: Study) -> str:
    """How much there is, in a sentence."""
    rows = study.rows
    hours = sum(run.seconds for run in study.runs.values()) / 3600
    sets = sorted(rows["data"].unique())
    seeds = rows.loc[rows["features"] == "pretrained", "seed"].nunique()
    cells = f"{len(study.runs)} runs on {', '.join(sets)}; up to {seeds} training seeds; {hours:.1f} hours of run time"
    return cells + (f"; {len(study.failed)} cells failed" if study.failed else "") + "."


def versions(study: Study) -> str:
    """Revisions and the packages that matter, over all runs."""
    found: dict[str, set[str]] = {}
    for run in study.runs.values():
        found.setdefault("amimv", set()).add(str(run.environment.get("revision")))
        for name in ("torch", "timm", "kornia", "scikit-learn", "medmnist"):
            found.setdefault(name, set()).add(str(run.environment.get("packages", {}).get(name)))
    return ", ".join(f"{name} {' / '.join(sorted(values))}" for name, values in found.items()) + "."


def render_text(study: Study, kind: str) -> str:
    """The tables of each subset as Markdown or LaTeX."""
    parts = []
    for key, own in subsets(study.rows):
        text, means, pretrained = main_table(own)
        mark = "**{}**" if kind == "md" else r"\textbf{{{}}}"
        for column in means.columns if pretrained else ():
            best = means.loc[pretrained, column].max().round(3)
            for label in pretrained:
                if means.loc[label, column].round(3) == best:
                    text.loc[label, column] = mark.format(text.loc[label, column])
        title, note = describe_subset(key, own), note_on(study, own)
        if kind == "md":
            parts.append(f"**{title}**\n\n{note}\n\n{text.rename_axis('').to_markdown()}\n")
        else:
            # ± and % are LaTeX's own; \textbf is already LaTeX.
            cells = text.replace({"±": r"$\\pm$"}, regex=True).rename(columns=lambda name: name.replace("%", r"\%"))
            caption = f"{title}. {note}".replace("%", r"\%").replace("_", r"\_")
            parts.append(cells.to_latex(caption=caption, escape=False))
    return "\n".join(parts)


def write_report(settings: ReportSettings) -> Path:
    """Read the runs, write the report.

    Raises:
        InputError: a folder that is not there, one without a finished run, an unknown format.
    """
    check_choice("format", settings.format, SUFFIXES)
    if not settings.runs:
        raise InputError("no folder of runs given: expected at least one, such as runs/study")
    study = read_study([Path(folder) for folder in settings.runs])
    for line in study.left_out:
        logger.warning("left out %s", line)
    path = Path(settings.output or Path(settings.runs[0]) / f"report{SUFFIXES[settings.format]}")
    if settings.format == "html":
        content = render_html(study, f"Report on {Path(settings.runs[0]).resolve().name}", settings.reference)
    elif settings.format == "csv":
        content = long_form(study).to_csv(index=False, float_format="%.6g")
    else:
        content = render_text(study, settings.format)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 input that cannot be used)."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    run_command(lambda: print(write_report(tyro.cli(ReportSettings, prog="report.py", description=__doc__))))


if __name__ == "__main__":
    main()
