"""The package as a whole: what is listed, what imports what, what it is called."""

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import amimv

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"tests", "build", "dist", "runs"}
#: Of a checkout only: what measures other people's libraries is in no wheel.
NOT_INSTALLED = {"tools/throughput/rivals"}


def setup_options() -> configparser.SectionProxy:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["options"]


def package_folders() -> dict[str, str]:
    """Package name to folder, as setup.cfg maps them."""
    lines = setup_options()["package_dir"].strip().splitlines()
    pairs = (line.split("=") for line in lines)
    return {name.strip(): folder.strip() for name, folder in pairs}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def walk() -> Iterator[tuple[Path, list[str]]]:
    """The folders of the repository and their files, without environments and what builds leave."""
    for folder, folders, files in os.walk(ROOT):
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        folders[:] = [f for f in folders if not f.startswith(".") and f not in NOT_OURS and "egg-info" not in f]
        yield Path(folder), files


def modules(*packages: str) -> list[Path]:
    folders = {ROOT / package_folders()[package] for package in packages}
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module name that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_packages_listed_are_the_folders_on_disk() -> None:
    on_disk = {folder.relative_to(ROOT).as_posix() for folder, files in walk() if "__init__.py" in files}
    listed = setup_options()["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(package_folders()) == set(listed)
    assert on_disk > NOT_INSTALLED
    assert set(package_folders().values()) == on_disk - NOT_INSTALLED


def test_a_checkout_has_the_whole_package_under_its_name() -> None:
    """mypy and editors find `amimv.pipelines` by a link; without links mypy would see one file and be content."""
    tops = {folder.split("/")[0] for folder in package_folders().values()} - {"amimv"}
    links = {path.name: os.readlink(path) for path in (ROOT / "amimv").iterdir() if path.is_symlink()}
    assert links == {top: f"../{top}" for top in tops}


def test_every_folder_with_modules_is_a_package() -> None:
    tops = {folder.split("/")[0] for folder in package_folders().values()}
    for folder, files in walk():
        relative = folder.relative_to(ROOT)
        if relative.parts and relative.parts[0] in tops and any(file.endswith(".py") for file in files):
            assert "__init__.py" in files, f"{relative} holds modules but no __init__.py"


def test_every_data_file_is_package_data() -> None:
    covered = set()
    for package, patterns in pyproject()["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            found = set((ROOT / package_folders()[package]).glob(pattern))
            assert found, f"{pattern} of {package} matches nothing"
            covered |= found
    tops = {ROOT / folder.split("/")[0] for folder in package_folders().values()}
    data = {path for top in tops for path in top.rglob("*") if path.is_file()}
    data = {path for path in data if path.suffix not in (".py", ".pyc") and "egg-info" not in str(path)}
    assert data == covered
    assert any(path.suffix == ".yaml" for path in data)


#: Lines: of a file, of a function with its docstring; and the part of the code that tools may be.
FILE, FUNCTION, TOOLS = 400, 50, 1 / 4


def test_files_and_functions_are_short_and_tools_are_a_small_part() -> None:
    lines: dict[str, int] = {}
    for path in modules(*package_folders()):
        text, where = path.read_text(), path.relative_to(ROOT)
        length = len(text.splitlines())
        lines[where.parts[0]] = lines.get(where.parts[0], 0) + length
        assert length <= FILE, f"{where} has {length} lines, expected at most {FILE}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= FUNCTION, f"{where}: {node.name} has {length} lines, expected at most {FUNCTION}"
    assert len(lines) == 5
    assert lines["tools"] <= TOOLS * sum(lines.values())


def test_no_module_is_named_like_a_standard_one() -> None:
    names = {path.stem for path in modules(*package_folders())} - {"__init__"}
    names |= set(package_folders().values())
    assert len(names) > 20
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("packages", "banned"),
    [
        (("amimv.pipelines",), ("amimv.models", "amimv.trainers", "amimv.tools")),
        (("amimv.models", "amimv.models.methods"), ("amimv.trainers", "amimv.tools")),
        (("amimv.trainers", "amimv.trainers.evaluation"), ("amimv.tools",)),
        (("amimv",), ("amimv.pipelines", "amimv.models", "amimv.trainers", "amimv.tools")),
    ],
)
def test_no_package_imports_from_one_above_it(packages: tuple[str, ...], banned: tuple[str, ...]) -> None:
    files = modules(*packages)
    assert files
    for path in files:
        for name in imported(path):
            assert not f"{name}.".startswith(tuple(f"{b}." for b in banned)), f"{path} imports {name}"


def test_importing_the_pipelines_brings_no_backend() -> None:
    check = (
        "import sys, amimv, amimv.pipelines\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('kornia', 'nvidia') and 'dali' in m or "
        "m.split('.')[0] in ('kornia', 'timm', 'accelerate', 'sklearn', 'matplotlib', 'medmnist')))"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"


def test_the_version_stands_in_one_place() -> None:
    assert pyproject()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "amimv.__version__"}
    assert importlib.metadata.version("amimv") == amimv.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == amimv.__version__
    latest = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert latest is not None
    assert latest[1] == amimv.__version__


def test_what_the_package_imports_it_depends_on() -> None:
    """So that the wheel needs no environment of its own to be tried: what a checkout's tests need is not missed."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    listed = {
        re.match(r"[\w-]+", one)[0]
        for one in [*project["dependencies"], *extras["cluster"], *extras["dicom"], *extras["parquet"]]
    }
    providers = importlib.metadata.packages_distributions()
    for path in modules(*package_folders()):
        tops = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"amimv"}
        for top in tops - {"lightly", "pytest"}:  # what tools compare with, or start
            assert {name.lower() for name in providers[top]} & listed, f"{path} imports {top}"


def test_console_scripts_point_at_functions() -> None:
    scripts = pyproject()["project"]["scripts"]
    assert scripts
    for target in scripts.values():
        module, function = target.split(":")
        package, _, name = module.rpartition(".")
        tree = ast.parse((ROOT / package_folders()[package] / f"{name}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_an_unknown_choice_names_the_near_misses() -> None:
    amimv.check_choice("backend", "dali", iter(["kornia", "dali"]))
    with pytest.raises(amimv.InputError) as error:
        amimv.check_choice("cat", "tabbi", (name for name in ("tabby", "lynx", "tabbies")))
    assert str(error.value) == "unknown cat 'tabbi': did you mean tabbies or tabby? choose from tabby, lynx, tabbies"
    with pytest.raises(amimv.InputError, match=r"^unknown cat 'qq': choose from lynx$"):
        amimv.check_choice("cat", "qq", ["lynx"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (AssertionError(), "AssertionError"),
        (EOFError(""), "EOFError"),
        (RuntimeError(" \n "), "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert amimv.first_line(error) == line


def test_errors_are_cut_to_a_line_in_one_place() -> None:
    """An index into the lines of an empty message is an error of its own."""
    cuts = [
        path for path in ROOT.glob("*/**/*.py") if ".splitlines()[0]" in path.read_text() and path != Path(__file__)
    ]
    assert cuts == []


def test_a_command_ends_in_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise amimv.InputError("no such thing")

    with pytest.raises(SystemExit) as exit_:
        amimv.run_command(fail)
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")
    amimv.run_command(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        amimv.run_command(lambda: 1 // 0)
