"""Stores of torch and Hugging Face data sets: pixels, columns, class names, resizing; one line for what is wrong."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from amimv import InputError
from amimv.pipelines import ImageStore, PairLoader
from amimv.pipelines.sources.labels import MULTI_LABEL

N, HEIGHT, WIDTH = 9, 10, 14
PIXELS = np.random.default_rng(0).integers(0, 256, (N, HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = np.ascontiguousarray(PIXELS[..., 0])
LABELS = [i % 3 for i in range(N)]
from_dataset = ImageStore.from_dataset


class Listed(Dataset[Any]):
    """A torch data set that has what it is given."""

    def __init__(self, examples: Sequence[Any], classes: Sequence[str] | None = None) -> None:
        self.examples = examples
        if classes is not None:
            self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield PIXELS[0]


class Sample(NamedTuple):
    scan: Any
    grade: int


def refused(message: str, *args: Any, **settings: Any) -> None:
    """One short line that matches."""
    with pytest.raises(InputError, match=message) as caught:
        from_dataset(*args, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def stored(store: ImageStore) -> np.ndarray:
    return store.gather(torch.arange(len(store))).numpy()


# Pixels


@pytest.mark.parametrize("wrap", [list, Listed, lambda examples: Subset(Listed(examples), range(N))])
@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (lambda i: Image.fromarray(PIXELS[i]), PIXELS),
        (lambda i: Image.fromarray(GREY[i]), GREY[..., None]),
        (lambda i: PIXELS[i], PIXELS),
        (lambda i: GREY[i], GREY[..., None]),
        (lambda i: PIXELS[i].astype(np.uint16) * 100, PIXELS.astype(np.uint16) * 100),
        (lambda i: PIXELS[i] / 255, (PIXELS / 255).astype(np.float32)),
        (lambda i: torch.from_numpy(PIXELS[i]), PIXELS),
        (lambda i: torch.from_numpy(PIXELS[i]).permute(2, 0, 1), PIXELS),  # as torchvision has them
        (lambda i: torch.from_numpy(GREY[i])[None], GREY[..., None]),
        (lambda i: torch.from_numpy(PIXELS[i]).permute(2, 0, 1) / 255, (PIXELS / np.float32(255))),
        (lambda i: (torch.from_numpy(PIXELS[i]) > 99).bfloat16(), (PIXELS > 99).astype(np.float32)),
        (lambda i: torch.from_numpy(PIXELS[i]).float().div(255).requires_grad_(), PIXELS / np.float32(255)),
    ],
    ids=[
        *("PIL", "PIL grey", "array", "array grey", "16 bits", "float64", "tensor HWC", "tensor CHW", "tensor 1HW"),
        *("tensor CHW float", "bfloat16", "with gradient"),
    ],
)
def test_tuples_of_images_of_every_kind(
    of: Callable[[int], Any], expected: np.ndarray, wrap: Callable[[list[Any]], Any]
) -> None:
    store = from_dataset(wrap([(of(i), label) for i, label in enumerate(LABELS)]), label=1)
    assert np.array_equal(stored(store), expected)
    assert stored(store).dtype == expected.dtype
    assert store.labels is not None
    assert store.labels.tolist() == LABELS
    assert (store.class_names, store.task) == (("0", "1", "2"), "multi-class")


@pytest.mark.parametrize("channels", [2, 5, 8])
def test_channels_first_of_any_number(channels: int) -> None:
    # Eight rows and as many columns as there are channels are no less likely, so that eight are of square images.
    images = torch.randint(0, 256, (4, channels, 20, 20 if channels == 8 else 16), dtype=torch.uint8)
    expected = images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(stored(from_dataset(TensorDataset(images))), expected)
    assert np.array_equal(stored(from_dataset(TensorDataset(images.permute(0, 2, 3, 1)))), expected)


@pytest.mark.parametrize(
    ("mode", "channels"),
    [
        ("1", 1),
        ("L", 1),
        ("LA", 1),
        ("P", 3),
        ("RGB", 3),
        ("RGBA", 3),
        ("CMYK", 3),
        ("YCbCr", 3),
        ("I;16", 1),
        ("F", 1),
    ],
)
def test_every_mode_of_pil(mode: str, channels: int) -> None:
    image = Image.fromarray(PIXELS[0])
    if mode == "I;16":
        image = Image.fromarray(GREY[0].astype(np.uint16) * 200)
    elif mode == "F":
        image = Image.fromarray(GREY[0].astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    store = from_dataset([(image,)] * 3)
    assert store.images.shape == (3, HEIGHT, WIDTH, channels)
    wide = {"I;16": (torch.uint16, GREY[0].astype(np.uint16) * 200), "F": (torch.float32, GREY[0] / np.float32(255))}
    kind, expected = wide.get(mode, (torch.uint8, np.asarray(image.convert("L" if channels == 1 else "RGB"))))
    assert store.images.dtype == kind
    assert np.array_equal(stored(store)[1].squeeze(), expected)


@pytest.mark.parametrize("of", [Image.fromarray, torch.from_numpy, np.asarray])
@pytest.mark.parametrize("place", ["image", 0])
def test_examples_that_are_images_alone(of: Callable[[Any], Any], place: str | int) -> None:
    store = from_dataset(Listed([of(image) for image in PIXELS]), place)
    assert np.array_equal(stored(store), PIXELS)
    assert (store.labels, store.class_names) == (None, ())
    assert sum(1 for _ in PairLoader(store, "mimv", 4)) == 2


# Resizing


@pytest.mark.parametrize("size", [5, 8, 20])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_images_of_several_shapes_are_resized_and_cropped_as_pil_does(kind: str, size: int) -> None:
    # Smooth, as photographs are.
    shapes = [(40, 60), (60, 40), (33, 33), (size, size)]
    pictures = [Image.fromarray(PIXELS[i, :4, :5]).resize((w, h), Image.BICUBIC) for i, (h, w) in enumerate(shapes)]
    scale = {"uint8": 1, "uint16": 257, "float32": 1 / 255}[kind]
    store = from_dataset([{"image": (np.asarray(p) * np.float64(scale)).astype(kind)} for p in pictures], size=size)
    assert store.images.shape == (4, size, size, 3)
    assert store.images.dtype == getattr(torch, kind)
    for got, picture in zip(stored(store), pictures, strict=True):
        factor = size / min(picture.size)
        wide, high = (round(side * factor) for side in picture.size)
        left, top = (wide - size) // 2, (high - size) // 2
        resized = picture.resize((wide, high), Image.BILINEAR)
        expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(np.float64)
        assert np.abs(got / scale - expected).max() <= 1.5
    assert np.array_equal(stored(store)[3], (np.asarray(pictures[3]) * np.float64(scale)).astype(kind))


def test_shrinking_is_antialiased() -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(stored(from_dataset([(checks,)], size=16)).astype(float) - 127.5).max() < 10  # else 0 or 255


# Columns


def test_dictionaries() -> None:
    examples = [{"scan": PIXELS[i], "grade": LABELS[i], "patient": i // 2, "other": None} for i in range(N)]
    store = from_dataset(examples, "scan", "grade", "patient", name="scans", split="val", class_names=list("abc"))
    assert store.labels is not None
    assert store.groups is not None
    assert (store.labels.tolist(), store.class_names) == (LABELS, ("a", "b", "c"))
    assert (store.groups[1:] == store.groups[:-1]).tolist() == [i % 2 == 0 for i in range(N - 1)]
    assert (store.name, store.split) == ("scans", "val")
    plain = from_dataset(examples, "scan")
    assert (plain.labels, plain.groups) == (None, None)
    window = from_dataset(examples, "scan", value_range=(10, 90), resident=False)
    assert window.value_range == (10, 90)


def test_tuples_by_place_and_by_the_names_of_the_first_two() -> None:
    three = [(LABELS[i], PIXELS[i], [i // 2]) for i in range(N)]
    for image, label in ((1, 0), (-2, -3)):
        store = from_dataset(three, image, label)
        assert store.labels is not None
        assert (stored(store) == PIXELS).all()
        assert store.labels.tolist() == LABELS
    pairs = TensorDataset(torch.from_numpy(PIXELS), torch.tensor(LABELS))
    for label in ("label", 1):
        store = from_dataset(pairs, label=label)
        assert store.labels is not None
        assert store.labels.tolist() == LABELS
    named = from_dataset([Sample(PIXELS[i], LABELS[i]) for i in range(N)], 0, 1)
    assert np.array_equal(stored(named), PIXELS)


def test_labels_of_several_columns() -> None:
    hot = np.random.default_rng(1).integers(0, 2, (N, 4))
    for rows in (hot, hot.tolist(), torch.from_numpy(hot)):
        store = from_dataset([(PIXELS[i], rows[i]) for i in range(N)], label=1)
        assert store.labels is not None
        assert (store.labels.tolist(), store.task) == (hot.tolist(), MULTI_LABEL)


def test_the_names_of_the_classes_of_a_torchvision_data_set_come_along() -> None:
    examples = [(Image.fromarray(PIXELS[i]), LABELS[i]) for i in range(N)]
    named = Listed(examples, ["mel", "nv", "bcc"])
    assert from_dataset(named, label=1).class_names == ("mel", "nv", "bcc")
    assert from_dataset(named, label=1, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    assert from_dataset(named).class_names == ()
    refused(r"labels reach from 0 to 2, expected 0\.\.1 \(2 classes\)", Listed(examples, ["mel", "nv"]), label=1)


def test_torchvisions_own(tmp_path: Any) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for i in range(N):
        place = tmp_path / "abc"[LABELS[i]]
        place.mkdir(exist_ok=True)
        Image.fromarray(PIXELS[i]).save(place / f"{i}.png")
    store = from_dataset(datasets.ImageFolder(tmp_path), label=1)
    assert (store.class_names, store.class_counts()) == (("a", "b", "c"), [3, 3, 3])
    assert np.array_equal(stored(store), PIXELS[[0, 3, 6, 1, 4, 7, 2, 5, 8]])


# Hugging Face


@pytest.fixture
def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    names = datasets.ClassLabel(names=["mel", "nv", "bcc"])
    columns = {"image": datasets.Image(), "label": names, "patient": datasets.Value("string")}
    rows = {"image": list(map(Image.fromarray, PIXELS)), "label": LABELS, "patient": [f"p{i // 2}" for i in range(N)]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))


def test_a_hugging_face_data_set(hugging_face: Any) -> None:
    store = from_dataset(hugging_face, label="label")
    assert np.array_equal(stored(store), PIXELS)
    assert store.labels is not None
    assert (store.labels.tolist(), store.class_names) == (LABELS, ("mel", "nv", "bcc"))
    assert from_dataset(hugging_face).labels is None
    assert from_dataset(hugging_face, size=6).images.shape == (N, 6, 6, 3)
    assert np.array_equal(stored(from_dataset(hugging_face.select([4, 2]))), PIXELS[[4, 2]])
    batch = next(iter(PairLoader(store, "amimv", 4, "class-balanced")))
    assert batch.sides[0][0].shape == (4, 3, HEIGHT, HEIGHT)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_hugging_face_data_set_in_other_formats(hugging_face: Any, kind: str) -> None:
    store = from_dataset(hugging_face.with_format(kind), label="label")
    assert np.array_equal(stored(store), PIXELS)
    assert store.class_names == ("mel", "nv", "bcc")


def test_what_is_wrong_with_a_hugging_face_data_set(hugging_face: Any) -> None:
    datasets = pytest.importorskip("datasets")
    refused("no column 'imgae', only image, label, patient, did you mean image", hugging_face, "imgae")
    refused("no column 'lable', .*did you mean label", hugging_face, label="lable")
    refused(
        r"column 'patient' holds no image \(example 0 has a str\), expected PIL's, arrays", hugging_face, "patient"
    )
    refused("labels are text, expected integers", hugging_face, label="patient")
    refused("several data sets by name, train, test: give one of them", hugging_face.train_test_split(3, seed=0))
    refused("IterableDataset has no length: expected a data set that is", hugging_face.to_iterable_dataset())
    refused("the data set is empty", hugging_face.select([]))
    listed = datasets.Dataset.from_dict({"image": PIXELS.tolist()})
    refused(r"column 'image' holds no image \(example 0 has a list\)", listed)


# What can be wrong


def test_a_data_set_that_is_none() -> None:
    refused("the data set is empty: expected at least one example", [])
    refused("the data set is empty", Listed([]))
    refused("a Endless has no length: expected a data set that is sized and indexed", Endless())
    refused("several data sets by name, train, val: give one", {"train": Listed([]), "val": Listed([])})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("scan.png", "column 'image' holds no image .example 0 has a str., expected PIL's, arrays or tensors"),
        (b"\x89PNG", "has a bytes"),
        (7, "has a int"),
        (None, "has a NoneType"),
        (GREY[0].tolist(), "has a list"),
        (PIXELS[0].astype(np.int64), r"has \(10, 14, 3\) int64\), expected \(H, W, C\)"),
        (PIXELS[0] > 9, "has .* bool"),
        (np.zeros(9, np.uint8), r"has \(9,\) uint8"),
        (PIXELS[None, 0], r"has \(1, 10, 14, 3\) uint8"),
        (torch.tensor(3.0), r"has \(\) float32"),
    ],
)
def test_a_column_that_holds_no_image(entry: Any, message: str) -> None:
    refused(message, [{"image": entry}])


def test_columns_that_are_not_there() -> None:
    rows = [{"img": PIXELS[0], "target": 1}]
    refused("the data set has no column 'image', only img, target, did you mean img", rows)
    refused("no column 'targets', only img, target, did you mean target", rows, "img", "targets")
    refused("no column 'patient', only img, target$", rows, "img", group="patient")
    pairs = [(PIXELS[0], 1)]
    refused("example 0 has 2 entries, so there is none at place 2", pairs, label=2)
    refused("example 0 is a tuple, which has no column 'target': give a place such as image=0", pairs, label="target")
    refused("has no column 'label'", Listed(list(map(Image.fromarray, PIXELS))), label="label")


def test_images_of_several_shapes_or_types() -> None:
    mixed = [(PIXELS[0],), (PIXELS[1],), (PIXELS[2, :5],)]
    refused(r"image 2 is \(5, 14, 3\) uint8, the first \(10, 14, 3\) uint8: give size=..., or convert them", mixed)
    assert from_dataset(mixed, size=5).images.shape == (3, 5, 5, 3)
    colours = [(Image.fromarray(PIXELS[0]),), (Image.fromarray(GREY[1]),)]
    refused(r"image 1 is \(10, 14, 1\) uint8, the first \(10, 14, 3\) uint8: give size", colours)
    refused(r"image 1 is \(5, 5, 1\) uint8, the first \(5, 5, 3\) uint8: convert them to one kind", colours, size=5)
    refused(r"image 1 is .* float32, the first .* uint8", [(PIXELS[0],), (PIXELS[0] / np.float32(255),)])
    for size in (0, -4):
        refused(f"size is {size}, expected at least 1 pixel", mixed, size=size)


def test_values_labels_and_groups_that_are_wrong() -> None:
    floats = [(PIXELS[i].astype(np.float32), LABELS[i]) for i in range(N)]
    refused(r"float images reach from 0 to 255, expected \[0, 1\]", floats)
    nan = [(np.full((8, 8), np.nan, np.float32),)]
    refused("images hold NaN or infinity", nan)
    for label, message in (
        ("mel", "labels are text"),
        (None, "are Python objects"),
        (0.5, "float64, expected integers"),
    ):
        refused(message, [(image, label) for image in PIXELS], label=1)
    ragged = [(image, [1] * (1 + i % 2)) for i, image in enumerate(PIXELS)]
    refused("labels are several lengths or shapes", ragged, label=1)
    refused(
        "task 'binary-class' needs 2 classes, arrays has 3",
        floats[:0] + [(PIXELS[i], i % 3) for i in range(N)],
        label=1,
        task="binary-class",
    )
