"""PairSampler alone: in a `DataLoader`, under the sharding of others, resumed, from labels, groups or neither."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch
from accelerate.data_loader import prepare_data_loader
from scipy.stats import chi2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from amimv import InputError
from amimv.pipelines.names import LABEL_SAMPLERS, SAMPLERS
from amimv.pipelines.pair_sampler import PairSampler

N, BATCH = 200, 24
PLACES = torch.arange(N)
LABELS = torch.tensor([0] * 120 + [1] * 50 + [2] * 25 + [3] * 5)[PLACES * 37 % N]
MULTI_HOT = torch.stack([PLACES * k % 11 < 3 for k in (1, 3, 5)], 1).long()
CLUSTERS = PLACES % 13 // 3
#: Of sizes 1 to 9, and mixed up.
GROUPS = torch.repeat_interleave(torch.arange(45) * 11 - 7, torch.arange(45) % 9 + 1)[:N][PLACES * 73 % N]

#: The epoch 2 of 1, 2 and 3 slots, as the pair loader drew it before there was a sampler of its own.
CHECKSUMS = {
    ("uniform", False): (1818541, 7105079, 15550101),
    ("class-balanced", False): (1713235, 6937913, 16017342),
    ("square-root", False): (1815398, 7110454, 15649419),
    ("effective-number", False): (1765071, 7029995, 15625560),
    ("progressive", False): (1773766, 7161935, 16281556),
    ("cluster-balanced", False): (1866269, 7162854, 16563638),
    ("uniform", True): (1818541, 7105079, 17325726),
    ("class-balanced", True): (1827703, 7451802, 17320669),
    ("square-root", True): (1832357, 7572514, 17267488),
    ("effective-number", True): (1781843, 7454277, 17231637),
    ("progressive", True): (1771973, 7444407, 16278754),
    ("cluster-balanced", True): (1866269, 7162854, 16563638),
}


def build_sampler(labels: Any = LABELS, batch_size: int = BATCH, **settings: Any) -> PairSampler:
    sampler = PairSampler(labels, batch_size, **{"seed": 3, **settings})
    if "cluster-balanced" in (sampler.sampler, sampler.partner):
        sampler.set_clusters(CLUSTERS)
    return sampler


def build_dataset() -> TensorDataset:
    """Example i is the number i and ``(2, 3)`` of it."""
    return TensorDataset(PLACES, PLACES[:, None, None].expand(-1, 2, 3))


def epoch_lists(sampler: PairSampler, epoch: int) -> list[list[int]]:
    return [batch.flatten().tolist() for batch in sampler.epoch(epoch)]


@pytest.mark.parametrize(("sampler", "multi_hot"), CHECKSUMS)
def test_batches_are_those_of_before(sampler: str, multi_hot: bool) -> None:
    for slots, expected in enumerate(CHECKSUMS[sampler, multi_hot], 1):
        partner = SAMPLERS[(SAMPLERS.index(sampler) + 1) % 6] if slots == 3 else sampler
        settings = {"partner": partner, "slots": slots, "seed": 5, "epochs": 4, "beta": 0.99}
        drawn = build_sampler(MULTI_HOT if multi_hot else LABELS, sampler=sampler, **settings).epoch_indices(2)
        assert drawn.shape == (slots, N // BATCH, BATCH)
        assert int((drawn.flatten() * torch.arange(1, drawn.numel() + 1)).sum()) == expected


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers: int, slots: int) -> None:
    sampler = build_sampler(sampler="class-balanced", slots=slots)
    loader = DataLoader(build_dataset(), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == len(sampler) == N // BATCH == 8
    for epoch in range(1 if workers else 3):  # each pass is the next
        expected = build_sampler(sampler="class-balanced", slots=slots).epoch_indices(epoch)
        got = list(loader)
        assert len(got) == len(loader)
        for step, (numbers, images) in enumerate(got):
            assert torch.equal(sampler.unflatten(numbers), expected[:, step])
            assert sampler.unflatten(images).shape == (slots, BATCH, 2, 3)
            assert torch.equal(sampler.unflatten(images)[..., 1, 2], expected[:, step])


def test_gives_lists_anchors_then_partners() -> None:
    sampler = build_sampler(slots=3)
    batches = list(sampler)
    assert all(type(batch) is list and type(batch[0]) is int and len(batch) == 3 * BATCH for batch in batches)
    anchors = [index for batch in batches for index in batch[:BATCH]]
    assert len(set(anchors)) == len(anchors) == 8 * BATCH
    for batch in batches:
        assert all(len(set(pair)) == 3 for pair in zip(*torch.tensor(batch).view(3, BATCH).tolist(), strict=True))


def test_set_epoch() -> None:
    sampler = build_sampler()
    sampler.set_epoch(5)
    assert list(sampler) == epoch_lists(build_sampler(), 5)
    assert list(sampler) == epoch_lists(build_sampler(), 6)
    sampler.set_epoch(5)
    assert list(sampler) == epoch_lists(build_sampler(), 5)
    sampler.set_epoch(0)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["step"]) == (0, 0)


@pytest.mark.parametrize("conventional", [False, True], ids=["passes", "set_epoch before each pass"])
@pytest.mark.parametrize("sampler", ["uniform", "cluster-balanced"])
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 1), (2, 7), (1, 8)])
def test_a_loaded_state_is_gone_on_from(epoch: int, step: int, sampler: str, conventional: bool) -> None:
    first = build_sampler(sampler=sampler)
    for _ in range(epoch):
        list(first)
    running = iter(first)
    batches = [next(running) for _ in range(step)]
    state = first.state_dict()
    resumed = PairSampler(LABELS, BATCH, sampler, seed=3)
    resumed.load_state_dict(state)
    assert {k: v for k, v in resumed.state_dict().items() if k != "clusters"} == {
        k: v for k, v in state.items() if k != "clusters"
    }
    passes = []
    for number in range(resumed.next_pass[0], epoch + 3):
        if conventional:  # as torch's own samplers want it, and as Accelerate does
            resumed.set_epoch(number)
        passes.append(list(resumed))
    rest, *others = passes if step < len(first) else [[], *passes]
    assert batches + rest == epoch_lists(first, epoch)
    assert others == [epoch_lists(first, epoch + 1), epoch_lists(first, epoch + 2)]


def test_workers_ask_ahead_so_the_steps_used_are_put_into_the_state() -> None:
    sampler = build_sampler()
    running = iter(DataLoader(build_dataset(), batch_sampler=sampler, num_workers=2))
    used = [next(running)[0].tolist() for _ in range(3)]
    assert sampler.state_dict()["step"] > 3
    resumed = build_sampler()
    resumed.load_state_dict(sampler.state_dict() | {"epoch": 0, "step": 3})
    assert used + list(resumed) == epoch_lists(build_sampler(), 0)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_state_within_a_step_is_that_of_its_beginning(micro: int) -> None:
    sampler = build_sampler(micro_batches=micro)
    seen = []
    for _ in sampler.epoch(4, 6):
        seen.append((sampler.state_dict()["epoch"], sampler.state_dict()["step"]))
    assert seen == ([(4, 7), (5, 0)] if micro == 1 else [(4, 6), (4, 7), (4, 7), (5, 0)])


@pytest.mark.parametrize("settings", [{}, {"sampler": "class-balanced", "partner": "square-root", "slots": 3}])
@pytest.mark.parametrize(("world", "micro"), [(2, 1), (3, 1), (1, 2), (2, 3)])
def test_ranks_shares_make_up_the_batches_of_one_process(world: int, micro: int, settings: dict[str, Any]) -> None:
    whole = build_sampler(**settings).epoch_indices(1)
    ranks = [build_sampler(rank=r, world_size=world, micro_batches=micro, **settings) for r in range(world)]
    parts = [list(sampler.epoch(1)) for sampler in ranks]
    assert {len(own) for own in parts} == {len(sampler) for sampler in ranks} == {8 * micro}
    for step in range(8):
        joined = [own[step * micro + m] for m in range(micro) for own in parts]
        assert torch.equal(torch.cat(joined, dim=1), whole[:, step])
        places = [sampler.places(torch.device("cpu"))[m] for m in range(micro) for sampler in ranks]
        assert torch.equal(torch.cat(places), torch.arange(BATCH))


@pytest.mark.parametrize("labels", [N, np.int64(N)], ids=["int", "numpy int"])
def test_without_labels(labels: Any) -> None:
    assert torch.equal(PairSampler(labels, BATCH).epoch_indices(0), PairSampler(LABELS, BATCH).epoch_indices(0))
    build_sampler(labels, sampler="cluster-balanced", partner="cluster-balanced").epoch_indices(0)
    build_sampler(labels, partner="same-group", groups=GROUPS).epoch_indices(0)


@pytest.mark.parametrize("sampler", LABEL_SAMPLERS)
@pytest.mark.parametrize("which", ["sampler", "partner"])
def test_what_reads_labels_refuses_without(which: str, sampler: str) -> None:
    with pytest.raises(InputError, match=f"^sampler {sampler} reads labels, and there are none: [^\n]*$"):
        PairSampler(N, BATCH, **{which: sampler})
    if which == "partner":
        PairSampler(N, BATCH, partner=sampler, slots=1)  # none is drawn


@pytest.mark.parametrize("convert", [Tensor.tolist, Tensor.numpy, lambda x: x.to(torch.uint8), lambda x: x[:, None]])
def test_labels_of_any_kind(convert: Callable[[Tensor], Any]) -> None:
    expected = PairSampler(LABELS, BATCH, "class-balanced").epoch_indices(0)
    assert torch.equal(PairSampler(convert(LABELS), BATCH, "class-balanced").epoch_indices(0), expected)


@pytest.mark.parametrize("partners", [1, 2, 4])
def test_partners_of_the_same_group_against_plain_sets(partners: int) -> None:
    sampler = PairSampler(N, BATCH, partner="same-group", groups=GROUPS, slots=partners + 1, seed=1)
    pairs = torch.cat([sampler.epoch_indices(epoch).flatten(1) for epoch in range(3)], dim=1).T.tolist()
    of = GROUPS.tolist()
    members = {group: {i for i in range(N) if of[i] == group} for group in of}
    assert {len(group) for group in members.values()} == set(range(1, 10))
    for anchor, *drawn in pairs:
        others = members[of[anchor]] - {anchor}
        assert set(drawn) <= (others or {anchor})
        assert len(set(drawn)) == min(partners, len(others) or 1)


def test_partners_of_the_same_group_are_uniform_over_the_others() -> None:
    groups = torch.tensor([0, 1, 0, 1, 0, 0, 0, 2])
    sampler = PairSampler(8, 8, partner="same-group", groups=groups)
    pairs = torch.cat([sampler.epoch_indices(epoch)[:, 0] for epoch in range(600)], dim=1)
    counts = torch.bincount(pairs[0] * 8 + pairs[1], minlength=64).view(8, 8)
    for anchor in range(8):
        others = ((groups == groups[anchor]) & (torch.arange(8) != anchor)).nonzero()[:, 0]
        seen = counts[anchor, others if len(others) else [anchor]]
        assert seen.sum() == 600
        if len(others) > 1:
            statistic = ((seen - 600 / len(others)) ** 2 / (600 / len(others))).sum().item()
            assert chi2.sf(statistic, len(others) - 1) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "balanced"}, "unknown sampler 'balanced'"),
        ({"sampler": "same-group"}, "unknown sampler 'same-group'"),
        ({"partner": "other"}, "unknown partner sampler 'other'"),
        ({"partner": "same-group"}, "partner same-group needs groups"),
        ({"partner": "same-group", "groups": GROUPS[:7]}, r"groups are \(7,\).*each of the 200 images"),
        ({"partner": "same-group", "groups": GROUPS.float()[:, None]}, r"groups are \(200, 1\)"),
        ({"batch_size": 201}, "batch size is 201 but the data set has 200 images"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"world_size": 5}, "batch size 24 does not divide by 5 processes x 1"),
        ({"world_size": 2, "micro_batches": 5}, "batch size 24 does not divide by 2 processes x 5"),
        ({"world_size": 2, "rank": 2}, "rank is 2, expected 0 to 1"),
        ({"slots": 0}, "slots is 0, expected at least 1"),
        ({"labels": 3, "batch_size": 3, "slots": 4}, "a pair needs 4 distinct images but the data set has 3"),
        ({"labels": torch.tensor(N)}, "labels are a single value"),
        ({"labels": ["a", "b"]}, "labels are no numbers"),
        ({"labels": LABELS.float(), "sampler": "square-root"}, r"labels are \(200,\) torch.float32"),
        ({"labels": LABELS - 1, "sampler": "square-root"}, "labels reach from -1 to 2, expected integers from 0"),
        ({"labels": 2 * MULTI_HOT, "sampler": "square-root"}, "labels reach from 0 to 2, expected 0 or 1"),
        ({"labels": LABELS + 1, "sampler": "square-root"}, "class 0 has no image"),
        ({"n_classes": 3, "sampler": "square-root"}, "labels reach to 3, expected 0 to 2 for 3 classes"),
        ({"n_classes": 5, "partner": "square-root"}, "class 4 has no image"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_sampler(**settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_clusters_of_another_length() -> None:
    with pytest.raises(InputError, match=r"cluster assignments have shape \(7,\), expected \(200,\)"):
        build_sampler().set_clusters(CLUSTERS[:7])


def test_a_million_labels() -> None:
    """That an epoch is drawn at all; how long it takes depends on the machine."""
    labels = torch.arange(10**6) ** 2 % 97 % 10
    sampler = PairSampler(labels, 512, "class-balanced", seed=0)
    assert sampler.epoch_indices(0).shape == (2, 1953, 512)


@pytest.mark.parametrize("batch_size", [24, 20])  # 8 batches, and 10
@pytest.mark.parametrize("world", [2, 3])
def test_under_accelerates_sharding(world: int, batch_size: int) -> None:
    """No sample twice, none left out; all of a pair in one process."""
    samplers = [build_sampler(batch_size=batch_size) for _ in range(world)]
    loaders = [
        prepare_data_loader(
            DataLoader(build_dataset(), batch_sampler=sampler),
            num_processes=world,
            process_index=rank,
            put_on_device=False,
        )
        for rank, sampler in enumerate(samplers)
    ]
    rounds = N // batch_size // world
    for epoch in range(2):
        expected = build_sampler(batch_size=batch_size).epoch_indices(epoch)
        parts = [[samplers[0].unflatten(numbers) for numbers, _ in loader] for loader in loaders]
        assert [len(own) for own in parts] == [rounds] * world == [len(loader) for loader in loaders]
        in_turn = [own[step] for step in range(rounds) for own in parts]
        assert torch.equal(torch.stack(in_turn, dim=1), expected[:, : rounds * world])


def test_accelerate_goes_on_from_a_loaded_state() -> None:
    """In one process it sets the epoch before each pass."""
    sampler = build_sampler()
    sampler.load_state_dict(sampler.state_dict() | {"epoch": 2, "step": 5})
    loader = prepare_data_loader(DataLoader(build_dataset(), batch_sampler=sampler), put_on_device=False)
    loader.set_epoch(2)
    assert [numbers.tolist() for numbers, _ in loader] == epoch_lists(build_sampler(), 2)[5:]
    assert [numbers.tolist() for numbers, _ in loader] == epoch_lists(build_sampler(), 3)


def test_accelerate_does_not_split_a_list() -> None:
    """That would give the anchors to one process and the partners to another."""
    loader = DataLoader(build_dataset(), batch_sampler=build_sampler())
    with pytest.raises(ValueError, match="split_batches"):
        prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False, split_batches=True)


class Recorder(lightning.LightningModule):
    """Notes which examples it was given."""

    def __init__(self, own_shares: bool) -> None:
        super().__init__()
        self.weight, self.own_shares = nn.Parameter(torch.zeros(())), own_shares
        self.automatic_optimization = False  # a fork must not run autograd once its parent has
        self.seen: list[list[int]] = []

    def train_dataloader(self) -> DataLoader:
        shares = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size} if self.own_shares else {}
        return DataLoader(build_dataset(), batch_sampler=build_sampler(**shares))

    def training_step(self, batch: list[Tensor]) -> None:
        self.seen.append(batch[0].tolist())

    def on_train_end(self) -> None:
        """To every process: the other one's memory ends with it."""
        every = self.all_gather(torch.tensor(self.seen)).view(self.trainer.world_size, -1, len(self.seen[0]))
        expected = build_sampler().epoch_indices(0)
        got = every.unflatten(2, (2, -1))  # processes, steps, slots, share
        assert torch.equal(got.permute(2, 1, 0, 3).flatten(2), expected)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: Recorder, devices: int, distributed_sampler: bool) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=1,
        use_distributed_sampler=distributed_sampler,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)


@pytest.mark.parametrize(("devices", "distributed_sampler"), [(1, True), (1, False), (2, False)])
def test_under_lightning(devices: int, distributed_sampler: bool) -> None:
    fit(Recorder(own_shares=True), devices, distributed_sampler)


def test_lightning_says_so_if_it_is_to_shard() -> None:
    """Made anew by Lightning the sampler would lose its settings."""
    with pytest.raises(Exception, match=r"use_distributed_sampler=False"):
        fit(Recorder(own_shares=True), 2, True)
