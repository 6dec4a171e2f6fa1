"""Splits without groups: each image is placed by itself."""

from fractions import Fraction

import pytest
import torch

from amimv.pipelines import split_indices

SHARES = (Fraction(7, 10), Fraction(1, 10), Fraction(2, 10))


@pytest.mark.parametrize("seed", range(3))
def test_each_class_is_shared_out_to_the_nearest_whole_number(seed: int) -> None:
    sizes = [200, 57, 10, 3]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    splits = split_indices(labels, [float(share) for share in SHARES], seed=seed)
    assert torch.cat(splits).sort().values.tolist() == list(range(len(labels)))
    for split, share in zip(splits, SHARES, strict=True):
        found = torch.bincount(labels[split], minlength=4).tolist()
        for have, size in zip(found, sizes, strict=True):
            assert have >= 1
            assert abs(have - share * size) <= 1 or have == 1
    again = split_indices(labels, [float(share) for share in SHARES], seed=seed)
    assert all(torch.equal(one, other) for one, other in zip(splits, again, strict=True))
    assert not torch.equal(splits[2], split_indices(labels, [float(share) for share in SHARES], seed=seed + 1)[2])


def test_every_column_of_multi_hot_labels_is_shared_out() -> None:
    labels = (
        torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.03])
    ).long()
    for split, share in zip(split_indices(labels), SHARES, strict=True):
        assert (labels[split].sum(0) / labels.sum(0)).tolist() == pytest.approx([float(share)] * 5, abs=0.09)
        assert labels[split].any(0).all()


def test_a_class_of_one_image_is_named() -> None:
    with pytest.raises(ValueError, match=r"^class df has 1 image\(s\), but each of the 3 splits needs one"):
        split_indices(torch.tensor([0] * 20 + [1]), class_names=("nv", "df"))
