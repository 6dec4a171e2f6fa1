"""What the pages in docs/ show must run, and what they list must be what there is.

``python tests/test_docs.py`` prints the table of operations of docs/pipelines.md.
"""

import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from amimv import InputError
from amimv.pipelines import PARTNERS, RECIPES
from amimv.pipelines.operations import OPERATIONS, Colour, Geometry, Operation, Pixels
from amimv.pipelines.recipes import LETTERS

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = (ROOT / "docs" / "pipelines.md").read_text()
OPERATION = (ROOT / "docs" / "adding-an-operation.md").read_text()


def row(kind: type[Operation]) -> str:
    """Of the table of operations: name, stage, settings, soft counterpart, whether DALI has it."""
    stage = next(base.__name__.lower() for base in (Geometry, Colour, Pixels) if issubclass(kind, base))
    settings = ", ".join(f"`{field.name}`" for field in fields(kind))
    example = kind(**next(iter(kind.examples.values()))).soft()
    soft = (kind.soft.__doc__ or "").rstrip(".").lower() if "soft" in vars(kind) else "the same"
    dali = "yes" if not issubclass(kind, Pixels) or kind.has_dali_form() else "no"
    file = f"{kind.__module__.rsplit('.', 1)[1]}.py"
    cells = f"{stage} | {settings} | {'none' if example is None else soft} | {dali}"
    return f"| [`{kind.__name__}`](../pipelines/operations/{file}) | {cells} |"


def operations_table() -> str:
    head = "| operation | stage | settings | soft counterpart | DALI |\n|---|---|---|---|---|"
    return "\n".join([head, *map(row, OPERATIONS)])


def errors(block: str, scope: dict[str, Any]) -> None:
    """Each line behind ``>>>`` ends in the error below it."""
    for code, told in re.findall(r">>> (.*)\n(.*)", block):
        with pytest.raises(InputError) as error:
            eval(code, scope)
        assert f"amimv.InputError: {error.value}" == told


def test_the_blocks_run_in_order() -> None:
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```(python|pycon)\n(.*?)```", PIPELINES, flags=re.DOTALL)
    assert len(blocks) > 5
    for kind, block in blocks:
        if kind == "python":
            exec(block, scope)
        else:
            errors(block, scope)


def test_the_table_of_operations_is_theirs() -> None:
    assert f"<!-- operations -->\n{operations_table()}\n<!-- /operations -->" in PIPELINES


def test_recipes_letters_and_samplers_are_all_there() -> None:
    (listed,) = re.findall(r"```text\n(.*?)```", PIPELINES, flags=re.DOTALL)
    assert dict(line.split(maxsplit=1) for line in listed.splitlines()) == RECIPES
    cells = re.findall(r"^\| ([^|]+) \|", PIPELINES, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert {*LETTERS, *PARTNERS} <= named


def test_the_diff_of_an_operation_is_the_code() -> None:
    """The whole of a new file; what is added elsewhere is still there, whatever has come beside it since."""
    parts = re.split(r"^diff --git .*\n", re.findall(r"```diff\n(.*?)```", OPERATION, flags=re.DOTALL)[0], flags=re.M)
    files = {}
    for part in parts[1:]:
        (name,) = re.findall(r"^\+\+\+ b/(.*)$", part, flags=re.MULTILINE)
        added = re.findall(r"^\+(?!\+\+ )(.*)$", part, flags=re.MULTILINE)
        text = (ROOT / name).read_text()
        if "--- /dev/null" in part:
            assert text == "\n".join([*added, ""])
        else:
            assert Counter(re.findall(r"\w+", "\n".join(added))) <= Counter(re.findall(r"\w+", text)), name
        files[name] = added
    assert {Path(name).name for name in files} >= {"__init__.py", "sharpness.py"}


def test_the_site_builds_with_all_its_links(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed: pip install -e .[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))  # a warning aborts
    front = (tmp_path / "index.html").read_text()
    assert "PairLoader" in front
    assert not re.findall(r'(?:<script|<link[^>]+stylesheet)[^>]+(?:src|href)="(?:https?:)?//', front)  # offline
    losses = (tmp_path / "api" / "amimv.models.losses" / "index.html").read_text()
    assert 'id="amimv.models.losses.nt_xent"' in losses


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


if __name__ == "__main__":
    print(operations_table())
