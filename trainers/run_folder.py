"""What a run leaves behind besides its results: settings, environment and curves."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from amimv import InputError, __version__, user_path
from amimv.fields import EVALUATION, NOTHING
from amimv.files import locked, replacing
from amimv.pipelines import save_indices
from amimv.pipelines.names import CSV, FOLDER
from amimv.trainers.conditions import RANDOM
from amimv.trainers.identity import check_data
from amimv.trainers.layers import from_yaml, to_yaml
from amimv.trainers.settings import PretrainSettings, that_touch

LOCK = "lock"
PACKAGES = [
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "kornia",
    "nvidia-dali-cuda130",
    "medmnist",
    "numpy",
    "scikit-learn",
    "safetensors",
]


def revision() -> str:
    """The git revision of the code, with ``+`` if it was changed since; of an installed package its version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    inside_package = (Path(__file__).resolve().parents[1] / "pyproject.toml").is_file()
    return found.stdout.strip() if inside_package else __version__


def default_name(settings: PretrainSettings) -> str:
    """A folder name that tells the settings one looks for first, in letters that every file system and shell takes."""
    s = settings
    start = "" if s.init == RANDOM else f"-from-{_plain(s.init, 40)}"
    return f"{name_data(s)}-{s.method}-{_plain(s.recipe)}-{_plain(s.backbone)}{start}-seed{s.seed}"


def name_data(settings: PretrainSettings) -> str:
    """The training images, for names of files: the data set, its size, whether it is split anew, its long tail."""
    s = settings
    data = _file_name(s.data) + (f"-{s.size}px" if s.size not in (None, 28) else "")
    data += "-resplit" if s.resplit else ""
    rho = f"{s.rho:g}" if float(f"{s.rho:g}") == s.rho else repr(s.rho)
    tail = "-natural" if s.profile == "natural" else f"-rho{rho.replace('+', '')}" if s.rho != 1 or s.total else ""
    tail += f"-n{s.total}" if s.total else ""
    return f"{data}{tail}" + ("-indices" if s.indices else "")


def name_evaluation(settings: PretrainSettings) -> str:
    """`name_data`, with what does not stand in a run's name: the seed of the data, the shares and seed of a split."""
    s = settings
    seed = f"-dataseed{s.data_seed}" if s.data_seed else ""
    split = f"-split-{'-'.join(map(str, s.split))}-seed{s.split_seed}" if s.split else ""
    return name_data(s) + seed + split


def _file_name(data: str) -> str:
    """The data set in a file's name: a file without its suffix, a folder with all that its name holds."""
    if data.startswith(FOLDER):
        return "folder-" + _plain(os.path.basename(os.path.abspath(user_path(data.removeprefix(FOLDER)))))
    if data.startswith(CSV):
        return "csv-" + _plain(user_path(data.removeprefix(CSV)).stem)
    return _plain(Path(data).name.removesuffix(".npz"))


def _plain(text: str, most: int = 80) -> str:
    """Letters, digits, ``.``, ``_`` and ``-`` alone; what that changes gets a hash, which tells it from others."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:most]
    if plain == text:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
    return f"{plain}-{digest}" if plain else digest


def run_path(settings: PretrainSettings) -> Path:
    """The run's folder."""
    return Path(settings.output) / (settings.name or default_name(settings))


def lock_run(folder: Path) -> AbstractContextManager[int]:
    """Keeps other processes out of a run's folder, which is made; refuses if one is in there."""
    return locked(folder / LOCK, f"{folder} is in use: wait for the process there to end, or give another name")


def holds_run(folder: Path) -> bool:
    """Whether there is something to go on with, or to lose: a checkpoint, a logged step or a result."""
    metrics = folder / "metrics.jsonl"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or any((folder / "checkpoints").glob("step-*.pt")) or (folder / "results.csv").exists()


def find_run(settings: PretrainSettings) -> bool:
    """Whether the run's folder holds an earlier start of the run. A start that failed before its first step was logged
    is none, and its folder is free. Nothing is written.

    Raises:
        InputError: if the folder holds a run and ``resume`` is not ``auto``, a run with other settings, or else.
    """
    folder = run_path(settings)
    config = folder / "config.yaml"
    if not config.exists():
        if folder.is_dir() and any(p.name != LOCK and p.suffix != ".partial" for p in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run: give another --name or --output")
        return False
    earlier = from_yaml(config)  # a file of that name that is none of ours is left alone
    if not holds_run(folder):
        return False
    if settings.resume != "auto":
        raise InputError(f"{folder} holds a run already: add --resume auto to go on with it, or give another --name")
    if type(earlier) is not type(settings):
        raise InputError(f"{folder} was run with method {earlier.method}, not {settings.method}: give another --name")
    free = that_touch(EVALUATION, NOTHING)
    for field, value in vars(settings).items():
        before = getattr(earlier, field)
        if field not in free and before != value:
            way = "resume with the same settings, or give another --name"
            if field in ("epochs", "steps") and 0 < before < value:
                way = f"its schedule ends there; to train longer: {_longer(folder, field, value - before)}"
            raise InputError(f"{folder} was run with {field} {before!r}, not {value!r}: {way}")
    return True


def _longer(folder: Path, length: str, more: int) -> str:
    """The command for a run from another one's weights, with a schedule of its own."""
    words = ["pretrain.py", "--config", str(folder / "config.yaml"), "--init", str(folder)]
    return shlex.join([*words, f"--{length}", str(more), "--name", f"{folder.name}-longer"])


def begin_run(
    folder: Path, settings: PretrainSettings, sources: dict[str, str], data: dict[str, Any], indices: torch.Tensor
) -> None:
    """What stands in the folder before the first step: settings, digests of the data, the training subset."""
    (folder / "not_finite.json").unlink(missing_ok=True)  # of a start that failed
    with replacing(folder / "config.yaml") as file:
        file.write(to_yaml(settings, sources))
    write_json(folder / "data.json", data)
    save_indices(folder / "train_indices.npy", indices)


def go_on(folder: Path, data: dict[str, Any]) -> None:
    """Hold the data against those that the run began with; splits that are new to it are noted.

    Raises:
        InputError: the data have changed.
    """
    if (record := check_data(folder, data)) is not None:
        write_json(folder / "data.json", record)


def describe_environment(extra: dict[str, Any]) -> dict[str, Any]:
    """Versions, machine and whatever else is given, ready for JSON."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "amimv": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "packages": packages,
        **extra,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


def draw_curves(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Loss by step, and kNN on the validation split and RankMe where they were measured, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses, knn, ranks = (
        [(row["step"], row[name]) for row in metrics if name in row] for name in ("loss", "knn_val", "rankme")
    )
    panels = 2 if ranks else 1
    figure, axes = pyplot.subplots(panels, figsize=(7, 3 + panels), sharex=True, squeeze=False, layout="constrained")
    top, bottom = axes[0, 0], axes[-1, 0]
    top.set(title=title)
    bottom.set(xlabel="optimiser step")
    if ranks:
        bottom.plot(*zip(*ranks, strict=True), color="tab:green", marker="o", markersize=3)
        bottom.set_ylabel("RankMe", color="tab:green")
    if losses:
        top.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=0.8)
    top.set_ylabel("loss", color="tab:blue")
    if knn:
        right = top.twinx()
        steps, values = zip(*knn, strict=True)
        right.plot(steps, [100 * value for value in values], color="tab:orange", marker="o", markersize=3)
        right.set_ylabel("kNN balanced accuracy on val (%)", color="tab:orange")
    with replacing(path, "wb") as file:
        figure.savefig(file, dpi=120)
    pyplot.close(figure)
