"""The throughput tool runs, counts what it times and writes strict JSON; no test asserts a speed."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

from amimv import InputError
from amimv.pipelines import ImageStore, PairBatch, get_recipe, load_store
from amimv.tools import profile_throughput as tool
from amimv.tools.profile_throughput import ProfileSettings, Row, profile, reference_rate
from amimv.tools.throughput.measure import Rates
from amimv.tools.throughput.rivals import RIVALS, training
from amimv.trainers.build import Training
from amimv.trainers.journal import Step

QUICK = ProfileSettings(batch_sizes=(32,), repeats=2, seconds=0.02)


@pytest.fixture(scope="module")
def store() -> ImageStore:
    return load_store("phantom")


@pytest.fixture
def two_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs, and one whose library is not there."""
    kept = next(rival for rival in RIVALS if rival.name.endswith("resampled"))
    monkeypatch.setattr(tool, "RIVALS", (kept, replace(kept, name="nobody's", module="no_such_library")))
    monkeypatch.setattr(tool, "RIVAL_BATCHES", (16,))
    monkeypatch.setattr(tool, "TRIAL", (1, 0.01))


@pytest.mark.usefixtures("two_rivals")
def test_it_prints_and_writes_a_row_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    profile(replace(QUICK, json=str(path)))
    shown = capsys.readouterr().out
    for name in (
        "PairLoader, kornia",
        "render alone, dali",
        "Kornia Aug",
        "phantom (synthetic), 28 px",
        "no_such_lib",
    ):
        assert name in shown
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert {"packages", "cpus", "settings", "device", "throughput"} <= document.keys()
    rows = document["throughput"]
    assert [row["pipeline"] for row in rows[:2]] == ["amimv PairLoader, kornia", "amimv render alone, kornia"]
    assert len(rows) == 2 * 2 * 2 + 2
    for row in rows[:-1]:
        assert 0 < row["low"] <= row["views_per_second"] <= row["high"]
        assert row["batch_size"] in (16, 32)
    assert rows[-1]["views_per_second"] is None
    assert rows[-1]["note"].startswith("skipped: no_such_library")


@pytest.mark.slow
def test_without_the_others_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an installed package."""
    monkeypatch.setattr(tool, "RIVALS", ())
    rows = profile(replace(QUICK, backends=("kornia",), recipes=("two-view",), seconds=0.0))["throughput"]
    assert len(rows) == 2
    assert "compared in a checkout only" in capsys.readouterr().out


def test_views_are_counted(store: ImageStore) -> None:
    pairs = tool.count_pairs(store, "mimv", "kornia", False, 40, 1)
    before = torch.get_num_threads()
    assert [next(pairs) for _ in range(3)] == [4 * 40] * 3
    assert torch.get_num_threads() == 1
    pairs.close()
    assert torch.get_num_threads() == before
    assert next(tool.count_renders(store, "two-view", "kornia", 40, 1)) == 80
    kornia = next(rival for rival in RIVALS if rival.name.endswith("resampled"))
    with_rival = kornia.count(store, 40, 1)
    assert next(with_rival) == 80
    with_rival.close()


@pytest.mark.slow
def test_the_best_choice_is_kept() -> None:
    def views(batch: int, n: int):  # type: ignore[no-untyped-def]
        while True:
            torch.randn(10_000 if n == 2 else 2_000_000).sum()
            yield batch

    candidate = tool.Candidate("p", "two-view", [(8, 1), (8, 2)], views, "note")
    row = tool.measure_candidate(QUICK, candidate, 28, torch.device("cpu"))
    assert (row.batch_size, row.threads, row.note) == (8, 2, "note")


def test_the_ratio_is_of_the_reference() -> None:
    ours = Row("amimv PairLoader, kornia", "two-view", 28, 256, 1, 100.0, 90.0, 110.0)
    other = replace(ours, pipeline="other", views_per_second=25.0)
    assert reference_rate([other, ours]) == 100.0
    assert reference_rate([other]) is None
    assert tool.cells_of(other, 100.0) == ("other", "two-view", "256", "1", "25", "90 to 110", "4.0x")
    assert tool.cells_of(Row("gone", "two-view", 28, note="skipped: x"), 100.0)[4] == "skipped"


def test_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    document = profile(replace(QUICK, stages=True, recipes=("amimv-strength",), trace=str(trace)))
    assert "throughput" not in document
    (stages,) = document["stages"]
    names = [row["stage"] for row in stages["stages"]]
    assert names[:5] == ["sampler", "draw", "gather", "to float", "resample"]
    assert "solarise" not in names  # nobody solarises here
    assert sum(row["share"] for row in stages["stages"]) == pytest.approx(1)
    assert all(row["milliseconds"] >= 0 for row in stages["stages"])
    assert stages["views_ms"].keys() == {"N(x)", "H(y)", "S(x)", "N(y)"}
    assert "a whole batch" in capsys.readouterr().out
    events = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"draw", "resample", "blur", "normalise"} <= events


def test_watched_functions_are_put_back(store: ImageStore) -> None:
    from amimv.tools.throughput.stages import STAGES, break_down

    before = {name: getattr(*where) for name, where in STAGES.items()}
    assert "blur" in before
    break_down(store, get_recipe("two-view"), 64, 0.0)
    assert {name: getattr(*where) for name, where in STAGES.items()} == before


def test_training_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    document = profile(replace(QUICK, train=True, recipes=("two-view", "amimv"), method="mimv", rivals=False))
    first, second = document["training"]
    parts = ("data", "forward", "backward", "optimizer", "other")
    for step in (first, second):
        assert all(step[f"{part}_ms"] >= 0 for part in parts)
        assert 0 < step["data_wait_share"] < 1
        assert step["peak_memory_mib"] > 50
        assert sum(step[f"{part}_ms"] for part in parts) > 0
    assert (first["recipe"], second["recipe"]) == ("two-view", "amimv")
    assert "waiting for data" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # no run is left behind


def test_the_same_step_is_fed_by_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A loader that is late shows in its step, its waiting and alone; one that is missing says so."""
    kept = next(rival for rival in RIVALS if rival.name.endswith("resampled"))

    def late(*given: object) -> Iterator[object]:
        for views in kept.batches(*given):
            time.sleep(0.2)
            yield views

    rivals = (replace(kept, name="late", batches=late), replace(kept, name="nobody's", module="no_such_library"))
    monkeypatch.setattr(training, "RIVALS", rivals)
    monkeypatch.setattr(training, "FED_BY", ("kornia", "no_such_library"))
    monkeypatch.setattr(training, "WARM_UP_STEPS", 1)
    seen: list[PairBatch] = []
    step = training.train_step

    def look(trained: Training, batches: Iterator[PairBatch], epoch: int) -> Step:
        seen.append(next(batches))
        return step(trained, iter(seen[-1:]), epoch)

    monkeypatch.setattr(training, "train_step", look)
    (row,) = profile(replace(QUICK, train=True, recipes=("two-view",), repeats=1))["training"]
    ours, other, missing = row["fed_by"]
    assert other["waited"]["median"] >= 200
    assert other["batch"]["median"] >= 200
    assert other["step"]["median"] > other["waited"]["median"]
    assert ours["waited"]["median"] < 200
    assert missing["note"].startswith("no_such_library")
    assert len(seen) == 2  # the warm-up of either
    for pair in seen:  # alike in all but the pixels
        assert [[view.shape for view in side] for side in pair.sides] == [[(32, 3, 28, 28)]] * 2
        assert 0.5 < pair.sides[0][0].std() < 2
    assert "nobody's: skipped: no_such_library" in capsys.readouterr().out


@pytest.mark.slow
def test_scaling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from amimv.tools.throughput import scaling

    monkeypatch.setattr(scaling, "BATCH_SIZES", (16, 32))
    monkeypatch.setattr(scaling, "SIZES", (12, 16))
    monkeypatch.setattr(scaling, "IMAGES", (300, 4000))
    monkeypatch.setattr(scaling, "PARTNERS", (1, 2))
    monkeypatch.setattr(scaling, "BATCH", 64)
    monkeypatch.setattr(scaling, "EPOCH", 512)
    monkeypatch.setattr(scaling, "MEMORY_EPOCHS", (1, 2))
    plot = tmp_path / "plot.png"
    document = profile(replace(QUICK, scale=True, plot=str(plot), seconds=0.0))
    rows = document["scaling"]["rows"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("batch size", 16),
        ("batch size", 32),
        ("image size", 12),
        ("image size", 16),
        ("images", 300),
        ("images", 4000),
        ("slots", 2),
        ("slots", 3),
    ]
    for row, units in zip(rows, (32, 64, 18.432, 32.768, 128, 128, 256, 384), strict=True):
        assert row["microseconds_per_unit"] == pytest.approx(1000 * row["milliseconds"] / units)
    memory = document["scaling"]["held_memory_mib"]
    assert memory.keys() == {1, 2}
    assert min(memory.values()) > 50
    assert matplotlib.image.imread(plot)[..., :3].std() > 0.05


def test_rates_are_medians_and_quartiles() -> None:
    from amimv.tools.throughput.measure import summarise

    assert summarise([3.0, 1.0, 2.0]) == Rates(2.0, 1.0, 3.0)
    assert summarise([5.0]) == Rates(5.0, 5.0, 5.0)


def test_the_stopwatch_charges_the_inner_stage() -> None:
    from types import SimpleNamespace

    from amimv.tools.throughput.measure import Stopwatch

    waits: list[int] = []
    stopwatch = Stopwatch(lambda: waits.append(1))
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    inner = SimpleNamespace(run=lambda: spend(2.0))
    outer = SimpleNamespace(run=lambda: (spend(1.0), inner.run()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amimv.tools.throughput.measure.time.perf_counter", lambda: now[0])
        with stopwatch.watch({"inner": (inner, "run"), "outer": (outer, "run")}):
            outer.run()
            outer.run()
    assert stopwatch.seconds == {"inner": 4.0, "outer": 2.0}
    assert len(waits) == 8


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"recipes": ("two-vew",)}, "unknown recipe 'two-vew'"),
        ({"backends": ("korna",)}, "unknown backend 'korna'"),
        ({"batch_sizes": (10_000_000,)}, "batch size is 10000000"),
        ({"data": "retinamnits"}, "unknown data set"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"repeats": 0}, "repeats is 0"),
        ({"sizes": ()}, "no sizes"),
        ({"backends": ()}, "no backends"),
        ({"trace": "t.json"}, "--trace is written by --stages: give both"),
        ({"plot": "p.png", "stages": True}, "--plot is written by --scale"),
    ],
)
def test_bad_input_is_one_line(changed: dict, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=line) as error:
        profile(replace(QUICK, rivals=False, **changed))
    assert "\n" not in str(error.value)
