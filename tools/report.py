"""One page about all runs of a folder: ``python tools/report.py runs/study -o report.html``.

First what the numbers say of every data set and share of labels, in words; then figures, then tables beside their
baselines, what imbalance costs, what samplers gain, and the command, settings and versions behind each number. The
page needs no network. ``--format md | csv | latex`` write words and tables, numbers, or tables alone; ``--archive
study.zip`` packs the runs into one file, which is read as their folder is.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from amimv.command_line import begin_command, read_command
from amimv.signals import is_command
from amimv.tools.commands import FORMATS, ReportSettings

if is_command(__name__):
    begin_command(ReportSettings, __doc__)

import jinja2
import numpy as np
import pandas as pd

from amimv import InputError, check_choice, run_command, user_path
from amimv.files import replacing
from amimv.tools.report_page.archive import write_archive
from amimv.tools.report_page.figures import Picture, draw_confusions, draw_projections, draw_recalls, draw_robustness
from amimv.tools.report_page.rankings import ranking_table
from amimv.tools.report_page.runs import SUBSET, Study, read_study
from amimv.tools.report_page.tables import (
    PROBES,
    UNRANKED,
    Table,
    describe_subset,
    drop_table,
    gain_table,
    judged,
    long_form,
    main_table,
    percent,
    predicted,
    with_fixed_tail,
)
from amimv.tools.report_page.verdicts import choose, compute_leads, verdict
from amimv.trainers.settings import METHOD_ALIASES

logger = logging.getLogger("amimv")

#: Marks of what is bold until all else is escaped: characters that no name has.
BOLD = "\x02{}\x03"
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$"}
    | {"\x02": r"\textbf{", "\x03": "}"}
)


@dataclass(frozen=True)
class Part:
    """One subset and label fraction: what it says, and its table."""

    verdict: str
    table: Table


@dataclass(frozen=True)
class DataSection:
    """What one grid says about one data set; parts by their subset."""

    name: str
    anchor: str
    test: str
    parts: dict[str, list[Part]]
    drops: list[Table]
    gains: list[Table]
    rankings: Table | None
    robustness: list[Picture]
    pictures: dict[str, Picture]


def _column(settings: ReportSettings) -> str:
    """The probe's column in the tables; empty without one."""
    return next((column for column in PROBES if column.lower() == settings.probe), "")


def split_parts(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The results of each subset and label fraction, from balanced to skewed and from few labels to all."""
    for _, part in rows.groupby([*SUBSET, "label_fraction"]):
        yield part


def build_part(rows: pd.DataFrame, study: Study, settings: ReportSettings) -> Part:
    """All about the results of one subset and label fraction."""
    own = judged(rows, _column(settings))
    reference = choose(own, settings.baseline or "")
    leads = compute_leads(own, reference, study)
    return Part(verdict(own, leads, reference), main_table(rows, own, leads, reference, study.runs))


def describe_test(rows: pd.DataFrame, study: Study) -> str:
    """How much the size of the test set lets one tell; nothing where it is unknown."""
    found = next((one for i in range(len(rows)) if (one := predicted(rows.iloc[[i]], study))), None)
    if not found:
        return ""
    counts = np.unique(found[0].labels, return_counts=True)[1]
    whole, balanced = 50 / math.sqrt(counts.sum()), 50 * math.sqrt((1 / counts).sum()) / len(counts)
    return (
        f"{counts.sum():,} test images: one standard error of an accuracy near 50 % is {whole:.1f} points, and of a "
        f"balanced accuracy with every recall near 50 %, {balanced:.1f} points (the smallest class has "
        f"{counts.min():,} test images)."
    )


def best_of_methods(own: pd.DataFrame) -> pd.DataFrame:
    """Of each method its row with the highest mean on the validation split, and the baselines."""
    means = own[~own["baseline"]].groupby(["method", "name"])["val_balanced_accuracy"].mean().fillna(-1)
    best = {name for _, name in means.groupby(level="method").idxmax()}
    return own[own["baseline"] | own["name"].isin(best)]


def build_data(rows: pd.DataFrame, study: Study, settings: ReportSettings, anchor: str) -> DataSection:
    """All about the results of one grid and data set."""
    name, by = str(rows["data"].iloc[0]), _column(settings) or "each by the probe that validation chose"
    parts: dict[str, list[Part]] = {}
    for part in split_parts(rows):
        parts.setdefault(describe_subset(part.iloc[0]), []).append(build_part(part, study, settings))
    drops, robustness = [], []
    for (profile, total, share), part in rows.groupby(["profile", "total", "label_fraction"]):
        if part["rho"].nunique() > 1:
            own = with_fixed_tail(judged(part, _column(settings)), study)
            of = f"{profile}, " + (f"{total:,.0f} images" if total else "classes capped")
            drops.append(drop_table(own))
            robustness.append(draw_robustness(own, f"{name} ({of}), {percent(share)} of the labels, {by}"))
    # The hardest setting with all labels stands for all in the pictures of single classes.
    last = list(split_parts(rows.sort_values("rho")))
    own = judged(max(last, key=lambda part: (part["label_fraction"].iloc[0], part["rho"].iloc[0])), _column(settings))
    title = f"{name}, {describe_subset(own.iloc[0])}, {percent(own['label_fraction'].iloc[0])} of the labels"
    pictures = {
        "Recall of each class against its training images": draw_recalls(best_of_methods(own), study, title),
        "Confusion matrices (of each method the row that is best on the validation split; % of the true class, all "
        "seeds)": draw_confusions(best_of_methods(own), study, title),
        "Features of the test images by class (first two principal components, one seed)": draw_projections(
            own, study, title
        ),
    }
    return DataSection(
        name,
        anchor,
        describe_test(rows, study),
        dict(sorted(parts.items(), key=lambda item: item[0] != "natural distribution")),
        drops,
        [table for part in split_parts(rows) if (table := gain_table(judged(part, _column(settings))))],
        ranking_table(rows),
        robustness,
        {words: one for words, one in pictures.items() if one},
    )


def render_page(study: Study, settings: ReportSettings) -> str:
    """The whole page."""
    rows = study.rows
    grids: dict[str, list[DataSection]] = {}
    for number, ((grid, _), own) in enumerate(rows.groupby(["grid", "data"], sort=False)):
        grids.setdefault(str(grid), []).append(build_data(own, study, settings, f"data-{number}"))
    environments = dict.fromkeys(run.versions for run in study.runs.values() if run.versions)
    environments = {versions: f"E{number}" for number, versions in enumerate(environments, 1)}
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "report_page")
    template = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.jinja")
    return template.render(
        grids=grids,
        study=study,
        data=list(rows["data"].unique()),
        seeds=sorted(rows["seed"].astype(int).unique()),
        synthetic=rows["data"].str.contains("(synthetic)", regex=False).any(),
        probe=_column(settings),
        unranked=UNRANKED,
        environments=environments,
    )


def render_tables(study: Study, settings: ReportSettings) -> str:
    """Words and main tables as Markdown, or the tables as LaTeX (which needs ``booktabs``)."""
    written = []
    for rows in split_parts(study.rows):
        part = build_part(rows, study, settings)
        grid = f"{rows['grid'].iloc[0]}: " if rows["grid"].iloc[0] else ""
        title = f"{grid}{rows['data'].iloc[0]}, {part.table.title}; test split, %, mean ± std over seeds"
        title += " ± std over draws of the labels" * (rows["label_seed"].nunique() > 1)
        frame = part.table.texts.where(~part.table.best(), part.table.texts.map(BOLD.format))
        if settings.format == "md":
            text = frame.to_markdown(disable_numparse=True).replace("\x02", "**").replace("\x03", "**")
            written.append("\n\n".join([f"### {title}", part.verdict, text, *part.table.notes]))
        else:
            frame = frame.map(_escape).rename(columns=_escape, index=_escape)
            form = "l" + "r" * frame.shape[1]
            written.append(frame.to_latex(escape=False, column_format=form, caption=_escape(title)))
    return "\n\n".join(written) + "\n"


def _escape(text: str) -> str:
    return text.translate(LATEX)


def report(settings: ReportSettings) -> None:
    """Read the runs and write the file.

    Raises:
        InputError: nothing to report on, or an unknown format, probe or baseline.
    """
    s = settings
    if not s.runs:
        raise InputError("no folder of runs is given: python tools/report.py runs/ -o report.html")
    study = read_study([user_path(path) for path in s.runs], s.pool_grids)
    for name, reason in study.left_out:
        logger.warning("left out %s: %s", name, reason)
    methods = set(study.rows["method"]) - {""}
    if s.baseline:
        wanted = METHOD_ALIASES.get(s.baseline, s.baseline)
        check_choice("baseline", wanted, sorted(methods | set(study.rows["name"])))
    path = user_path(s.archive or s.output or "report" + FORMATS[s.format])
    if s.archive:
        pack(study, s, path)
    elif s.format == "csv":
        write(path, long_form(study.rows).to_csv(index=False))
    else:
        write(path, render_page(study, s) if s.format == "html" else render_tables(study, s))
    print(f"{len(study.runs)} runs, {len(study.left_out)} left out, {len(study.failed)} failed: {path}")


def pack(study: Study, settings: ReportSettings, path: Path) -> None:
    """The runs as an archive, and their numbers as a table of the same name.

    Raises:
        InputError: not one folder of runs, or the name of something else.
    """
    folder = user_path(settings.runs[0])
    if len(settings.runs) > 1 or not folder.is_dir() or any(run.folder == folder for run in study.runs.values()):
        raise InputError(f"--archive packs one folder of runs, not {', '.join(settings.runs)}: give that folder")
    if path.suffix != ".zip":
        raise InputError(f"--archive is {settings.archive}, expected a name that ends in .zip")
    write(path.with_suffix(".csv"), long_form(study.rows).to_csv(index=False))
    write_archive(folder, [run.folder.name for run in study.runs.values()], path)


def write(path: Path, text: str) -> None:
    """A file in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text)


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 input that cannot be used)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    run_command(lambda: report(read_command(ReportSettings, __doc__)))


if __name__ == "__main__":
    main()
