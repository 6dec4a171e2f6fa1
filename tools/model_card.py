"""The model card of a published backbone: what a run knows about itself, as Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from medmnist import INFO
from torch import nn

from amimv.models.backbones import BackboneSpec, feature_width, timm_note
from amimv.pipelines.names import LABEL_SAMPLERS
from amimv.pipelines.sources.npz import medmnist_names
from amimv.tools.report import ReportSettings, build_part, split_parts
from amimv.tools.report_page.runs import Study, command_of, read_environment, read_study
from amimv.tools.report_page.tables import describe_subset
from amimv.trainers.checkpoints import JsonLines
from amimv.trainers.layers import from_yaml
from amimv.trainers.run_folder import PACKAGES
from amimv.trainers.settings import PretrainSettings

#: Columns of the report's table that a single run does without.
LEFT_OUT = ("validation: ", "seeds")


def write_card(run: Path, network: nn.Module, spec: BackboneSpec, pushed: str, name: str) -> str:
    """The card.

    Args:
        run: its folder.
        network, spec: the backbone.
        pushed: its name at the hub; empty if it stays here.
        name: of the folder that the card is for.

    Raises:
        InputError: the run's settings or results cannot be read.
    """
    settings, environment = from_yaml(run / "config.yaml"), read_environment(run)
    study = read_study([run]) if (run / "results.csv").is_file() else None
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md.jinja")
    return template.render(
        title=pushed or name,
        source=f"hf-hub:{pushed}" if pushed else f"local-dir:{name}" if not timm_note(spec) else name,
        spec=spec,
        note=timm_note(spec),
        parameters=f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M",
        width=feature_width(network),
        range=tuple(f"{value:g}" for value in spec.value_range or (0, 255)),
        settings=settings,
        labelled=_labelled(settings),
        initial=environment.get("init"),
        steps=f"{trained_steps(run):,}",
        environment={"revision": ""} | environment,
        version=environment.get("amimv", ""),
        packages=_versions(environment),
        seconds=_seconds(environment),
        command=command_of(environment),
        config=(run / "config.yaml").read_text().strip(),
        parts=[_part(rows, study) for rows in split_parts(study.rows)] if study else [],
        **_about_data(settings, environment, study),
    )


def _about_data(settings: PretrainSettings, environment: Mapping[str, Any], study: Study | None) -> dict[str, Any]:
    counts, ratio = environment.get("training_counts") or [], environment.get("realised_ratio")
    row = {"profile": "indices" if settings.indices else settings.profile, "rho": settings.rho}
    images = environment.get("training_images")
    row["total"] = images if settings.indices else settings.total or 0
    return {
        "data": study.rows["data"].iloc[0].removesuffix(" (synthetic)") if study else settings.data,
        "synthetic": settings.data == "phantom",
        "images": "unknown many" if images is None else f"{images:,}",
        "task": environment.get("task", ""),
        "subset": describe_subset(row),
        "counts": ", ".join(f"{count:,}" for count in counts),
        "ratio": "" if ratio is None else f"{ratio:.1f}",
        "licence": data_licence(settings.data),
    }


def data_licence(data: str) -> str:
    """Of a data set, by the name that the run gave it."""
    if data == "phantom":
        return "none is needed, since a program draws the images"
    if data in medmnist_names():
        return f"{INFO[data]['license']}, by MedMNIST's own list"
    return "unknown to this card; ask where the images come from"


def trained_steps(run: Path) -> int:
    """The last optimiser step that the run logged."""
    path = run / "metrics.jsonl"
    rows = JsonLines(path).read() if path.is_file() else []
    return max((row["step"] for row in rows), default=0)


def _labelled(settings: PretrainSettings) -> str:
    """The samplers that read labels, for a sentence; empty if none did."""
    given = {"sampler": settings.sampler, "partner": settings.partner}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value in LABEL_SAMPLERS)


def _versions(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages") or {}
    return [(name, packages[name]) for name in PACKAGES if packages.get(name, "not installed") != "not installed"]


def _seconds(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:,.0f} s" for name, value in (environment.get("wall_seconds") or {}).items())


def _part(rows: Any, study: Study) -> dict[str, Any]:
    """The verdict and the table of one label fraction, as the report has them."""
    part = build_part(rows, study, ReportSettings(()))
    texts = part.table.texts[[column for column in part.table.texts if not column.startswith(LEFT_OUT)]]
    table = str(texts.to_markdown(disable_numparse=True))
    return {"title": part.table.title, "verdict": part.verdict, "table": table, "notes": part.table.notes}
