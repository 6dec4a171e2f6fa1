"""The contact sheet: what is on it, and that it is a picture."""

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from amimv import InputError
from amimv.pipelines import HARD, PairLoader, get_recipe, load_store
from amimv.pipelines.store import ImageStore
from amimv.tools.show_views import ShowSettings, build_pairs, list_columns, show, to_pixels
from amimv.trainers.build import make_recipe
from amimv.trainers.layers import resolve


@pytest.fixture(scope="module")
def store() -> ImageStore:
    return load_store("phantom", split="val")


def columns_of(store: ImageStore, **recipe: object) -> list[tuple[str, str, torch.Tensor]]:
    loader = PairLoader(store, get_recipe(**recipe), 5, seed=2)  # type: ignore[arg-type]
    pair = next(iter(loader.epoch(0)))
    return list_columns(pair, loader.recipe, store.gather(pair.indices))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_normalisation_undone(channels: int) -> None:
    mean, std = (0.2, 0.5, 0.7)[:channels], (0.1, 0.2, 0.3)[:channels]
    policy = get_recipe("mimv", hard=HARD).with_statistics(mean, std).sides[0][0].policy
    pixels = torch.rand(2, channels, 4, 6, generator=torch.Generator().manual_seed(0))
    view = pixels.clone()
    for c in range(channels):
        view[:, c] = (pixels[:, c] - mean[c]) / std[c]
    found = to_pixels(view, policy)
    assert found.shape == (2, 4, 6, 3)
    for c in range(3):
        torch.testing.assert_close(found[..., c], pixels[:, min(c, channels - 1)])
    assert to_pixels(view + 100, policy).max() == 1.0
    assert to_pixels(view - 100, policy).min() == 0.0


def test_normalised_views_are_the_stored_images(store: ImageStore) -> None:
    columns = {
        (group, label.split("\n")[0]): pictures for group, label, pictures in columns_of(store, name="amimv-strength")
    }
    names = ("x, the anchor", "y, its partner")
    anchor, partner = (columns["the pair, as stored", name] for name in names)
    torch.testing.assert_close(columns["side a", "N(x)"], anchor, rtol=0, atol=1e-5)
    torch.testing.assert_close(columns["side b", "N(y)"], partner, rtol=0, atol=1e-5)
    assert (columns["side a", "H(y)"] - partner).abs().mean() > 0.01
    assert (anchor - partner).abs().mean() > 0.01


def test_labels_say_slot_and_strength(store: ImageStore) -> None:
    found = [(group, label) for group, label, _ in columns_of(store, name="amimv-strength", partners=2)]
    assert found == [
        ("the pair, as stored", "x, the anchor"),
        ("the pair, as stored", "y1, its partner"),
        ("the pair, as stored", "y2, its partner"),
        ("side a", "N(x)\nnormalised"),
        ("side a", "H(y1)\nhard augmentation"),
        ("side a", "H(y2)\nhard augmentation"),
        ("side b", "S(x)\nsoft augmentation"),
        ("side b", "N(y1)\nnormalised"),
        ("side b", "N(y2)\nnormalised"),
    ]


def test_local_crops_have_sides_of_their_own(store: ImageStore) -> None:
    columns = columns_of(store, name="multi-crop", local_crops=2)
    assert [group for group, _, _ in columns][-2:] == ["local side 1", "local side 2"]
    assert columns[-1][1] == "L2(x)\nsmall crop"
    assert columns[-1][2].shape == (5, 12, 12, 3)


@pytest.mark.parametrize("size", [28, 56])
def test_local_crops_are_those_of_the_training(size: int) -> None:
    pairs = build_pairs(ShowSettings(recipe="multi-crop", size=size, rows=2))
    training, _ = resolve(["--method", "dino", "--recipe", "multi-crop"])
    assert pairs.recipe.sides[-1][0].policy.size == make_recipe(training, size).sides[-1][0].policy.size
    assert next(iter(pairs)).sides[-1][0].shape[2] == size * 3 // 7


def drawn(path: Path) -> tuple[int, int]:
    """Width and height of a picture that is not blank."""
    picture = matplotlib.image.imread(path)
    assert picture[..., :3].std() > 0.05
    return picture.shape[1], picture.shape[0]


@pytest.mark.parametrize(
    ("settings", "columns"),
    [(ShowSettings(), 7), (ShowSettings(recipe="multi-crop"), 9), (ShowSettings(recipe="mimv", partners=2), 9)],
)
def test_the_sheet_is_a_picture(
    settings: ShowSettings, columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "views.png"
    show(ShowSettings(recipe=settings.recipe, partners=settings.partners, rows=2, output=str(path)))
    width, height = drawn(path)
    assert width == pytest.approx(100 * (1.55 * columns + 0.5), abs=2)
    assert height == pytest.approx(100 * (1.3 * 2 + 1.1), abs=2)
    assert "phantom (synthetic)" in capsys.readouterr().out


def test_a_grey_real_set(real_data: Path, tmp_path: Path) -> None:
    if not (real_data / "breastmnist.npz").is_file():
        pytest.skip(f"real data not found: no breastmnist.npz in {real_data}")
    path = tmp_path / "views.png"
    show(ShowSettings(data="breastmnist", root=str(real_data), rows=2, output=str(path)))
    drawn(path)


@pytest.mark.parametrize(
    "given", [{"recipe": "amimvv"}, {"data": "fantom"}, {"sampler": "balanced"}, {"preset": "smal"}, {"rows": 0}]
)
def test_bad_names_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        show(ShowSettings(**given))
