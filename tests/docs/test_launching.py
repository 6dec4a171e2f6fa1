"""The SLURM script of docs/launching.md, by two processes of this machine that stand in for two others."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    "scontrol": 'test "$1 $2 $3" = "show hostnames two" && echo localhost && echo another',
    "srun": 'for node in $(seq "$SLURM_NNODES"); do "$@" & all="$all $!"; done; '
    "for one in $all; do wait $one || exit; done",
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.slow
def test_the_script_of_slurm_trains_on_two_machines(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / "launching.md").read_text(), flags=re.DOTALL)
    (script,) = blocks
    with socket.socket() as free:
        free.bind(("localhost", 0))
        script = script.replace("29500", str(free.getsockname()[1]))
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "two", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    flags = ("--batch-size", "16", "--steps", "4", "--knn-every", "0", "--no-evaluate")
    words = ["bash", "-s", "--", *flags, "--output", str(tmp_path), "--name", "r"]
    done = subprocess.run(
        words, input=script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 process(es) on cpu") == 1  # rank 0 speaks for both
    assert json.loads((tmp_path / "r" / "environment.json").read_text())["processes"] == 2
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 4
