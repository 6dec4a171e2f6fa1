"""What timm's optimisers are, known without loading timm, so that a command line is answered at once."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Optimizer(NamedTuple):
    """Of one of timm's optimisers: what a setting or a refusal depends on."""

    has_momentum: bool
    second_order: bool
    lars: bool


@cache
def optimizers() -> dict[str, Optimizer]:
    """timm's optimisers by name, as ``timm.optim`` registers them: read from its source, as importing it takes
    seconds.
    """
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "optim" / "_optim_factory.py").read_text())
    found = {}
    for about in _arguments(tree, "OptimInfo", ("name", "opt_class")):
        yes = {name for name, value in about.items() if value is True}
        kind = Optimizer("has_momentum" in yes, "second_order" in yes, about["opt_class"] == "Lars")
        found[str(about["name"])] = kind
    for about in _arguments(tree, "default_registry.register_alias", ("alias", "name")):
        found[str(about["alias"])] = found[str(about["name"])]
    return found


def _arguments(tree: ast.Module, called: str, names: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """The arguments of every call of a function: values of literals, texts of expressions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == called:
            given = dict(zip(names, node.args, strict=False)) | {one.arg or "": one.value for one in node.keywords}
            yield {
                name: value.value if isinstance(value, ast.Constant) else ast.unparse(value)
                for name, value in given.items()
            }
