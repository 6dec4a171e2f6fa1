"""One page about all runs of a folder: ``python tools/report.py runs/study -o report.html``.

Tables of every data set, imbalance and share of labels beside their baselines, paired bootstrap intervals against a
reference, what imbalance costs, what samplers gain, and the command, settings and versions behind each number. The
page needs no network. ``--format md | csv | latex`` write the main tables alone; ``--archive study.zip`` packs the
runs into one file, which is read as their folder is.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import pandas as pd
import tyro

from amimv import InputError, check_choice, run_command, user_path
from amimv.files import replacing
from amimv.tools.report_page.archive import write_archive
from amimv.tools.report_page.figures import (
    Picture,
    draw_confusions,
    draw_projections,
    draw_recalls,
    draw_robustness,
)
from amimv.tools.report_page.runs import Run, Study, read_study
from amimv.tools.report_page.tables import (
    PROBES,
    Table,
    describe_subset,
    difference_table,
    drop_table,
    find_reference,
    gain_table,
    long_form,
    main_table,
    percent,
    pick,
    stored,
    with_fixed_tail,
)

logger = logging.getLogger("amimv")

#: Marks of what is bold in LaTeX until all else is escaped: characters that no name has.
BOLD = "\x02{}\x03"
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$"}
)
FORMATS = {"html": ".html", "md": ".md", "csv": ".csv", "latex": ".tex"}


@dataclass(frozen=True)
class ReportSettings:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of run folders, archives of such, or run folders"""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """the file; empty: report.html, report.md, report.csv or report.tex"""
    format: str = "html"
    """html, or the main tables alone as md, csv or latex"""
    baseline: str = "amimv"
    """method, or row of a table, that others are compared with; amimv: the first method where it was not run"""
    probe: str = "knn"
    """whose accuracy, AUC and so on are shown, and whose figures: knn, linear or fine-tuned"""
    pool_grids: bool = False
    """what several grids say about the same images into one table, as for an ablation"""
    archive: str = ""
    """instead of a page: pack the folder's runs into this .zip, with their numbers as .csv beside it"""


@dataclass(frozen=True)
class Part:
    """One subset and label fraction: its main table, and the differences from the reference."""

    main: Table
    differences: Table | None


@dataclass(frozen=True)
class DataSection:
    """What one grid says about one data set."""

    name: str
    anchor: str
    sentences: tuple[str, ...]
    parts: tuple[Part, ...]
    drops: tuple[Table, ...]
    gains: tuple[Table, ...]
    robustness: tuple[Picture, ...]
    recalls: Picture | None
    confusions: Picture | None
    projections: Picture | None


def split_parts(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The results of each subset and label fraction, from balanced to skewed and from few labels to all."""
    keys = ["grid", "data", "profile", "total", "rho", "label_fraction"]
    for _, part in rows.groupby(keys, sort=True):
        yield part


def describe_test(rows: pd.DataFrame, study: Study) -> tuple[str, ...]:
    """How much the size of the test set lets one tell; nothing where it is unknown."""
    found: Any = next((one for _, row in rows.iterrows() if (one := stored(row.to_frame().T, study))), None)
    if not found or found[0][0].labels.ndim != 1:
        return ()
    labels = found[0][0].labels
    counts = np.unique(labels, return_counts=True)[1]
    whole, balanced = 50 / math.sqrt(len(labels)), 50 * math.sqrt((1 / counts).sum()) / len(counts)
    return (
        f"{len(labels):,} test images: one standard error of an accuracy near 50 % is {whole:.1f} points, and of a "
        f"balanced accuracy with every recall near 50 %, {balanced:.1f} points (the smallest class has "
        f"{counts.min():,} test images).",
    )


def best_by_val(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each method its row with the highest mean on the validation split, and the baselines."""
    means = rows[~rows["baseline"]].groupby(["method", "name"], sort=False)["val_balanced_accuracy"].mean()
    best = [names.fillna(-1).idxmax()[1] for _, names in means.groupby(level="method", sort=False)]
    return rows[rows["baseline"] | rows["name"].isin(best)]


def build_data(rows: pd.DataFrame, study: Study, settings: ReportSettings, anchor: str) -> DataSection:
    """All about the results of one grid and data set."""
    probe = settings.probe
    name = str(rows["data"].iloc[0])
    parts = tuple(
        Part(main_table(part, study.runs, probe), difference_table(part, study, settings.baseline))
        for part in split_parts(rows)
    )
    gains = [gain_table(part, probe) for part in split_parts(rows)]
    drops, robustness = [], []
    for _, part in pick(rows, probe).groupby(["profile", "total", "label_fraction"], sort=True):
        if part["rho"].nunique() > 1:
            part = with_fixed_tail(part, study)
            labels = percent(part["label_fraction"].iloc[0])
            drops.append(drop_table(part, probe))
            profile, total = part["profile"].iloc[0], part["total"].iloc[0]
            of = f"{profile}, {total:,.0f} images" if total else f"{profile}, classes capped"
            robustness.append(draw_robustness(part, f"{name} ({of}), {PROBES[probe][0]}, {labels} of the labels"))
    # The hardest setting with all labels stands for all in the pictures of single classes.
    last = rows[rows["label_fraction"] == rows["label_fraction"].max()]
    last = last[last["rho"] == last["rho"].max()]
    last = next(part for _, part in last.groupby(["profile", "total"], sort=True))
    title = f"{name}, {describe_subset(last.iloc[0])}, {percent(last['label_fraction'].iloc[0])} of the labels"
    picked, best = pick(last, probe), best_by_val(pick(last, probe))
    return DataSection(
        name,
        anchor,
        describe_test(rows, study),
        parts,
        tuple(drops),
        tuple(table for table in gains if table),
        tuple(robustness),
        draw_recalls(best, study, f"{title}, {PROBES[probe][0]}"),
        draw_confusions(best, study, f"{title}, {PROBES[probe][0]}"),
        draw_projections(picked, study, title),
    )


def describe_run(run: Run, environments: dict[str, str]) -> dict[str, Any]:
    """What the page says about a run; equal package versions are told once, by a letter."""
    e = run.environment
    packages = e.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    versions = f"Python {e['python']}, {versions}" if versions and "python" in e else versions
    seconds = e.get("wall_seconds")
    seconds = seconds if isinstance(seconds, dict) else {}
    wall = ", ".join(f"{k} {v:,.0f} s" for k, v in seconds.items() if isinstance(v, int | float))
    counts = e.get("training_counts")
    counts = counts if isinstance(counts, list) else []
    return {
        "name": run.folder.name,
        "anchor": run.anchor,
        "command": run.command,
        "config": run.config_text,
        "revision": e.get("revision", ""),
        "wall": wall,
        "machine": f"{e.get('gpu') or e.get('device', '')}, {e.get('threads', '?')} threads" if e else "",
        "counts": ", ".join(map(str, counts)),
        "versions": environments.setdefault(versions, f"E{len(environments) + 1}") if versions else "",
    }


def render_page(study: Study, settings: ReportSettings) -> str:
    """The whole page."""
    rows = study.rows
    grids: dict[str, list[DataSection]] = {}
    for number, ((grid, _), own) in enumerate(rows.groupby(["grid", "data"], sort=False)):
        grids.setdefault(str(grid), []).append(build_data(own, study, settings, f"data-{number}"))
    environments: dict[str, str] = {}
    described = [describe_run(run, environments) for run in study.runs.values()]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "report_page")
    template = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.jinja")
    return template.render(
        grids=grids,
        study=study,
        data=list(dict.fromkeys(rows["data"])),
        seeds=sorted({int(seed) for seed in rows["seed"]}),
        synthetic=rows["data"].str.contains("(synthetic)", regex=False).any(),
        probe=PROBES[settings.probe][0],
        runs=described,
        environments=environments,
    )


def to_frame(table: Table, bold: str = "{}") -> pd.DataFrame:
    """A table as text, with its best values in bold."""
    lines = [[bold.format(c.text) if c.best else c.text for c in row.cells] for row in table.rows]
    return pd.DataFrame(lines, columns=list(table.columns), index=pd.Index([row.name for row in table.rows]))


def render_tables(study: Study, settings: ReportSettings) -> str:
    """The main tables alone, as Markdown or LaTeX (which needs ``booktabs``)."""
    written = []
    for part in split_parts(study.rows):
        table = main_table(part, study.runs, settings.probe)
        grid = f"{part['grid'].iloc[0]}: " if part["grid"].iloc[0] else ""
        title = f"{grid}{part['data'].iloc[0]}, {table.title}; test split, %, mean ± std over seeds"
        if settings.format == "md":
            text = to_frame(table, "**{}**").to_markdown(disable_numparse=True)
            written.append("\n\n".join([f"### {title}", text, *table.notes]))
            continue
        frame = to_frame(table, BOLD).rename(columns=_escape, index=_escape)
        form = "l" + "r" * len(table.columns)
        text = frame.to_latex(escape=False, column_format=form, caption=_escape(title)).replace("±", r"$\pm$")
        written.append(text.replace(BOLD[0], r"\textbf{").replace(BOLD[-1], "}"))
    return "\n\n".join(written) + "\n"


def _escape(text: str) -> str:
    return text.translate(LATEX)


def report(settings: ReportSettings) -> None:
    """Read the runs and write the file.

    Raises:
        InputError: nothing to report on, or an unknown format, probe or baseline.
    """
    s = settings
    check_choice("format", s.format, FORMATS)
    check_choice("probe", s.probe, PROBES)
    if not s.runs:
        raise InputError("no folder of runs is given: python tools/report.py runs/ -o report.html")
    study = read_study([user_path(path) for path in s.runs], s.pool_grids)
    for name, reason in study.left_out:
        logger.warning("left out %s: %s", name, reason)
    if not any(find_reference(part, s.baseline) for part in split_parts(study.rows)) and s.baseline != "amimv":
        own = study.rows[~study.rows["baseline"]]
        check_choice("baseline", s.baseline, sorted({*own["method"], *study.rows["name"]}))
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
    run_command(lambda: report(tyro.cli(ReportSettings, prog="report.py", description=__doc__)))


if __name__ == "__main__":
    main()
