"""Twenty steps of every method against the losses on record: what moves them is a change of behaviour.

A change that is meant is recorded with ``python tests/trainers/test_golden.py`` (half a minute) and named in the
CHANGELOG; the diff of ``tests/data/golden.json`` shows which methods it moved.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from amimv.models.methods import METHODS

RECORD = Path(__file__).resolve().parents[1] / "data" / "golden.json"
STEPS = 20
#: Relative, and absolute where a loss is near zero. With kernels for SSE4, not AVX-512 (``ATEN_CPU_CAPABILITY``,
#: ``ONEDNN_MAX_CPU_ISA``, ``MKL_ENABLE_INSTRUCTIONS``) the losses below move by up to 2e-5, nearly all by 2e-6: other
#: processors and versions of torch round otherwise. At the published learning rates BatchNorm on 16 images would make
#: that a hundredth within the twenty steps, so a fiftieth of them is taken, and AdamW for DINO.
TOLERANCE = 1e-4
ADAMW = ("--optimizer", "adamw", "--lr", "5e-3")

CASES = {
    **{method: ("--method", method) for method in METHODS},
    "dino": ("--method", "dino", *ADAMW),
    "multi-crop": ("--method", "dino", "--recipe", "multi-crop", "--local-size", "8", *ADAMW),
    "views": (
        *("--method", "simclr", "--recipe", "amimv-views", "--sampler", "class-balanced"),
        "--solarise-p",
        "0.3",
    ),
    "roles": (*("--method", "simclr", "--recipe", "amimv-roles", "--sampler", "progressive"), "--partners", "2"),
    "text": (*("--method", "vicreg", "--recipe", "N(x)+S(y) | H(x)+A'(x)", "--partner", "square-root"), "--rho", "3"),
    "same-group": ("--method", "mimv", "--recipe", "mimv", "--partner", "same-group", "--accumulation", "2"),
    "clusters": ("--method", "byol", "--sampler", "cluster-balanced", "--cluster-every", "2", "--clusters", "3"),
}


def losses_of(case: str, command: Callable[..., int]) -> list[float]:
    """Of a run with the method's settings as the preset `small` has them, on the old run's images."""
    flags = ("--data", "tiny.npz", "--steps", str(STEPS), "--batch-size", "16", "--lr-batch", "800", "--threads", "1")
    quick = ("--no-evaluate", "--knn-every", "0", "--output", "golden", "--name", case)
    assert command(*flags, *quick, *CASES[case]) == 0
    rows = [json.loads(line) for line in Path("golden", case, "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    return [row["loss"] for row in rows]


@pytest.mark.usefixtures("old_run")
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_on_record(case: str, pretrain_here: Callable[..., int], record: bool) -> None:
    found = losses_of(case, pretrain_here)
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record:
        recorded[case] = [float(f"{loss:.7g}") for loss in found]
        lines = (f'"{name}": {json.dumps(recorded[name])}' for name in CASES if name in recorded)
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert found == pytest.approx(recorded[case], rel=TOLERANCE, abs=TOLERANCE)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:xdist", "--record-golden"]))
