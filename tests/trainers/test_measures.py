"""Online measures: RankMe against a plain computation and known ranks, and what a run writes of them."""

import numpy as np
import pytest
import torch
from torch import nn

from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.methods.base import Encoder, Outcome
from amimv.pipelines import ImageStore
from amimv.trainers import measures
from amimv.trainers.measures import STEP_MEASURES, knn_on_val, rankme, rankme_of_train


def plain_rankme(embeddings: np.ndarray) -> float:
    """By NumPy's singular values."""
    values = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-sum(share * np.log(share) for share in shares)))


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (300, 64), (12, 12)])
def test_rankme_is_that_of_plain_singular_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    # Directions of sizes over four decades.
    z = (rng.normal(size=shape) * 10.0 ** np.linspace(0, -4, shape[1])).astype(np.float32)
    assert rankme(torch.from_numpy(z)) == pytest.approx(plain_rankme(z), rel=1e-6)
    assert rankme(torch.from_numpy(1000 * z)) == pytest.approx(plain_rankme(z), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_rankme_of_equal_singular_values_is_the_rank(rank: int) -> None:
    rows, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(60, rank)))
    columns, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(16, rank)))
    z = torch.from_numpy(5 * rows @ columns.T).float()
    assert rankme(z) == pytest.approx(rank, rel=1e-4)


def test_rankme_of_collapsed_embeddings_is_one() -> None:
    assert rankme(torch.ones(20, 1) * torch.randn(8)) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(20, 8)) == pytest.approx(1, rel=1e-4)


@pytest.fixture
def looked_at() -> tuple[Encoder, BackboneSpec, ImageStore]:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSpec(size=16))
    projector = nn.Sequential(nn.Linear(128, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    store = ImageStore.from_arrays(images, None)
    return Encoder(backbone, projector), BackboneSpec(size=16, mean=store.mean, std=store.std), store


def test_rankme_of_train_is_of_the_projections_and_needs_no_labels(
    looked_at: tuple[Encoder, BackboneSpec, ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, spec, store = looked_at
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    pixels = store.gather(torch.arange(10)).float() / 255
    views = (pixels - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    encoder.eval()
    with torch.no_grad():
        z = encoder([[views.permute(0, 3, 1, 2)]]).z[0]
    encoder.train()
    found = rankme_of_train(*looked_at, None)
    assert found is not None
    assert found.values["rankme"] == pytest.approx(plain_rankme(z.numpy()), rel=1e-4)
    monkeypatch.setattr(measures, "RANKED", 4)
    some = rankme_of_train(*looked_at, None)
    assert some is not None
    assert some.values["rankme"] == pytest.approx(plain_rankme(z[[0, 2, 5, 7]].numpy()), rel=1e-4), "evenly spaced"
    # The training goes on as if nobody had looked.
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert knn_on_val(*looked_at, None) is None
    with torch.no_grad():
        encoder.projector[0].weight.fill_(torch.inf)
    assert rankme_of_train(*looked_at, None) is None


def test_the_spread_is_of_rows_of_length_one() -> None:
    spread = STEP_MEASURES["embedding_std"](Outcome(torch.tensor(1.0), torch.tensor([[3.0, 0.0], [0.0, 0.1]])))
    assert spread == pytest.approx(2**-0.5)
