"""Two processes on one machine see the same batch, the same loss and the same gradients as one."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from amimv.models.backbones import BackboneSpec, build_backbone
from amimv.models.distributed import average, average_loss, gather_rows
from amimv.models.losses import nt_xent
from amimv.models.methods import METHODS
from amimv.pipelines.loader import PairLoader
from amimv.pipelines.recipes import get_recipe
from amimv.pipelines.store import ImageStore

WORLD = 2
BATCH = 12
CASES = (
    ("mimv", "mimv", False),
    ("mimv", "multi-crop", True),
    ("simclr", "two-view", False),
    ("simclr", "multi-crop", True),
    *(
        (name, recipe, True)
        for name in METHODS
        if name not in ("mimv", "simclr")
        for recipe in ("two-view", "multi-crop")
    ),
)
#: Methods with a queue or a centre, which ten steps of both are to leave alike.
TEN_STEPS = ("dino", "nnclr", "ressl", "swav")
#: Of whatever a method's settings have; the queue goes round.
SMALL = {"projector_hidden": 32, "projector_out": 16, "predictor_hidden": 24, "prototypes": 10, "queue": 32}
UNEVEN = (5, 7)


def build_store() -> ImageStore:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 16, 16, 3), generator=generator, dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    return replace(ImageStore.from_arrays(images, torch.arange(30) % 3, class_names="abc"), mean=half, std=half)


class Plain(nn.Module):
    """A network without batch statistics that takes crops of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 24
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.GroupNorm(3, 12), nn.GELU(), nn.Conv2d(12, 24, 3))

    def forward(self, views: Tensor) -> Tensor:
        return self.layers(views).mean((2, 3))


def without_batch_statistics(network: nn.Module) -> nn.Module:
    """Each BatchNorm1d replaced in place by a LayerNorm."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                setattr(module, name, nn.LayerNorm(child.num_features, elementwise_affine=child.affine))
    return network


def build_method(name: str, backbone: str = "plain") -> Any:
    """With its teacher somewhere else than its online network, and a centre that is not 0."""
    torch.manual_seed(0)
    network = Plain() if backbone == "plain" else build_backbone(BackboneSpec(backbone, size=16))
    build, settings = METHODS[name].build, METHODS[name].settings
    names = {field.name for field in fields(settings)}
    method = build(network, settings(**{key: value for key, value in SMALL.items() if key in names}))
    without_batch_statistics(method)
    if hasattr(method, "teacher"):
        method.teacher.requires_grad_(False)
        with torch.no_grad():
            for parameter in method.teacher.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    if name == "dino":
        method.centre += 0.1 * torch.randn(method.centre.shape)
    return method


def build_loader(recipe: str, rank: int, world_size: int) -> PairLoader:
    return PairLoader(build_store(), get_recipe(recipe), BATCH, rank=rank, world_size=world_size)


def first_step(name: str, recipe: str, repeated: bool, backbone: str, rank: int = 0, world_size: int = 1) -> dict:
    """Loss, embeddings of side a, anchors and all gradients of the first batch."""
    method = build_method(name, backbone)
    pair = next(build_loader(recipe, rank, world_size).epoch(0))
    online = DistributedDataParallel(method.online) if world_size > 1 else method.online
    method.begin_step(5, 10)
    ids = pair.indices[0] % 5 if repeated else None
    loss, embeddings = method.loss(online, pair.sides, ids)
    loss.backward()
    return {
        "loss": loss.detach(),
        "embeddings": embeddings.detach(),
        "anchors": pair.indices[0],
        "gradients": {key: p.grad for key, p in method.online.named_parameters()},
    }


def ten_steps(name: str, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """The method's state (queues, centre, weights) and its losses after ten steps, in float64."""
    method = build_method(name).double()
    if name == "dino":  # takes its teacher's scores in float32
        method.centre = method.centre.float()
    online = DistributedDataParallel(method.online) if world_size > 1 else method.online
    optimizer = torch.optim.SGD(method.online.parameters(), lr=0.1, momentum=0.9)
    loader = build_loader("two-view", rank, world_size)
    losses: list[Tensor] = []
    for pair in (pair for epoch in range(5) for pair in loader.epoch(epoch)):
        method.begin_step(len(losses), 10)
        loss, _ = method.loss(online, [[view.double() for view in side] for side in pair.sides], None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "state": method.state_dict()}


def uneven(rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """A contrastive loss of 12 rows, 5 of one process and 7 of the other, and a layer's gradients."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(4, 6)
    rows = torch.randn(2, sum(UNEVEN), 4).split(UNEVEN, dim=1)
    own = rows[rank] if world_size > 1 else torch.cat(rows, dim=1)
    wrapped = DistributedDataParallel(layer) if world_size > 1 else layer
    za, zb = (gather_rows(z, list(UNEVEN)) for z in wrapped(own))
    loss = nt_xent(za, zb, ids=torch.arange(sum(UNEVEN)) % 8)
    loss.backward()
    return {
        "loss": loss.detach(),
        "rows": za.detach(),
        "gradients": {key: p.grad for key, p in layer.named_parameters()},
    }


def averaged(rank: int) -> dict[str, Any]:
    """The average of a loss of 1, then 4 times the square of 3, and the gradient."""
    weight = torch.tensor(3.0, requires_grad=True)
    loss = average_loss((1 + 3 * rank) * weight.square())
    loss.backward()
    mean = average(torch.tensor([1.0, 2.0], requires_grad=True) + rank)
    return {"loss": loss.detach(), "gradient": weight.grad, "mean": mean, "mean has grad": mean.requires_grad}


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
    for name in TEN_STEPS:
        results[f"{name} ten steps"] = ten_steps(name, rank, WORLD)
    results["uneven"] = uneven(rank, WORLD)
    results["averaged"] = averaged(rank)
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
    # What has no gradient but by rounding: the bias of a layer whose mean the loss takes out.
    floor = 1e-7 * torch.stack([gradient.norm() for gradient in one["gradients"].values()]).norm()
    for result in many:
        torch.testing.assert_close(result["loss"], one["loss"], rtol=1e-5, atol=0)
        assert result["gradients"].keys() == one["gradients"].keys()
        for key, expected in one["gradients"].items():
            gap = (result["gradients"][key] - expected).norm()
            assert expected.norm() > 0, key
            assert gap <= 1e-5 * expected.norm() + floor, f"{key}: relative difference {gap / expected.norm()}"
    # Methods whose loss is a mean over rows give each process's own.
    embeddings = [result["embeddings"] for result in many]
    if len(embeddings[0]) < len(one["embeddings"]):
        embeddings = [torch.cat(embeddings)]
    for given in embeddings:
        torch.testing.assert_close(given, one["embeddings"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "recipe", "repeated"), CASES)
def test_first_loss_and_gradients_equal_those_of_one_process(
    ranks: list[dict[str, Any]], name: str, recipe: str, repeated: bool
) -> None:
    one = first_step(name, recipe, repeated, "plain")
    assert_as_one_process(one, [result[f"{name} {recipe}"] for result in ranks])


def test_a_vit_on_two_processes_equals_one(ranks: list[dict[str, Any]]) -> None:
    assert_as_one_process(first_step("mimv", "amimv-strength", False, "test_vit"), [result["vit"] for result in ranks])


@pytest.mark.parametrize("name", TEN_STEPS)
def test_ten_steps_leave_the_same_queue_centre_and_weights(ranks: list[dict[str, Any]], name: str) -> None:
    first, one = build_method(name).state_dict(), ten_steps(name)
    memory = [key for key in one["state"] if "queue" in key or key == "centre"]
    assert memory
    for result in (result[f"{name} ten steps"] for result in ranks):
        torch.testing.assert_close(result["losses"], one["losses"], rtol=1e-5, atol=0)
        assert result["state"].keys() == one["state"].keys()
        for key, expected in one["state"].items():
            torch.testing.assert_close(result["state"][key], expected, rtol=1e-4, atol=1e-6, msg=key)
    assert all(not torch.equal(one["state"][key], first[key].to(one["state"][key])) for key in memory)


def test_processes_may_hold_different_numbers_of_rows(ranks: list[dict[str, Any]]) -> None:
    one = uneven()
    assert len(one["rows"]) == sum(UNEVEN)
    for result in (result["uneven"] for result in ranks):
        torch.testing.assert_close(result["rows"], one["rows"])
        torch.testing.assert_close(result["loss"], one["loss"], rtol=1e-5, atol=0)
        for key, expected in one["gradients"].items():
            gap = (result["gradients"][key] - expected).norm()
            assert gap <= 1e-5 * expected.norm(), key


def test_an_averaged_loss_is_the_mean_with_the_gradient_of_ones_own(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(result["averaged"] for result in ranks):
        assert float(result["loss"]) == (9 + 36) / 2
        assert float(result["gradient"]) == (1 + 3 * rank) * 2 * 3
        assert result["mean"].tolist() == [1.5, 2.5]
        assert not result["mean has grad"]


def test_one_process_averages_nothing() -> None:
    value = torch.ones(2, requires_grad=True)
    assert average_loss(value) is value
    mean = average(value)
    assert torch.equal(mean, value)
    assert not mean.requires_grad


def test_one_process_gathers_nothing() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows
