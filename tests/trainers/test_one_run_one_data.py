"""A run folder belongs to its data, to one process, and to nobody before the first step; full disks cost one line."""

import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from amimv import EXIT_BAD_INPUT, EXIT_IO
from amimv.files import locked, replacing
from amimv.pipelines import load_store
from amimv.trainers import checkpoints, evaluate, loop, pretrain
from amimv.trainers.identity import find_difference, identify
from amimv.trainers.run_folder import holds_run

SIZES = {"train": 24, "val": 8, "test": 8}


def write_npz(path: Path, **changed: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0)
    arrays = {f"{s}_images": pixels.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8) for s, n in SIZES.items()}
    labels = {f"{s}_labels": np.arange(n) % 2 for s, n in SIZES.items()}
    np.savez(path, **(arrays | labels | changed))
    return path


def write_folder(path: Path) -> Path:
    pixels = np.random.default_rng(0)
    for split, n in SIZES.items():
        for i in range(n):
            file = path / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(file)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """Run a command in this process: its status and its own error lines."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, module: object = pretrain) -> tuple[int, list[str]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        if module is pretrain:
            flags = ("--batch-size", "8", "--steps", "4", "--save-every", "2", "--supervised-steps", "0", *flags)
            flags = (*flags, "--name", "r", "--knn-every", "0")
        monkeypatch.setattr(sys, "argv", ["command", *flags])
        status = 0
        try:
            module.main()  # type: ignore[attr-defined]
        except SystemExit as end:
            status = int(end.code or 0)
        return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The data of a run


def test_every_part_of_the_data_counts(tmp_path: Path) -> None:
    first = identify(load_store(write_npz(tmp_path / "a.npz")))
    assert find_difference({"train": first}, {"train": identify(load_store(write_npz(tmp_path / "b.npz")))}) == ""
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28, 3), dtype=np.uint8)
    images[23, 27, 27, 2] ^= 1
    cases = {
        "pixels": {"train_images": images},
        "labels": {"train_labels": (np.arange(24) + 1) % 2},
        "24 now, 23 when": {"train_images": images[:23], "train_labels": np.arange(23) % 2},
    }
    for said, changed in cases.items():
        other = identify(load_store(write_npz(tmp_path / "c.npz", **changed)))
        assert said in find_difference({"train": first}, {"train": other})
    store = load_store(tmp_path / "a.npz")
    parts = [{"train": identify(store.subset(i), i)} for i in (torch.arange(8), torch.arange(8) + 8)]
    assert find_difference(*parts)


def test_a_run_is_gone_on_with_and_evaluated_on_its_own_data_only(tmp_path: Path, call: Callable[..., tuple]) -> None:
    write_npz(tmp_path / "one" / "own.npz")
    write_npz(tmp_path / "two" / "own.npz", val_labels=np.arange(8) // 4)
    assert call("--data", "own.npz", "--root", "one")[0] == 0
    before = content(tmp_path / "runs")
    for module, flags in ((pretrain, ("--data", "own.npz", "--resume", "auto")), (evaluate, ("runs/r",))):
        status, (line,) = call(*flags, "--root", "two", module=module)
        assert status == EXIT_BAD_INPUT
        assert "labels of the validation images" in line
        assert content(tmp_path / "runs") == before
    (tmp_path / "runs" / "r" / "data.json").unlink()  # as an older version left it
    assert call("--data", "own.npz", "--resume", "auto", "--root", "two")[0] == 0
    assert call("runs/r", module=evaluate)[0] == 0


def test_files_that_are_gone_or_changed(tmp_path: Path, call: Callable[..., tuple]) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    folder = write_folder(tmp_path / "images")
    flags = ("--data", f"folder:{folder}", "--size", "28", "--no-evaluate")
    assert call(*flags)[0] == 0
    assert json.loads((tmp_path / "runs" / "r" / "data.json").read_text()).keys() == {"train"}
    before = content(tmp_path / "runs")
    gone = folder / "train" / "a" / "0.png"
    whole = gone.read_bytes()
    gone.unlink()
    status, (line,) = call(*flags, "--resume", "auto")
    assert (status, content(tmp_path / "runs")) == (EXIT_BAD_INPUT, before)
    assert "training images: 23 now, 24 when the run began" in line
    gone.write_bytes((folder / "train" / "a" / "2.png").read_bytes())
    assert call(*flags, "--resume", "auto")[0] == EXIT_BAD_INPUT
    gone.write_bytes(whole)
    assert call(*flags, "--resume", "auto")[0] == 0


def test_a_queue_of_other_images_is_refused_by_its_data(tmp_path: Path, call: Callable[..., tuple]) -> None:
    """The queue of nnclr is as long as the data set, so other data do not fit into its checkpoint either."""
    flags = ("--data", "own.npz", "--method", "nnclr", "--preset", "none", "--backbone", "test_vit", "--no-evaluate")
    write_npz(tmp_path / "own.npz")
    assert call(*flags)[0] == 0
    images = np.load(tmp_path / "own.npz")["train_images"]
    write_npz(tmp_path / "own.npz", train_images=images[1:], train_labels=np.arange(1, 24) % 2)
    before = content(tmp_path / "runs")
    status, (line,) = call(*flags, "--resume", "auto")
    assert (status, content(tmp_path / "runs")) == (EXIT_BAD_INPUT, before)
    assert "training images: 23 now, 24 when the run began" in line


def test_a_table_of_baselines_is_tied_to_its_data(tmp_path: Path, call: Callable[..., tuple]) -> None:
    flags = ("--data", "own.npz", "--baselines", "only")
    write_npz(tmp_path / "own.npz")
    assert call(*flags)[0] == 0
    write_npz(tmp_path / "own.npz", test_labels=np.arange(8) // 4)
    before = content(tmp_path / "runs")
    status, (line,) = call(*flags, "--resume", "auto")
    assert (status, content(tmp_path / "runs")) == (EXIT_BAD_INPUT, before)
    assert "labels of the test images" in line


def test_another_phantom(tmp_path: Path, call: Callable[..., tuple]) -> None:
    assert call("--no-evaluate", "--data-seed", "7")[0] == 0
    before = content(tmp_path / "runs")
    status, (line,) = call("--no-evaluate", "--data-seed", "8", "--resume", "auto")
    assert (status, content(tmp_path / "runs")) == (EXIT_BAD_INPUT, before)
    assert "data_seed 7, not 8" in line
    config = tmp_path / "runs" / "r" / "config.yaml"  # the same settings, but a phantom of another version
    config.write_text(config.read_text().replace("data_seed: 7", "data_seed: 8"))
    status, (line,) = call("--no-evaluate", "--data-seed", "8", "--resume", "auto")
    assert status == EXIT_BAD_INPUT
    assert "the pixels of the training images" in line or "the labels of the training images" in line


# One process


def test_a_second_process_is_refused_and_the_lock_dies_with_the_first(
    tmp_path: Path, call: Callable[..., tuple]
) -> None:
    data, lock = str(write_npz(tmp_path / "own.npz")), tmp_path / "runs" / "r" / "lock"
    hold = f"import sys; from pathlib import Path; from amimv.files import locked\nwith locked(Path({str(lock)!r})):\n"
    hold += "    print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        for flags in (("--resume", "auto"), ("--baselines", "only")):
            status, (line,) = call("--data", data, *flags)
            assert status == EXIT_BAD_INPUT
            assert f"is in use: wait for the process there to end, or give another name (process {first.pid}" in line
            assert [path.name for path in lock.parent.iterdir()] == ["lock"]
    finally:
        first.kill()
        first.communicate()
    assert call("--data", data, "--no-evaluate", "--resume", "auto")[0] == 0


@pytest.mark.parametrize("known", [True, False], ids=["no locks", "another failure"])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK if known else errno.EIO, "refused")

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = False
    with nullcontext() if known else pytest.raises(OSError, match="refused"), locked(tmp_path / "lock", "busy"):
        entered = True
    assert (entered, len(caplog.messages)) == (known, int(known))


@pytest.mark.slow
def test_a_second_command_with_the_same_words_is_refused(tmp_path: Path, call: Callable[..., tuple]) -> None:
    """The first is a process of its own, in mid-run."""
    data, folder = str(write_npz(tmp_path / "own.npz")), tmp_path / "runs" / "r"
    flags = ("--data", data, "--batch-size", "8", "--save-every", "2", "--supervised-steps", "0", "--name", "r")
    flags = (*flags, "--knn-every", "0", "--no-evaluate", "--resume", "auto", "--steps", "100000", "--log-every", "1")
    first = subprocess.Popen([sys.executable, pretrain.__file__, *flags], cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        while not (folder / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.1)
        status, (line,) = call("--data", data, "--no-evaluate", "--resume", "auto", "--steps", "100000")
        assert status == EXIT_BAD_INPUT
        assert f"(process {first.pid} on " in line
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert first.returncode == 75
    steps = [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


# Before the first step


def only(n: int) -> dict[str, np.ndarray]:
    return {"test_images": np.zeros((n, 28, 28, 3), np.uint8), "test_labels": np.zeros(n, int)}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (only(1), "got 1 and 2"),
        (only(0), "test_images is empty"),
        ({f"{s}_labels": np.zeros(n, int) for s, n in SIZES.items()}, "class"),
        ({"test_images": np.zeros((8, 28, 28), np.uint8)}, "test images have 1 channels"),
        ({"test_images": np.zeros((8, 64, 64, 3), np.uint8)}, "test images are 64 px"),
        ({"test_labels": np.full(8, 5)}, "label"),
        ({"val_images": np.zeros((0, 28, 28, 3), np.uint8), "val_labels": np.zeros(0, int)}, "val_images is empty"),
    ],
    ids=[
        "one test image",
        "none",
        "one class",
        "grey test images",
        "large test images",
        "other labels",
        "no val image",
    ],
)
def test_what_the_evaluation_needs_is_looked_at_first(
    tmp_path: Path, call: Callable[..., tuple], changed: dict[str, np.ndarray], said: str
) -> None:
    data = write_npz(tmp_path / "own.npz", **changed)
    status, (line,) = call("--data", str(data))
    assert status == EXIT_BAD_INPUT
    assert said in line
    assert len(line) < 200
    assert not holds_run(tmp_path / "runs" / "r")
    write_npz(data)  # the corrected data
    assert call("--data", str(data), "--no-evaluate")[0] == 0


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_is_missing_is_missed_first(tmp_path: Path, call: Callable[..., tuple], split: str) -> None:
    whole = dict(np.load(write_npz(tmp_path / "whole.npz")))
    data = tmp_path / "own.npz"
    np.savez(data, **{name: array for name, array in whole.items() if not name.startswith(split)})
    status, (line,) = call("--data", str(data))
    assert status == EXIT_BAD_INPUT
    assert f"has no array '{split}_" in line
    assert not holds_run(tmp_path / "runs" / "r")
    assert call("--data", str(data), "--no-evaluate")[0] == 0


@pytest.mark.parametrize("what", ["no split", "one image", "damaged"])
def test_the_test_files_of_a_folder_are_looked_at_first(tmp_path: Path, call: Callable[..., tuple], what: str) -> None:
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    folder = write_folder(tmp_path / "images")
    test = folder / "test"
    if what == "no split":
        shutil.rmtree(test)
    elif what == "damaged":
        (test / "b" / "7.png").write_bytes((test / "b" / "7.png").read_bytes()[:300])
    else:
        for file in (*test.glob("b/*"), *test.glob("a/[1-9].png")):
            file.unlink()
    said = {"no split": "'test'", "one image": "got 1 and 2", "damaged": "7.png cannot be decoded"}
    flags = ("--data", f"folder:{folder}", "--size", "28")
    status, lines = call(*flags)
    assert status == EXIT_BAD_INPUT
    assert said[what] in lines[0]
    assert not holds_run(tmp_path / "runs" / "r")
    assert call(*flags, "--no-evaluate")[0] == 0


@pytest.mark.parametrize("flags", [("--batch-size", "500"), ("--backbone", "resnet81"), ("--sampler", "x")])
def test_a_start_that_fails_does_not_block_the_corrected_command(
    tmp_path: Path, call: Callable[..., tuple], flags: tuple[str, ...]
) -> None:
    data = str(write_npz(tmp_path / "own.npz"))
    assert call("--data", data, "--no-evaluate", *flags)[0] == EXIT_BAD_INPUT
    assert call("--data", data, "--no-evaluate")[0] == 0


# Files


def test_a_disk_that_fills_up_ends_in_one_line_and_nothing_is_lost(
    tmp_path: Path, call: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--data", str(write_npz(tmp_path / "own.npz")), "--no-evaluate", "--resume", "auto")
    resource = pytest.importorskip("resource")
    save, limits = loop.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_half(folder: Path, step: int, state: dict[str, object]) -> None:
        """From the second checkpoint on the system ends each file after half of it, as a quota does."""
        if step == 4:
            half = (folder / "step-00000002.pt").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
        try:
            save(folder, step, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save_checkpoint", save_half)
        status, (line,) = call(*flags)
    assert status == EXIT_IO
    assert "step-00000004.pt: File too large" in line
    assert len(line) < 200
    folder = tmp_path / "runs" / "r" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002.pt"]
    assert call(*flags)[0] == 0
    assert [json.loads(row)["step"] for row in (folder.parent / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]


def test_an_output_below_a_file_and_no_room_are_refused(
    tmp_path: Path, call: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write_npz(tmp_path / "own.npz"))
    (tmp_path / "file").write_text("mine")
    status, (line,) = call("--data", data, "--no-evaluate", "--output", "file/runs")
    assert status == EXIT_IO
    assert "file" in line
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    status, (line,) = call("--data", data, "--no-evaluate")
    assert status == EXIT_IO
    assert "the checkpoints need" in line
    assert not holds_run(tmp_path / "runs" / "r")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.writelines(["new", 1])
    assert content(tmp_path) == {str(tmp_path / "a"): b"old"}
    with locked(tmp_path / "lock"), replacing(tmp_path / "a") as file:
        file.write("new")
    assert content(tmp_path) == {str(tmp_path / "a"): b"new", str(tmp_path / "lock"): b""}
