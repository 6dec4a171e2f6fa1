"""Every command answers ``--help`` and what it refuses before anything is loaded that takes seconds."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from amimv import InputError
from amimv.command_line import read_command
from amimv.fields import check_settings, setting

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = ("torch", "timm", "kornia", "accelerate", "sklearn", "medmnist")
#: By script a value that cannot be, and what is said.
BAD = {
    "amimv-pretrain": (["--optimizer", "adamm"], "unknown optimizer 'adamm': did you mean adam"),
    "amimv-evaluate": (["nowhere"], "nowhere holds no run"),
    "amimv-benchmark": (["nowhere.yaml"], "no such config file: nowhere.yaml"),
    "amimv-publish": (["--push", "", "-o", "out", "run"], "push is empty"),
    "amimv-report": (["runs", "--format", "pdf"], "unknown format 'pdf'"),
    "amimv-show-views": (["--sampler", "ballanced"], "unknown sampler 'ballanced'"),
    "amimv-profile-throughput": (["--repeats", "0"], "repeats is 0, expected at least 1"),
    "amimv-embed": (["run", "-o", "out.npz", "--predict", "perhaps"], "unknown probe 'perhaps'"),
    "amimv-gpu-check": (["--device", "tpu"], "unknown device 'tpu'"),
}
#: The commands that are started most.
OFTEN = ("amimv-pretrain", "amimv-evaluate", "amimv-embed")
#: Runs the command's main, or only its file, and says how it ended, how long it took and what of HEAVY is loaded.
CODE = """
import json, runpy, sys, time
module, as_file, heavy = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1).split()
status = 0
try:
    if as_file:
        sys.argv[0] = as_file
        runpy.run_path(as_file, run_name="__main__")
    else:
        sys.argv[0] = "amimv-" + module.rpartition(".")[2].replace("_", "-")
        __import__(module, fromlist=["main"]).main()
except SystemExit as end:
    status = end.code
print(json.dumps([status, time.process_time(), [name for name in heavy if name in sys.modules]]))
"""


def answer(script: str, *flags: str, as_file: bool, folder: Path) -> tuple[int, float, list[str], str]:
    module = SCRIPTS[script].partition(":")[0]
    file = str(ROOT / module.removeprefix("amimv.").replace(".", "/")) + ".py" if as_file else ""
    command = [sys.executable, "-c", CODE, module, file, " ".join(HEAVY), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ}, check=False)
    assert done.stdout, done.stderr
    status, seconds, loaded = json.loads(done.stdout.splitlines()[-1])
    return status or 0, seconds, loaded, done.stdout + done.stderr


@pytest.mark.parametrize("as_file", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["file", "script"])
@pytest.mark.parametrize("script", [pytest.param(s, marks=() if s in OFTEN else pytest.mark.slow) for s in SCRIPTS])
def test_an_answer_needs_nothing_that_takes_seconds(script: str, as_file: bool, tmp_path: Path) -> None:
    bad, said = BAD[script]
    for flags, expected_status, expected in (
        (["--help"], 0, "show this help message"),
        (["--no-such-flag"], 2, "For full helptext"),
        (bad, 2, said),
    ):
        status, seconds, loaded, output = answer(script, *flags, as_file=as_file, folder=tmp_path)
        assert (status, loaded) == (expected_status, []), flags
        assert expected in output
        assert seconds < 2, flags


def test_settings_are_resolved_without_what_takes_seconds() -> None:
    code = f"""
import sys
from amimv.trainers.layers import resolve
for method in ("amimv", "byol"):
    settings, _ = resolve(["--method", method, "--preset", "none", "--data", "retinamnist", "--value-range", "0", "9"])
    settings.policy(), settings.second_policy()
assert not [name for name in {HEAVY!r} if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclass(frozen=True)
class Few:
    sizes: tuple[int, ...] = setting((28,), "of the images", 1, 300)
    pair: tuple[float, float] = setting((0.1, 2.0), "smallest and largest", above=True)
    kinds: tuple[str, ...] = setting(("a",), "of all", choices=("a", "b"))
    name: str | None = setting(None, "of it")
    share: float = setting(0.5, "of them", 0, 1)

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sizes 28 0", "sizes is (28, 0), expected 1 to 300"),
        ("--sizes 28 301", "sizes is (28, 301), expected at most 300"),
        ("--pair 0 1", "pair is (0.0, 1.0), expected (smallest, largest), each more than 0"),
        ("--pair 2 1", "pair is (2.0, 1.0), expected (smallest, largest), each more than 0"),
        ("--pair 1 inf", "pair is (1.0, inf), expected (smallest, largest), each a number"),
        ("--kinds a c", "unknown kinds 'c'"),
        ("--share nan", "share is nan, expected 0 to 1"),
        ("--share -0.1", "share is -0.1, expected 0 to 1"),
        ("--name=", "name is empty"),
    ],
)
def test_a_field_says_what_it_can_be(flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["few.py", *flags.split()])
    with pytest.raises(InputError) as refused:
        read_command(Few, "Few settings.")
    assert said in str(refused.value)


def test_what_a_field_can_be_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--sizes", "1", "300", "2", "--pair", "1", "1", "--kinds", "b", "a", "--name", "x", "--share", "1"]
    monkeypatch.setattr(sys, "argv", ["few.py", *words])
    assert read_command(Few, None) == Few((1, 300, 2), (1.0, 1.0), ("b", "a"), "x", 1.0)
