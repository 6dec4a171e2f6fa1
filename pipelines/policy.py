"""View policies: how a view is rendered, and how strongly each operation augments it; without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from amimv import InputError, check_choice
from amimv.pipelines.operations import OPERATIONS, Operation

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
O = TypeVar("O", bound=Operation)  # noqa: E741


@dataclass(frozen=True)
class ViewPolicy:
    """How one view is rendered: output size, the data set's statistics, and how strongly it is augmented.

    The defaults only normalise.

    Attributes:
        size: height and width of the view in pixels; None keeps the image's (of its shorter side).
        mean, std: per channel, in units of [0, 1]; their length is the number of channels. None: not known yet, so
            nothing can be drawn or rendered; `Recipe.with_statistics` binds them.
        operations: at most one of a kind; kept in the order of ``OPERATIONS``, without those that change nothing.
        value_range: what stored values become 0 and 1 (others are clamped); None: the range of their type, (0, 255) or
            (0, 65535), and floats as they are.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    operations: tuple[Operation, ...] = ()
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise InputError(f"mean {self.mean} and std {self.std} must have the same number of channels")
        if self.size is not None and self.size < 4:
            raise InputError(f"size is {self.size}, expected at least 4 pixels")
        kinds = [type(operation) for operation in self.operations]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise InputError(
                    f"operation {kind.__name__} is given {kinds.count(kind)} times, expected at most once"
                )
        active = (operation for operation in self.operations if operation.active)
        ordered = tuple(sorted(active, key=lambda operation: OPERATIONS.index(type(operation))))
        object.__setattr__(self, "operations", ordered)

    @property
    def statistics(self) -> Statistics:
        """Mean and std.

        Raises:
            InputError: if they are not known: contrast would pivot on a grey that is not the data set's.
        """
        if self.mean is None or self.std is None:
            raise InputError(
                "the view policy has no mean and std: give ViewPolicy(mean=..., std=...), or bind a recipe's with "
                "recipe.with_statistics(store.mean, store.std)"
            )
        return self.mean, self.std

    def get(self, kind: type[O]) -> O:
        """Its operation of this kind; where it has none, one that changes nothing."""
        return next((operation for operation in self.operations if isinstance(operation, kind)), kind())

    def changed(self, **settings: Any) -> "ViewPolicy":
        """The policy with some settings of operations changed, by their names (``blur_p=0.5``)."""
        return replace(self, operations=build_policy({**self.settings(), **settings}).operations)

    def settings(self) -> dict[str, Any]:
        """The settings of all operations, by name; see `build_policy`."""
        return {name: getattr(self.get(kind), name) for name, kind in operation_settings().items()}

    def normalised(self) -> "ViewPolicy":
        """The policy of the normalised view ``N``: the same size and statistics, nothing drawn."""
        return replace(self, operations=())

    def soft(self) -> "ViewPolicy":
        """The soft counterpart: that of each operation, without those that have none."""
        kept = (soft for operation in self.operations if (soft := operation.soft()) is not None)
        return replace(self, operations=tuple(kept))


def operation_settings() -> dict[str, type[Operation]]:
    """The operation that each setting belongs to, by the setting's name."""
    return {setting.name: kind for kind in OPERATIONS for setting in fields(kind)}


def build_policy(
    settings: Mapping[str, Any],
    size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ViewPolicy:
    """A policy from the settings of operations by name, such as ``{"hflip": 0.5, "blur_p": 0.5}``.

    Raises:
        InputError: for an unknown name or a value out of range.
    """
    owners = operation_settings()
    for name in settings:
        check_choice("setting of an operation", name, owners)
    operations = [
        kind(**{setting.name: settings[setting.name] for setting in fields(kind) if setting.name in settings})
        for kind in OPERATIONS
    ]
    return ViewPolicy(size, mean, std, tuple(operations))
