"""Image stores: the three sources, their statistics, and one clear line for each thing that can be wrong."""

import hashlib
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import medmnist
import numpy as np
import pytest
import torch

from amimv import InputError
from amimv.pipelines.images import ResidentImages
from amimv.pipelines.longtail import long_tail
from amimv.pipelines.sources.load import load_store
from amimv.pipelines.sources.npz import NotDownloaded, medmnist_names
from amimv.pipelines.sources.pixels import channel_statistics
from amimv.pipelines.store import ImageStore

REAL = Path(os.environ.get("AMIMV_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "medmnist")


def real(file: str) -> Path:
    """The path of a real file; the test is skipped without it."""
    if not (REAL / file).is_file():
        pytest.skip(f"needs {file} in AMIMV_DATA or ../shared/medmnist")
    return REAL / file


def arrays(n: int = 12, size: int = 8, channels: int = 3, classes: int = 3) -> dict[str, np.ndarray]:
    """A small data set in MedMNIST's layout."""
    rng = np.random.default_rng(0)
    out = {}
    for split, m in (("train", n), ("val", n // 2), ("test", n)):
        out[f"{split}_images"] = rng.integers(0, 256, (m, size, size, channels), dtype=np.uint8)
        out[f"{split}_labels"] = (np.arange(m) % classes).astype(np.uint8)[:, None]
    return out


def write(path: Path, changed: dict | None = None, **settings: int) -> Path:
    """Save ``arrays(**settings)``, some replaced, or left out where the value is None."""
    merged = {**arrays(**settings), **(changed or {})}
    np.savez(path, **{key: value for key, value in merged.items() if value is not None})
    return path


def refused(message: str, *args: object, **kwargs: object) -> None:
    """Loading fails with one line that matches."""
    with pytest.raises(InputError, match=message) as caught:
        load_store(*args, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# MedMNIST and other real files


@pytest.mark.parametrize(
    ("name", "size", "shape", "counts", "task"),
    [
        ("retinamnist", None, (1080, 28, 28, 3), [486, 128, 206, 194, 66], "ordinal-regression"),
        ("breastmnist", 28, (546, 28, 28, 1), [147, 399], "binary-class"),
        ("breastmnist", 64, (546, 64, 64, 1), [147, 399], "binary-class"),
    ],
)
def test_official_files(
    name: str, size: int | None, shape: tuple, counts: list[int], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = name + (f"_{size}" if size == 64 else "") + ".npz"
    monkeypatch.setenv("AMIMV_DATA", str(real(file).parent))
    store = load_store(name, size=size)
    assert store.images.shape == shape
    assert (len(store), store.size, store.channels) == (shape[0], shape[1], shape[3])
    assert store.images.dtype == torch.uint8
    assert store.images.tensor.is_contiguous()
    assert store.class_counts() == counts
    assert isinstance(store.images, ResidentImages)
    assert (store.n_classes, store.task, store.multi_label) == (len(counts), task, False)
    with np.load(REAL / file) as npz:
        assert np.array_equal(store.images.tensor.numpy().squeeze(), npz["train_images"])
        assert np.array_equal(store.labels.numpy(), npz["train_labels"][:, 0])
        assert len(load_store(name, "test", size=size)) == len(npz["test_labels"])


def test_ham10000_by_path() -> None:
    path = real("ham10000_28.npz")
    store = load_store(path)
    assert store.class_counts() == [228, 359, 769, 80, 779, 4693, 99]
    assert (store.name, store.task, store.n_classes) == ("ham10000_28", "multi-class", 7)
    assert len(load_store(str(path), "val")) == 1003
    tail = store.subset(long_tail(store.labels, rho=1000))
    assert tail.class_counts() == [46, 148, 469, 4, 779, 4693, 14]


def test_the_root_argument_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = real("retinamnist.npz").parent
    monkeypatch.setenv("AMIMV_DATA", str(tmp_path))
    assert len(load_store("retinamnist", "val", root=root)) == 120
    refused("there is no folder .*nowhere", "retinamnist", root=tmp_path / "nowhere")


def test_wrong_md5_names_both_sums(tmp_path: Path) -> None:
    (tmp_path / "retinamnist.npz").write_bytes(real("retinamnist.npz").read_bytes()[:-1000])
    refused("MD5 [0-9a-f]{32}, expected bd4c0672f1bba3e3a89f0e4e876791e4", "retinamnist", root=tmp_path)


def test_the_md5_is_computed_once_for_all_splits_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "retinamnist.npz"
    write(path, size=28, classes=5)
    content = path.read_bytes()
    digest, read = hashlib.file_digest, []
    monkeypatch.setattr("hashlib.file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    monkeypatch.setitem(medmnist.INFO["retinamnist"], "MD5", hashlib.md5(content).hexdigest())
    for split in ("train", "val", "test"):
        load_store("retinamnist", split, root=tmp_path)
    assert read == [str(path)]
    status = path.stat()
    path.write_bytes(content[:-1] + b"x")  # as long as before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refused("MD5 [0-9a-f]{32}, expected", "retinamnist", root=tmp_path)
    path.write_bytes(content[:-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused("MD5 [0-9a-f]{32}, expected", "retinamnist", root=tmp_path)


def test_a_missing_file_is_downloaded_by_medmnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = real("breastmnist_64.npz").read_bytes()

    def download(data_set: medmnist.dataset.MedMNIST) -> None:
        (Path(data_set.root) / f"{data_set.flag}{data_set.size_flag}.npz").write_bytes(content)

    monkeypatch.setattr(medmnist.dataset.MedMNIST, "download", download)
    assert load_store("breastmnist", size=64, root=tmp_path).class_counts() == [147, 399]


def test_a_failing_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(_: medmnist.dataset.MedMNIST) -> None:
        raise RuntimeError("\n  several\n  lines")

    monkeypatch.setattr(medmnist.dataset.MedMNIST, "download", download)
    where = r"pathmnist_128.npz is missing and could not be downloaded: fetch https://zenodo\S+pathmnist_128.npz"
    with pytest.raises(NotDownloaded, match=where) as caught:
        load_store("pathmnist", size=128, root=tmp_path)
    assert "\n" not in str(caught.value)


def test_names_and_sizes() -> None:
    assert len(medmnist_names()) == 12
    assert not any("3d" in name for name in medmnist_names())
    refused(r"unknown data set 'RetinaMINST' \(did you mean retinamnist", "RetinaMINST")
    refused("expected phantom, pathmnist, .*path of an .npz", "qqq")
    refused("unknown data set 'organmnist3d'", "organmnist3d")
    refused("retinamnist has no size 32, expected one of 28, 64, 128, 224", "retinamnist", size=32)
    refused("no size 0", "retinamnist", size=0)


@pytest.mark.parametrize("name", ["chestmnist", "organamnist", "tissuemnist"])
def test_official_labels_are_checked_against_the_info(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = len(medmnist.INFO[name]["label"])
    multi = name == "chestmnist"
    labels = np.eye(columns, dtype=np.uint8) if multi else np.arange(columns, dtype=np.uint8)[:, None]
    images = np.zeros((columns, 28, 28), dtype=np.uint8)
    monkeypatch.setattr("amimv.pipelines.sources.npz._check_md5", lambda path, md5: None)
    np.savez(tmp_path / f"{name}.npz", train_images=images, train_labels=labels)
    store = load_store(name, root=tmp_path)
    assert store.multi_label == multi
    assert store.class_names == tuple(medmnist.INFO[name]["label"].values())
    assert store.class_counts() == [1] * columns
    assert store.images.shape == (columns, 28, 28, 1)
    np.savez(tmp_path / f"{name}.npz", train_images=images, train_labels=labels + 1)
    refused("train_labels out of range", name, root=tmp_path)


# Own files


def test_own_file(tmp_path: Path) -> None:
    store = load_store(write(tmp_path / "mine.npz", n=12, size=8, classes=3), "val")
    assert (store.name, store.split, store.task) == ("mine", "val", "multi-class")
    assert (store.size, store.channels, len(store)) == (8, 3, 6)
    assert store.class_names == ("0", "1", "2")
    assert store.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert "Tensor" not in repr(store)
    refused("holds images of 8 pixels, not of 28", tmp_path / "mine.npz", size=28)


def tagged(path: Path, value: int) -> Path:
    """A file whose training images all have this value."""
    path.parent.mkdir(exist_ok=True)
    return write(path, {"train_images": np.full((12, 8, 8, 3), value, dtype=np.uint8)})


def value_of(name: str | Path, **kwargs: object) -> int:
    store = load_store(name, **kwargs)  # type: ignore[arg-type]
    (value,) = store.gather(torch.arange(len(store))).unique().tolist()
    return int(value)


def test_an_own_file_is_looked_for_beside_medmnists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, root, environment = (tmp_path / name for name in ("here", "root", "environment"))
    here.mkdir()
    monkeypatch.chdir(here)
    tagged(root / "ham.npz", 1)
    tagged(environment / "ham.npz", 2)
    monkeypatch.delenv("AMIMV_DATA", raising=False)
    refused("there is no file ham.npz", "ham.npz")
    assert value_of("ham.npz", root=root) == value_of(Path("ham.npz"), root=str(root)) == 1
    monkeypatch.setenv("AMIMV_DATA", str(environment))
    assert value_of("ham.npz") == 2
    assert load_store("ham.npz").name == "ham"
    assert value_of("ham.npz", root=root) == 1, "the argument goes before the environment"
    refused("there is no file other.npz: expected an .npz", "other.npz", root=root)
    # A path stays what it is, and so does a file of that name in the working folder.
    refused("there is no file .*nowhere.ham.npz", tmp_path / "nowhere" / "ham.npz", root=root)
    assert value_of(environment / "ham.npz", root=root) == 2
    tagged(here / "ham.npz", 3)
    assert value_of("ham.npz") == value_of("ham.npz", root=root) == 3
    tagged(root / "sub" / "deep.npz", 4)
    assert value_of("sub/deep.npz", root=root) == 4


def test_shapes_that_are_accepted(tmp_path: Path) -> None:
    grey = np.zeros((4, 6, 6), dtype=np.uint8)
    flat = np.array([0, 1, 1, 0], dtype=np.int32)
    path = tmp_path / "x.npz"
    np.savez(path, train_images=np.asfortranarray(grey), train_labels=flat)
    store = load_store(path, size=6)
    assert store.images.shape == (4, 6, 6, 1)
    assert store.images.tensor.is_contiguous()
    assert store.labels.dtype == torch.int64
    assert store.task == "binary-class"
    refused("no array 'test_images', only train_images, train_labels", path, "test")


def test_channels(tmp_path: Path) -> None:
    grey, colour = write(tmp_path / "grey.npz", channels=1), write(tmp_path / "colour.npz")
    assert load_store(grey).channels == load_store(grey, channels=1).channels == 1
    wide = load_store(grey, channels=3)
    assert wide.images.tensor.is_contiguous()
    for c in range(3):
        assert torch.equal(wide.images.tensor[..., c], load_store(grey).images.tensor[..., 0])
    assert len(wide.mean) == len(wide.std) == 3
    assert load_store(colour, channels=3).channels == 3
    refused("channels is 1, but colour is RGB", colour, channels=1)
    refused("channels is 2, expected 1, 3 or None", colour, channels=2)


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    changed = {"train_labels": np.arange(12) % 2, "test_labels": np.arange(12) % 4}
    store = load_store(write(tmp_path / "x.npz", changed))
    assert store.n_classes == 4
    assert store.class_counts() == [6, 6, 0, 0]
    with pytest.raises(InputError, match="no image of class 2, 3"):
        long_tail(store.labels, n_classes=store.n_classes)


def test_multi_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    hot = {f"{s}_labels": rng.integers(0, 2, (m, 5)) for s, m in (("train", 12), ("val", 6), ("test", 12))}
    path = write(tmp_path / "x.npz", hot)
    store = load_store(path)
    assert (store.multi_label, store.n_classes, store.task) == (True, 5, "multi-label, binary-class")
    assert store.labels.shape == (12, 5)
    assert store.class_counts() == [sum(row[c] for row in hot["train_labels"].tolist()) for c in range(5)]
    refused("does not fit the labels of x, which are multi-hot", path, task="multi-class")
    bad = {**hot, "val_labels": hot["val_labels"] * 2}
    refused(r"val_labels out of range: expected 0\.\.1", write(tmp_path / "y.npz", bad))
    narrow = {**hot, "test_labels": hot["test_labels"][:, :4]}
    refused("labels differ in shape", write(tmp_path / "z.npz", narrow))


def test_task(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz")
    assert load_store(path, task="ordinal-regression").task == "ordinal-regression"
    refused(r"unknown task 'multiclass': did you mean multi-class", path, task="multiclass")
    refused("'binary-class' needs 2 classes, x has 3", path, task="binary-class")
    refused("which are one class per image", path, task="multi-label, binary-class")


IMAGES = arrays()["train_images"]
LABELS = arrays()["train_labels"]
NAN = np.full((12, 8, 8, 3), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": None}, "has no array 'train_images', only train_labels, val_images"),
        ({"train_images": IMAGES.astype(object)}, r"train_images holds Python objects \(pickled\)"),
        ({"train_labels": LABELS.astype(object)}, r"train_labels holds Python objects \(pickled\)"),
        ({"train_images": NAN}, "train_images holds NaN"),
        ({"train_labels": np.full(12, np.nan)}, "train_labels holds NaN"),
        ({"train_images": IMAGES / 25.5}, r"float images reach from 0 to 10, expected \[0, 1\]: scale them, or give"),
        ({"train_images": IMAGES.astype(np.int64)}, "train_images is int64, expected uint8, uint16 or float"),
        ({"train_images": IMAGES.astype(bool)}, "train_images is bool, expected uint8, uint16 or float"),
        (
            {"train_images": IMAGES.transpose(0, 3, 1, 2)},
            r"has shape \(12, 3, 8, 8\), expected channels last: \(N, H, W",
        ),
        ({"train_images": IMAGES[:, 0, 0]}, r"has shape \(12, 3\), expected"),
        ({"train_labels": LABELS.astype(np.float32)}, "train_labels is float32, expected integers"),
        ({"train_labels": LABELS[:, :, None]}, r"train_labels has shape \(12, 1, 1\), expected"),
        ({"train_labels": np.array(1)}, r"train_labels has shape \(\), expected"),
        ({"train_labels": LABELS.astype(np.int64) - 1}, "labels out of range: .* found -1, 0, 1, 2"),
        ({"train_labels": LABELS + 7}, "labels out of range: expected classes 0..C-1 without a gap"),
        ({"train_labels": LABELS[:-1]}, "12 images, but train_labels has 11 labels"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train_images is empty"),
    ],
)
def test_broken_arrays_are_refused_in_one_line(tmp_path: Path, changed: dict, message: str) -> None:
    refused(message, write(tmp_path / "x.npz", changed))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    refused("there is no file", path)
    path.write_bytes(b"")
    refused("cannot be read as an .npz", path)
    path.write_text("not a zip at all")
    refused("cannot be read as an .npz", path)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    refused("is a single array", path)
    write(path)
    path.write_bytes(path.read_bytes()[:-100])
    refused("cannot be read as an .npz", path)
    # A bit flipped inside an array: the zip's own checksum finds it.
    write(path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    refused("cannot be read as an .npz", path)


def test_bad_split_and_device(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz")
    refused("unknown split 'valid', expected one of train, val, test", path, "valid")
    if not torch.cuda.is_available():
        refused("PyTorch finds no CUDA device", path, device="cuda")


# The phantom


def test_phantom_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate_phantom(split: str, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append({"split": split, **settings})
        return torch.full((5, 28, 28, 3), 51, dtype=torch.uint8), torch.tensor([0, 1, 1, 0, 0])

    fake = ModuleType("phantom")
    fake.CLASS_NAMES, fake.generate_phantom = ("disc", "ring"), generate_phantom  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amimv.pipelines.sources.phantom", fake)
    store = load_store("phantom", "val", seed=7)
    assert asked == [{"split": "val", "seed": 7, "size": 28, "device": torch.device("cpu")}]
    assert (store.name, store.class_names, store.task) == ("phantom", ("disc", "ring"), "multi-class")
    assert store.class_counts() == [3, 2]
    assert store.mean == pytest.approx((0.2,) * 3)
    assert store.std == (1 / 255,) * 3  # constant, yet it can be divided by


def test_phantom_itself() -> None:
    train, val = load_store("phantom", seed=1), load_store("phantom", "val", seed=1)
    assert train.images.shape[1:] == (28, 28, 3)
    assert min(train.class_counts()) > 0
    assert len(val.class_counts()) == train.n_classes == len(train.class_names)


# Statistics, subsets, gathering


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_equal_float64(channels: int) -> None:
    images = torch.randint(0, 256, (40, 9, 9, channels), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    images[..., 0] //= 3
    mean, std = channel_statistics(images)
    scaled = images.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(scaled.mean((0, 1, 2)), rel=1e-12)
    assert std == pytest.approx(scaled.std((0, 1, 2)), rel=1e-12)


def test_statistics_do_not_depend_on_the_chunks() -> None:
    # 40 images of 224 pixels are three chunks.
    images = torch.arange(256, dtype=torch.uint8).repeat(40 * 224 * 224 * 3 // 256 + 1)
    images = images[: 40 * 224 * 224 * 3].view(40, 224, 224, 3)
    mean, std = channel_statistics(images)
    for c in range(3):
        counts = np.bincount(images[..., c].flatten().numpy(), minlength=256)
        values = np.arange(256) / 255
        expected = (counts * values).sum() / counts.sum()
        assert mean[c] == pytest.approx(expected, rel=1e-12)
        variance = (counts * (values - expected) ** 2).sum() / counts.sum()
        assert std[c] == pytest.approx(variance**0.5, rel=1e-12)


def test_statistics_of_a_grey_set() -> None:
    store = load_store("breastmnist", root=real("breastmnist.npz").parent)
    with np.load(REAL / "breastmnist.npz") as npz:
        scaled = npz["train_images"].astype(np.float64) / 255
    assert (store.mean[0], store.std[0]) == pytest.approx((scaled.mean(), scaled.std()), rel=1e-12)


@pytest.fixture(params=[True, False], ids=["resident", "host"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    return load_store(write(tmp_path / "x.npz"), resident=request.param)


def test_gather_takes_any_shape(store: ImageStore) -> None:
    indices = torch.tensor([[3, 3, 0], [11, 7, 1]])
    batch = store.gather(indices)
    assert (batch.dtype, batch.device, batch.shape) == (torch.uint8, store.device, (2, 3, 8, 8, 3))
    for i in range(2):
        for j in range(3):
            assert np.array_equal(batch[i, j].numpy(), IMAGES[indices[i, j]])
    assert torch.equal(store.gather(torch.tensor(5)), store.images.tensor[5])
    assert store.gather(indices[:0]).shape == (0, 3, 8, 8, 3)


def test_subset(store: ImageStore) -> None:
    chosen = store.subset(torch.tensor([2, 5, 7]))
    assert type(chosen.images) is type(store.images)
    assert np.array_equal(chosen.images.tensor.numpy(), IMAGES[[2, 5, 7]])
    assert chosen.labels.tolist() == [2, 2, 1]
    assert chosen.class_counts() == [0, 1, 2]
    scaled = IMAGES[[2, 5, 7]] / 255
    assert chosen.mean == pytest.approx(scaled.mean((0, 1, 2)))
    assert chosen.std == pytest.approx(scaled.std((0, 1, 2)))
    assert (chosen.name, chosen.n_classes, len(chosen)) == (store.name, 3, 3)
    assert len(store) == 12
    assert dict(Counter(store.labels.tolist())) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 12]), "reach from 0 to 12, but x has 12 images"),
        (torch.tensor([-1, 2]), "reach from -1"),
        (torch.tensor([], dtype=torch.int64), "at least one"),
        (torch.tensor([True] * 12), "type int64"),
        (torch.tensor([[1]]), r"shape \(M,\)"),
    ],
)
def test_bad_subsets(tmp_path: Path, indices: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_store(write(tmp_path / "x.npz")).subset(indices)


@pytest.mark.parametrize(("free", "fits"), [(1000, True), (900, False)])
def test_what_does_not_fit_stays_on_the_host_and_says_so(
    free: int, fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from amimv.pipelines.images import _fits

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    images = torch.zeros(600, 1, 1, 1, dtype=torch.uint8)
    assert _fits(images, torch.device("cuda", 0), "x") is fits
    assert [("stays in host memory" in r.getMessage(), r.name) for r in caplog.records] == (
        [] if fits else [(True, "amimv")]
    )
    assert _fits(images, torch.device("cpu"), "x")
