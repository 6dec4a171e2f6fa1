"""Settings of the tools' commands, which are read before torch is loaded."""

from dataclasses import MISSING, dataclass
from typing import Annotated

import tyro

from amimv import InputError, user_path
from amimv.command_line import shown_as
from amimv.fields import SEED, check_settings, setting
from amimv.pipelines.names import BACKENDS, SAMPLERS
from amimv.pipelines.recipes import get_recipe
from amimv.pipelines.sources.listing import SPLITS
from amimv.trainers.commands import is_run
from amimv.trainers.data_settings import DataSettings
from amimv.trainers.layers import check_preset
from amimv.trainers.settings import settings_class

#: Of a report, and the ends of their files' names.
FORMATS = {"html": ".html", "md": ".md", "csv": ".csv", "latex": ".tex"}


def _check_columns(value: str) -> None:
    from amimv.tools.columns import check_kind

    check_kind(user_path(value))


@dataclass(frozen=True)
class ShowSettings:
    data: str = setting("phantom", "phantom, a 2-D MedMNIST name or the path of an .npz")
    recipe: str = setting("amimv", "amimv, two-view, multi-crop, mimv, ...", check=get_recipe)
    sampler: str = setting("class-balanced", "of the anchors", choices=SAMPLERS)
    partners: int = setting(1, "partner images per anchor", 1)
    preset: str = setting("auto", "whose augmentation: small, dermatoscopy, none or auto", check=check_preset)
    size: int | None = setting(None, "of the images, in pixels; unset: 28, or what an .npz has", 1)
    root: str | None = setting(None, "folder of MedMNIST's files")
    backend: str = setting("kornia", "what renders the views", choices=BACKENDS)
    rows: int = setting(6, "anchors shown", 1)
    seed: int = setting(0, "of the pairs", *SEED)
    output: str = setting("views.png", "the picture")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ProfileSettings:
    data: str = setting("phantom", "phantom, a 2-D MedMNIST name, the path of an .npz, or folder:PATH")
    root: str | None = setting(None, "folder of MedMNIST's files")
    images: int | None = setting(
        None,
        "of the data, repeated to so many, over which an epoch's own cost is spread; unset: as many as there are",
        1,
    )
    sizes: tuple[int, ...] = setting((28,), "of the images, in pixels", 1)
    batch_sizes: tuple[int, ...] = setting((256,), "images per batch", 1)
    recipes: tuple[str, ...] = setting(("two-view", "amimv"), "what a batch of this package is made of")
    backends: tuple[str, ...] = setting(BACKENDS, "of this package", choices=BACKENDS, called="backend")
    rivals: bool = setting(True, "measure what people use today, too (in a checkout only)")
    repeats: int = setting(7, "timed repeats of each row; median and quartiles are shown", 1)
    seconds: float = setting(1.0, "length of a repeat, at least")
    device: str = setting("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    compile: bool = setting(
        False, "render and train through torch.compile (CUDA graphs on a GPU); adds rows to the table"
    )
    stages: bool = setting(False, "where the time of a batch goes")
    trace: str | None = setting(None, "with --stages: file for a Chrome trace of the first recipe")
    train: bool = setting(False, "where the time of a training step goes")
    method: str = setting("simclr", "with --train", check=settings_class)
    backbone: str = setting("small", "with --train")
    mixed_precision: str = setting("no", "with --train", choices=("no", "bf16", "fp16"))
    scale: bool = setting(
        False, "cost against batch size, image size, data set size and slots; memory over 200 epochs"
    )
    plot: str | None = setting(None, "with --scale: file for the plot")
    json: str | None = setting(None, "file for everything measured")

    def __post_init__(self) -> None:
        check_settings(self)
        others_only = self.rivals and not self.train
        for name in ("sizes", "batch_sizes", "recipes", "backends"):
            if not getattr(self, name) and not (name == "backends" and others_only):
                raise InputError(f"no {name.replace('_', ' ')} to measure: give at least one")
        for recipe in self.recipes:
            get_recipe(recipe)
        for flag, needed in (("trace", "stages"), ("plot", "scale")):
            if getattr(self, flag) and not getattr(self, needed):
                raise InputError(f"--{flag} is written by --{needed}: give both")


@dataclass(frozen=True)
class CheckSettings:
    json: str = setting("gpu.json", "file for everything found")
    steps: tuple[str, ...] = setting((), "what is done; everything, if none is named")
    device: str = setting("cuda", "cpu is for trying this command out", choices=("cuda", "cpu"))
    quick: bool = setting(False, "few steps, and tiny, for trying this command out: its numbers mean nothing")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ReportSettings:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = setting(
        MISSING, "folders of run folders, archives of such, or run folders"
    )
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = setting(
        None, "the file; unset: report.html, report.md, report.csv or report.tex"
    )
    format: str = setting(
        "html", "html, or words and tables as md, numbers as csv, the main tables as latex", choices=tuple(FORMATS)
    )
    baseline: str | None = setting(
        None, "method, or row of a table, that others are compared with; unset: the one that validation scores choose"
    )
    probe: str | None = setting(
        None,
        "by which all are judged; unset: each by the one that its validation scores choose",
        choices=("knn", "linear", "fine-tuned"),
    )
    pool_grids: bool = setting(
        False, "what several grids say about the same images into one table, as for an ablation"
    )
    archive: str | None = setting(
        None, "instead of a page: pack the folder's runs into this .zip, with their numbers as .csv beside it"
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class PublishSettings:
    run: Annotated[str, tyro.conf.Positional] = setting(MISSING, "folder of a run, with its config.yaml and backbone/")
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = setting(MISSING, "the folder to write")
    push: str | None = setting(
        None,
        "name at the Hugging Face hub, such as ME/NAME, to upload the folder to; it needs a token (hf auth login)",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class EmbedSettings:
    run: Annotated[str, tyro.conf.Positional] = setting(
        MISSING, "folder of a run, or of an exported backbone, or hf-hub:NAME"
    )
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = setting(
        MISSING, "the file to write, .parquet or .npz", check=_check_columns
    )
    splits: tuple[str, ...] = setting((), "which; none given: all that there are", choices=SPLITS, called="split")
    predict: str = setting(
        "no",
        "what a probe says of each image, too: nearest neighbours, or a linear classifier",
        choices=("no", "knn", "linear"),
        called="probe",
    )
    labels: str = setting(
        "auto",
        "whose training labels it learns from: the run's, or those of the data; auto: the run's, if there is a run",
        choices=("auto", "run", "data"),
    )
    nearest: int = setting(5, "training images that are named for each image", 1)
    batch_size: int = setting(256, "images at a time, and rows of a row group", 1)
    images: DataSettings = setting(shown_as(DataSettings)(data=""), "the data, with the flags of pretrain.py")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.images.data:
            raise InputError("no data: give --data, such as folder:PATH")
        if self.labels == "run" and not is_run(self.run):
            raise InputError(f"{self.run} holds no run, whose labels could be learnt from: leave --labels out")
