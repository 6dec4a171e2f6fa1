"""Two processes on one machine see the same batch, the same loss and the same gradients as one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.distributed import gather_rows
from amimv.models.heads import build_mlp
from amimv.models.methods import METHODS
from amimv.pipelines.loader import PairLoader
from amimv.pipelines.recipes import get_recipe
from amimv.pipelines.stores import ImageStore

WORLD = 2
BATCH = 12
CASES = (
    ("mimv", "mimv", False),
    ("mimv", "multi-crop", True),
    ("simclr", "two-view", False),
    ("simclr", "multi-crop", True),
)


def build_store() -> ImageStore:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 16, 16, 3), generator=generator, dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    cpu = torch.device("cpu")
    return ImageStore(images, torch.arange(30) % 3, "random", "train", ("a", "b", "c"), "multi-class", cpu, half, half)


class Plain(nn.Module):
    """A network without batch statistics that takes crops of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 24
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.GroupNorm(3, 12), nn.GELU(), nn.Conv2d(12, 24, 3))

    def forward(self, views: Tensor) -> Tensor:
        return self.layers(views).mean((2, 3))


def build_method(name: str, backbone: str = "plain") -> Any:
    torch.manual_seed(0)
    network = Plain() if backbone == "plain" else build_backbone(BackboneSpec(backbone, size=16))
    build, settings = METHODS[name]
    method = build(network, settings())
    width = network.num_features
    method.online.projector = build_mlp((width, 32, 16), norm=False, last_norm=False)
    if name == "mimv":
        method.teacher.projector = copy.deepcopy(method.online.projector).requires_grad_(False)
        with torch.no_grad():
            for parameter in method.teacher.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return method


def first_step(name: str, recipe: str, repeated: bool, backbone: str, rank: int = 0, world_size: int = 1) -> dict:
    """Loss, embeddings of side a, anchors and all gradients of the first batch."""
    method = build_method(name, backbone)
    loader = PairLoader(build_store(), get_recipe(recipe), BATCH, rank=rank, world_size=world_size)
    pair = next(loader.epoch(0))
    online = DistributedDataParallel(method.online) if world_size > 1 else method.online
    method.begin_step(0, 1)
    ids = pair.indices[0] % 5 if repeated else None
    loss, embeddings = method.loss(online, pair.sides, ids)
    loss.backward()
    return {
        "loss": loss.detach(),
        "embeddings": embeddings.detach(),
        "anchors": pair.indices[0],
        "gradients": {key: p.grad for key, p in method.online.named_parameters()},
    }


def gathered(rank: int) -> dict[str, Any]:
    """Rows by rank, and gradients of a loss that every process computes from all rows."""
    rows = (torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank).requires_grad_()
    everything = gather_rows(rows)
    (everything.square() * torch.arange(1.0, 7)[:, None]).sum().backward()
    # The sum of two gathered tensors hands one and the same gradient to both.
    twice = torch.tensor([[1.0 + rank]], requires_grad=True), torch.tensor([[5.0 + rank]], requires_grad=True)
    (gather_rows(twice[0]) + gather_rows(twice[1])).square().sum().backward()
    with torch.no_grad():
        strided = gather_rows(torch.arange(6.0).view(2, 3).T + 10 * rank)
    return {
        "world_size": dist.get_world_size(),
        "rows": everything.detach(),
        "gradient": rows.grad,
        "twice": torch.stack([t.grad for t in twice if t.grad is not None]),
        "ids": gather_rows(torch.tensor([3, 1]) + 10 * rank),
        "bool": gather_rows(torch.tensor([rank == 0])),
        "strided": strided,
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    results = {"gathered": gathered(rank)}
    for name, recipe, repeated in CASES:
        results[f"{name} {recipe}"] = first_step(name, recipe, repeated, "plain", rank, WORLD)
    results["vit"] = first_step("mimv", "amimv-strength", False, "test_vit", rank, WORLD)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, args=(str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_two_processes_took_part(ranks: list[dict[str, Any]]) -> None:
    assert [result["gathered"]["world_size"] for result in ranks] == [2, 2]


def test_rows_are_gathered_in_the_order_of_ranks(ranks: list[dict[str, Any]]) -> None:
    expected = torch.cat([torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank for rank in range(2)])
    for result in ranks:
        assert torch.equal(result["gathered"]["rows"], expected)
        assert result["gathered"]["ids"].tolist() == [3, 1, 13, 11]
        assert result["gathered"]["bool"].tolist() == [True, False]
        columns = torch.arange(6.0).view(2, 3).T
        assert torch.equal(result["gathered"]["strided"], torch.cat([columns, columns + 10]))


def test_gradients_of_gathered_rows_are_summed_over_the_processes(ranks: list[dict[str, Any]]) -> None:
    """Twice those of the one loss: averaging the parameters' gradients over two processes halves them again."""
    rows = torch.cat([torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank for rank in range(2)])
    expected = 2 * 2 * rows * torch.arange(1.0, 7, dtype=torch.float64)[:, None]
    for rank, result in enumerate(ranks):
        assert torch.equal(result["gathered"]["gradient"], expected[3 * rank : 3 * rank + 3])


def test_a_gradient_shared_by_two_gathers_is_summed_once(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        expected = 2 * 2 * (1.0 + rank + 5.0 + rank)
        assert result["gathered"]["twice"].flatten().tolist() == [expected, expected]


def assert_as_one_process(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    assert torch.equal(torch.cat([result["anchors"] for result in many]), one["anchors"])
    assert one["loss"].isfinite()
    for result in many:
        torch.testing.assert_close(result["loss"], one["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["embeddings"], one["embeddings"], rtol=1e-4, atol=1e-5)
        assert result["gradients"].keys() == one["gradients"].keys()
        for key, expected in one["gradients"].items():
            gap = (result["gradients"][key] - expected).norm()
            assert expected.norm() > 0, key
            assert gap <= 1e-5 * expected.norm(), f"{key}: relative difference {gap / expected.norm()}"


@pytest.mark.parametrize(("name", "recipe", "repeated"), CASES)
def test_first_loss_and_gradients_equal_those_of_one_process(
    ranks: list[dict[str, Any]], name: str, recipe: str, repeated: bool
) -> None:
    one = first_step(name, recipe, repeated, "plain")
    assert_as_one_process(one, [result[f"{name} {recipe}"] for result in ranks])


def test_a_vit_on_two_processes_equals_one(ranks: list[dict[str, Any]]) -> None:
    assert_as_one_process(first_step("mimv", "amimv-strength", False, "test_vit"), [result["vit"] for result in ranks])


def test_one_process_gathers_nothing() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows
