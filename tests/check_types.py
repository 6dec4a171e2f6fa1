"""mypy, as `pyproject.toml` sets it up."""

import subprocess
import sys
from pathlib import Path

sys.exit(subprocess.call([sys.executable, "-m", "mypy"], cwd=Path(__file__).resolve().parents[1]))
