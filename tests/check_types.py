"""Type-check the package as it is installed: mypy sees one file only of an editable install with a folder map."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"pipelines", "models", "trainers", "tools"}


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "amimv"
        package.mkdir()
        for source in (ROOT / "amimv").iterdir():
            (package / source.name).symlink_to(source)
        for folder in FOLDERS:
            (package / folder).symlink_to(ROOT / folder)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "amimv"]
        # The scratch package must win over an installed one.
        environment = {**os.environ, "MYPYPATH": scratch}
        found = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    print(found.stdout + found.stderr)
    checked = re.search(r"(?:checked|in) (\d+) source files?", found.stdout)
    expected = sum(1 for folder in (*FOLDERS, "amimv") for _ in (ROOT / folder).rglob("*.py"))
    if checked and found.returncode == 0 and int(checked[1]) < expected:
        print(f"mypy saw {checked[1]} files, expected at least {expected}")
        return 1
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
