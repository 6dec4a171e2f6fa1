"""A contact sheet of real training pairs: ``python tools/show_views.py --output views.png``.

A row per anchor: its images as they are stored, then the views of each side, labelled by slot and strength.
"""

import logging
from pathlib import Path

from amimv.command_line import begin_command, read_command
from amimv.signals import is_command
from amimv.tools.commands import ShowSettings

if is_command(__name__):
    begin_command(ShowSettings, __doc__)

import torch
from torch import Tensor

from amimv import run_command, user_path
from amimv.pipelines import PairBatch, PairLoader, Recipe, ViewPolicy, load_store
from amimv.pipelines.recipes import LETTERS
from amimv.trainers.build import make_recipe
from amimv.trainers.data import describe_data
from amimv.trainers.layers import resolve


def to_pixels(view: Tensor, policy: ViewPolicy) -> Tensor:
    """A normalised view ``(B, C, H, W)`` as ``(B, H, W, 3)`` values in [0, 1]."""
    mean = view.new_tensor(policy.mean).view(1, -1, 1, 1)
    std = view.new_tensor(policy.std).view(1, -1, 1, 1)
    return (view * std + mean).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def list_columns(pair: PairBatch, recipe: Recipe, images: Tensor) -> list[tuple[str, str, Tensor]]:
    """(group, label, pictures ``(B, H, W, 3)``) of each column: the stored images, then every view of every side."""
    names = ["x, the anchor", *(f"y{k if recipe.slots > 2 else ''}, its partner" for k in range(1, recipe.slots))]
    stored = images.float().div(255).expand(-1, -1, -1, -1, 3)
    columns = [("the pair, as stored", name, stored[slot]) for slot, name in enumerate(names)]
    for s, (side, views) in enumerate(zip(recipe.sides, pair.sides, strict=True)):
        group = f"side {'ab'[s]}" if s < 2 else f"local side {s - 1}"
        for view, rendered in zip(side, views, strict=True):
            kind = view.label.split("(")[0]
            again = " again" if kind.endswith("'") else ""
            label = f"{view.label}\n{LETTERS[kind[0]]}{again}"
            columns.append((group, label, to_pixels(rendered, view.policy)))
    return columns


def draw_sheet(columns: list[tuple[str, str, Tensor]], title: str, path: Path) -> None:
    """The columns as one picture, groups set apart by colour and a gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(group for group, _, _ in columns))
    colours = dict(zip(groups, ("0.35", "tab:blue", "tab:orange", *["tab:green"] * 32), strict=False))
    rows = len(columns[0][2])
    figure = pyplot.figure(figsize=(1.55 * len(columns) + 0.5, 1.3 * rows + 1.1), layout="constrained")
    widths = [sum(group == g for group, _, _ in columns) for g in groups]
    for part, group in zip(
        figure.subfigures(1, len(groups), width_ratios=widths, squeeze=False)[0], groups, strict=True
    ):
        part.set_facecolor("0.97")
        part.suptitle(group, color=colours[group], fontweight="bold", fontsize=12)
        own = [(label, pictures) for g, label, pictures in columns if g == group]
        axes = part.subplots(rows, len(own), squeeze=False)
        for column, (label, pictures) in enumerate(own):
            axes[0, column].set_title(label, fontsize=9)
            for row in range(rows):
                axis = axes[row, column]
                axis.imshow(pictures[row].numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(edgecolor=colours[group], linewidth=1.5)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def build_pairs(settings: ShowSettings) -> PairLoader:
    """The pairs as training with these settings sees them, ``rows`` at a time."""
    s = settings
    flags = ["--data", s.data, "--recipe", s.recipe, "--preset", s.preset, "--partners", str(s.partners)]
    training, _ = resolve(flags)
    store = load_store(s.data, size=s.size, root=s.root)
    recipe = make_recipe(training, store.size)
    return PairLoader(store, recipe, s.rows, sampler=s.sampler, backend=s.backend, seed=s.seed)


def show(settings: ShowSettings) -> None:
    """Draw the contact sheet of the first pairs."""
    s, loader = settings, build_pairs(settings)
    pair = next(iter(loader.epoch(0)))
    data, recipe = describe_data(loader.store), loader.recipe
    title = f"{data}, recipe {recipe.name}: the embeddings of a side's views are summed"
    with torch.inference_mode():
        columns = list_columns(pair, recipe, loader.store.gather(pair.indices))
    draw_sheet(columns, title, user_path(s.output))
    print(f"{s.rows} pairs of {data} by recipe {recipe.name}: {s.output}")


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 input that cannot be used)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    run_command(lambda: show(read_command(ShowSettings, __doc__)))


if __name__ == "__main__":
    main()
