"""The measurement of a shared machine shows what it ran, in turns; no test asserts a speed."""

import re

import pytest

from amimv.threads import SPARE, idle_cores, usable_cores
from amimv.tools.throughput import shared_machine as module


def test_turns_and_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[tuple[tuple[str, ...], bool]] = []

    def train(steps: int, way: dict[str, str], beside: bool) -> tuple[float, str]:
        turns.append((tuple(way), beside))
        return (220.0 if beside else 80.0) + 10 * len(
            turns
        ), "2 threads that sleep" if beside else "2 threads that spin"

    monkeypatch.setattr(module, "train", train)
    module.measure(rounds=2)
    once = [(tuple(way), beside) for way in module.WAYS.values() for beside in (False, True)]
    assert turns == once * 2
    shown = capsys.readouterr().out
    # Turns 1 and 9 alone: 90 and 170; 2 and 10 beside: 240 and 320.
    assert re.search(r"as chosen +│ 130 \(90 to 170\) +│ 280 \(240 to 320\) +│ 2\.15 ", shown)
    assert shown.endswith("alone:\n  2 threads that spin\nchosen beside a busy core:\n  2 threads that sleep\n")


def test_the_other_process_keeps_a_core_busy() -> None:
    with module.busy_core():
        assert idle_cores() < usable_cores() - SPARE


@pytest.mark.slow
def test_a_run_is_timed() -> None:
    time, line = module.train(1, {"OMP_NUM_THREADS": "1"}, beside=False)
    assert time > 0
    assert line.startswith("1 thread (")
