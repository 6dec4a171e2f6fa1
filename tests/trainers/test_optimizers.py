"""What is read from timm's source is what timm says when it is imported."""

from timm.optim import get_optimizer_info, list_optimizers
from timm.optim.lars import Lars

from amimv.trainers.optimizers import optimizers


def test_optimizers_are_timms() -> None:
    known = optimizers()
    assert sorted(known) == sorted(list_optimizers())
    for name, found in known.items():
        info = get_optimizer_info(name)
        assert found == (info.has_momentum, info.second_order, info.opt_class is Lars), name
    assert sum(one.lars for one in known.values()) == 4
    assert known["adahessian"].second_order
    assert known["sgd"].has_momentum
    assert not known["adamw"].has_momentum
