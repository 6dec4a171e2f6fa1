"""The run folder: opened once, gone on with only by the same settings, never overwritten."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import pytest
import torch

from amimv import InputError, __version__
from amimv.pipelines.recipes import ALIASES
from amimv.trainers.layers import from_yaml, resolve
from amimv.trainers.run_folder import (
    PACKAGES,
    begin_run,
    default_name,
    describe_environment,
    draw_curves,
    find_run,
    lock_run,
    revision,
    run_path,
    write_json,
)


def start(folder: Path, *flags: str) -> tuple[Path, bool]:
    """The run's folder, begun unless there is a run to go on with."""
    settings, sources = resolve(["--output", str(folder), *flags])
    path, again = run_path(settings), find_run(settings)
    if not again:
        path.mkdir(parents=True, exist_ok=True)
        begin_run(path, settings, sources, {}, torch.arange(3))
    return path, again


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run named r with some results."""
    folder, _ = start(tmp_path, "--name", "r")
    (folder / "results.csv").write_text("run\nr\n")
    return folder


def refused(root: Path, *flags: str) -> str:
    """Opening fails in one line, and no file has changed."""
    before = content(root)
    with pytest.raises(InputError) as caught:
        start(root, *flags)
    assert content(root) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_gets_a_folder_with_its_config(tmp_path: Path) -> None:
    settings, sources = resolve(["--output", str(tmp_path / "deep" / "runs"), "--name", "r"])
    folder = tmp_path / "deep" / "runs" / "r"
    assert not find_run(settings)
    assert not folder.exists(), "a look writes nothing"
    with lock_run(folder):
        assert not find_run(settings)
        begin_run(folder, settings, sources, {}, torch.arange(3))
    assert from_yaml(folder / "config.yaml") == settings


def test_an_empty_folder_and_resume_auto_without_a_run_are_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    assert start(tmp_path, "--name", "r", "--resume", "auto") == (tmp_path / "r", False)


def test_an_existing_run_is_not_run_over(earlier: Path) -> None:
    message = refused(earlier.parent, "--name", "r")
    assert "--resume auto" in message


def test_resume_goes_on_and_free_settings_may_change(earlier: Path) -> None:
    before = content(earlier)
    flags = (
        "--name",
        "r",
        "--resume",
        "auto",
        "--log-every",
        "3",
        "--save-every",
        "7",
        "--no-evaluate",
        "--root",
        "x",
    )
    assert start(earlier.parent, *flags) == (earlier, True)
    assert content(earlier) == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lr", "0.5"), "lr 0.005, not 0.5"),
        (("--seed", "1"), "seed 0, not 1"),
        (("--temperature", "0.5"), "temperature 0.3, not 0.5"),
        (("--recipe", "mimv"), f"recipe '{ALIASES['amimv']}', not 'mimv'"),
        (("--method", "simclr"), "method mimv, not simclr"),
    ],
)
def test_resume_with_other_settings_is_refused(earlier: Path, flags: tuple[str, ...], named: str) -> None:
    assert named in refused(earlier.parent, "--name", "r", "--resume", "auto", *flags)


def test_a_longer_training_is_another_schedule(earlier: Path) -> None:
    """The command for it stands in the line, with what is left to train; a shorter one has none."""
    folder, steps = earlier.parent / "r", from_yaml(earlier / "config.yaml").steps
    line = refused(earlier.parent, "--name", "r", "--resume", "auto", "--steps", str(steps + 30))
    assert f"was run with steps {steps}, not {steps + 30}: its schedule ends there" in line
    words = f"pretrain.py --config {folder}/config.yaml --init {folder} --steps 30 --name r-longer"
    assert line.endswith(": " + words)
    assert "--init" not in refused(earlier.parent, "--name", "r", "--resume", "auto", "--steps", "1")


@pytest.mark.parametrize("flags", [(), ("--resume", "auto")])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    assert "holds no run" in refused(tmp_path, "--name", "r", *flags)


def test_default_name_tells_what_one_looks_for() -> None:
    assert default_name(resolve([])[0]) == f"phantom-mimv-{ALIASES['amimv']}-small-seed0"
    flags = ["--data", "some/where/own.npz", "--size", "64", "--rho", "100", "--method", "simclr", "--seed", "3"]
    assert default_name(resolve(flags)[0]) == "own-64px-rho100-simclr-two-view-small-seed3"


def test_environment_names_versions_and_is_json(tmp_path: Path) -> None:
    found = describe_environment({"processes": 2})
    assert set(found["packages"]) == set(PACKAGES)
    for name in ("torch", "timm", "accelerate", "kornia", "numpy", "medmnist"):
        assert found["packages"][name] == version(name)
    assert found["amimv"] == __version__
    assert found["revision"] == revision() != ""
    assert (found["python"], found["processes"]) == (platform.python_version(), 2)
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    write_json(tmp_path / "e.json", found)
    assert json.loads((tmp_path / "e.json").read_text()) == found


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "e.json", {"x": float("nan")})


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "knn_val": 0.4}],
        [{"step": 2, "knn_val": 0.4}],
    ],
)
def test_curves_are_a_picture(tmp_path: Path, metrics: list[dict[str, float]]) -> None:
    draw_curves(metrics, "title", tmp_path / "curves.png")
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (480, 840)
    assert picture[..., :3].std() > 0.01


def test_curves_show_what_they_are_given(tmp_path: Path) -> None:
    loss = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    draw_curves(loss, "t", tmp_path / "loss.png")
    draw_curves([*loss, {"step": 1, "knn_val": 0.3}, {"step": 2, "knn_val": 0.4}], "t", tmp_path / "both.png")
    without, both = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("loss.png", "both.png"))

    def orange(picture: object) -> int:
        red, green, blue = (picture[..., c] for c in range(3))  # type: ignore[index]
        return int(((red > 0.9) & (green > 0.4) & (green < 0.6) & (blue < 0.2)).sum())

    assert orange(without) == 0
    assert orange(both) > 50
