"""Names of run folders: safe in every file system and shell, and others for other data."""

import re

import pytest

from amimv.trainers.layers import resolve
from amimv.trainers.run_folder import default_name

DATA = [
    *("phantom", "retinamnist", "own.npz", "own.v2.npz", "a b.npz", "a+b.npz", "a  b.npz", "-own.npz", ".own.npz"),
    *("folder:derm", "folder:derm.v2", "folder:derm.v3", "folder:~/de rm", "folder:some/de:rm", "folder:.derm"),
    *("folder:retinamnist", "folder:haut-ä", "folder:haut-ö", "folder:" + "x" * 250, "folder:" + "x" * 249 + "y"),
    *("folder:/", "folder:-x", "folder:x.npz", "folder:..."),
]


def name_of(*flags: str) -> str:
    return default_name(resolve(["--method", "simclr", "--preset", "small", *flags])[0])


def test_other_data_get_other_names_of_plain_letters() -> None:
    names = {data: name_of(f"--data={data}") for data in DATA}
    assert len(set(names.values())) == len(DATA)
    for name in names.values():
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)
        assert len(name) < 200


RECIPES = ["mimv", "A(x) | A(y)", "A(x) | A'(x)", "A(x)|A(x)", "N(x)+A(y) | A(x)+N(y)", "N(x)|A(y)+A(x)+N(y)"]


def test_other_recipes_get_other_names_of_plain_letters() -> None:
    long = ["+".join(["A(x)"] * n) + " | N(x)" for n in (60, 61)]
    names = {recipe: name_of("--recipe", recipe) for recipe in (*RECIPES, *long)}
    assert len(set(names.values())) == len(names)
    assert names["mimv"] == "phantom-simclr-mimv-small-seed0"
    for name in names.values():
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)
        assert len(name) < 200


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (("--data", "phantom"), "phantom-simclr"),
        (("--data", "retinamnist", "--size", "64", "--rho", "100"), "retinamnist-64px-rho100-simclr"),
        (("--data", "some where/own.v2.npz", "--rho", "2.5", "--total", "90"), "own.v2-rho2.5-n90-simclr"),
        (("--data", "own_28.npz", "--profile", "natural"), "own_28-natural-simclr"),
        (("--data", "folder:/a/derm.v2/"), "folder-derm.v2-simclr"),
        (("--data", "folder:a/../derm/."), "folder-derm-simclr"),
        (("--data", "phantom", "--indices", "x.npy"), "phantom-indices-simclr"),
        (("--rho", "1e6"), "phantom-rho1e06-simclr"),
        (("--rho", "100.0000001"), "phantom-rho100.0000001-simclr"),
    ],
)
def test_what_a_name_tells(flags: tuple[str, ...], start: str) -> None:
    assert name_of(*flags) == f"{start}-two-view-small-seed0"


def test_a_folder_is_named_by_where_it_is(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "derm").mkdir()
    monkeypatch.chdir(tmp_path / "derm")
    assert name_of("--data", "folder:.") == name_of("--data", "folder:../derm") == name_of("--data", "folder:derm")
    assert name_of("--backbone", "hf-hub:timm/x").split("-two-view-")[1].startswith("hf-hub-timm-x-")
