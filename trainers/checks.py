"""What settings can be beside each other: what contradicts, and what does nothing."""

from collections.abc import Iterable, Iterator
from dataclasses import fields

from amimv import InputError, check_choice
from amimv.fields import NOTHING, Idle, check_setting
from amimv.pipelines.names import FILES
from amimv.pipelines.policy import operation_settings
from amimv.trainers.conditions import letters, one_image
from amimv.trainers.data_settings import ALONE, SUBSET
from amimv.trainers.optimizers import optimizers
from amimv.trainers.settings import PretrainSettings, of_role, that_touch


def check(settings: PretrainSettings) -> None:
    """Raise an `InputError` for a value that no run could use."""
    s = settings
    for field in fields(s):
        check_setting(field, getattr(s, field.name))
    if s.profile == "natural" and s.rho != 1:
        raise InputError(f"profile natural has no ratio, but rho is {s.rho:g}: leave one of them out")
    if s.size is not None and not s.data.startswith(FILES):  # which are scaled to any size
        check_choice("size", str(s.size), ("28", "64", "128", "224"))
    if s.epochs is None and s.steps is None and s.views is None and s.minutes is None:
        raise InputError("no length of training: give --epochs, --steps, --views or --minutes")
    if s.resplit and s.split is None:
        raise InputError("resplit joins the splits of the data, but nothing cuts them anew: give --split 0.7 0.1 0.2")
    if optimizers()[s.optimizer].second_order:
        raise InputError(f"optimizer {s.optimizer} needs second derivatives, which training lacks: give another")
    if optimizers()[s.optimizer].lars and s.weight_decay == 0:
        raise InputError(f"weight decay 0 turns the adaptation of {s.optimizer} off: give a small one, such as 1e-9")
    s.policy()
    s.second_policy()


def refuse_contradictions(settings: PretrainSettings) -> None:
    """Raise an `InputError` for two settings of which one would silently undo the other.

    All of them are left at their defaults by the methods' files and the presets: who sets them means them. They are
    looked for where settings are given, not in `check`: what an earlier version has trained can be evaluated.
    """
    s = settings
    defaults = {field.name: field.default for field in fields(s)}
    drawn = ", ".join(f"{name} {getattr(s, name)}" for name in of_role(SUBSET) if getattr(s, name) != defaults[name])
    found = (
        (s.indices and drawn, f"indices are the training subset, which {drawn} would draw"),
        (one_image(s) and s.partners > 1, f"recipe {s.recipe} has no partner, but partners is {s.partners}"),
        ("y2" in letters(s) and s.partners > 1, f"recipe {s.recipe} names its own, but partners is {s.partners}"),
        (
            s.supervised_loss != "cross-entropy" and s.supervised_sampler != "uniform",
            f"the supervised loss {s.supervised_loss} corrects for the classes' counts, and so does the supervised "
            f"sampler {s.supervised_sampler}, which is to be uniform then",
        ),
        (s.finetune and not s.supervised_steps, "finetune trains for supervised_steps, which is 0"),
        (s.finetune and s.baselines == "only", "baselines only trains nothing that finetune could start from"),
    )
    for contradiction, words in found:
        if contradiction:
            raise InputError(f"{words}: leave one of them out")


def idle(settings: PretrainSettings, given: Iterable[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The given settings that do nothing beside the others: their names, and why."""
    given = tuple(given)
    acting = (*of_role(ALONE), *that_touch(NOTHING))
    untrained = tuple(name for name in given if name not in acting)
    if settings.baselines == "only" and untrained:
        yield untrained, "baselines only trains nothing, and evaluates always"
        return
    conditions: dict[Idle, list[str]] = {}
    for field in fields(settings):
        if field.name in given and (why := field.metadata["idle"]):
            conditions.setdefault(why, []).append(field.name)
    for why, names in conditions.items():
        if why.when(settings):
            yield tuple(names), why.reason.format_map(vars(settings))
    if undrawn := _not_drawn(settings, given):
        kinds = sorted({operation_settings()[name].key() for name in undrawn})
        yield undrawn, f"the views have no {' and no '.join(kinds)}"


def _not_drawn(settings: PretrainSettings, given: Iterable[str]) -> tuple[str, ...]:
    """The given settings of operations that would change something, were the operations drawn at all."""
    owners, policies = operation_settings(), (settings.policy(), settings.second_policy())
    return tuple(
        name
        for name in given
        if name in owners
        and getattr(settings, name) != getattr(owners[name](), name)
        and not any(policy.get(owners[name]).active for policy in policies)
    )
