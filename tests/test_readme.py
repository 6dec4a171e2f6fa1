"""What the README shows must run."""

import re
from pathlib import Path

from torch import nn

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_ten_lines_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (code,) = [block for block in blocks if "PairLoader" in block]
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 8))
    scope = {"net": net, "teacher": net, "my_loss": lambda a, b: (a - b).square().mean()}
    exec(code, scope)
    assert scope["pair"].indices.shape == (2, 256)
    assert scope["loss"].isfinite()


def test_the_pictures_are_there() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).resolve().parents[1] / path).is_file(), path
