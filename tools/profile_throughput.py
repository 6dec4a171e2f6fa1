"""What the pipelines cost: views per second beside what people use today, and where the time goes.

Without a flag of its own it prints one table of views per second. ``--stages`` breaks one batch down, ``--train`` one
training step, ``--scale`` varies batch size, image size, data set size and slots; they can be combined. Everything in
one table was measured in one process, after warm-up, with the device waited for inside the timing; each pipeline is
shown at the thread count (and the others also at the batch size) that was fastest for it in a short trial.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from amimv.command_line import begin_command, read_command
from amimv.signals import is_command
from amimv.tools.commands import ProfileSettings

if is_command(__name__):
    begin_command(ProfileSettings, __doc__)

import torch
from rich.console import Console
from rich.table import Table

from amimv import InputError, first_line, run_command, user_path
from amimv.pipelines import ImageStore, PairLoader, get_recipe, load_store
from amimv.pipelines.views import render_views
from amimv.threads import usable_cores
from amimv.tools.throughput.measure import Rates, measure, threads, waiter
from amimv.tools.throughput.scaling import draw_scaling, measure_memory, measure_scaling, repeated
from amimv.tools.throughput.stages import break_down, compare_views, write_trace
from amimv.tools.throughput.training_step import build, profile_step
from amimv.trainers.data import best_device
from amimv.trainers.run_folder import describe_environment, write_json

try:
    from amimv.tools.throughput.rivals import RIVALS
except ModuleNotFoundError:  # an installed package leaves them out
    RIVALS = ()

#: The row that the others are compared with: pipeline and recipe.
REFERENCE = ("amimv PairLoader, kornia", "two-view")
#: Batch sizes of which the others' fastest is shown.
RIVAL_BATCHES = (64, 256, 1024)
#: Repeats, and seconds of each, by which the fastest choice is found.
TRIAL = (2, 0.3)
TEXT_COLUMNS = ("pipeline", "fed by", "recipe", "stage", "part", "varied")


@dataclass(frozen=True)
class Row:
    """A line of the table; ``views_per_second`` is None if it was skipped, for the reason in ``note``."""

    pipeline: str
    recipe: str
    size: int
    batch_size: int = 0
    threads: int = 0
    views_per_second: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """A pipeline of the table and the (batch size, threads) at which it may run."""

    pipeline: str
    recipe: str
    choices: list[tuple[int, int]]
    views: Any
    note: str = field(default="")


def count_pairs(store: ImageStore, recipe: str, backend: str, compiled: bool, batch: int, n: int) -> Iterator[int]:
    """Distinct views handed out by the whole loader, batch by batch, epoch after epoch, on so many threads."""
    pairs = PairLoader(store, get_recipe(recipe), batch, backend=backend, compile=compiled)
    with threads(n):
        epoch = 0
        while True:
            for _ in pairs.epoch(epoch):
                yield batch * len(pairs.recipe.views)
            epoch += 1


def count_renders(store: ImageStore, recipe: str, backend: str, batch: int, n: int) -> Iterator[int]:
    """Views rendered of one batch, again and again: without sampling, gathering and drawing."""
    pairs = PairLoader(store, get_recipe(recipe), batch, backend=backend)
    wanted = pairs.sampler.shares(0)[0]
    params = next(pairs.draw_epoch(0))
    images = [store.gather(wanted[view.slot]) for view in pairs.recipe.views]
    with threads(n):
        while True:
            yield sum(map(len, render_views(images, params, backend)))


def list_candidates(s: ProfileSettings, store: ImageStore, cores: int) -> list[Candidate]:
    """What is measured at one image size."""
    rows = []
    one_or_all = sorted({1, cores}, reverse=True)
    for batch in s.batch_sizes:
        for recipe in s.recipes:
            choices = [(batch, n) for n in one_or_all]
            for backend in s.backends:
                name = f"amimv PairLoader, {backend}"
                rows.append(Candidate(name, recipe, choices, partial(count_pairs, store, recipe, backend, False)))
                alone = partial(count_renders, store, recipe, backend)
                rows.append(Candidate(f"amimv render alone, {backend}", recipe, choices, alone))
            if s.compile and "kornia" in s.backends:
                compiled = partial(count_pairs, store, recipe, "kornia", True)
                rows.append(Candidate("amimv PairLoader, kornia, compiled", recipe, choices[:1], compiled))
    for rival in RIVALS if s.rivals else ():
        counts = {"nothing": [0], "workers": [cores], "threads": one_or_all}[rival.threads]
        choices = [(batch, n) for batch in RIVAL_BATCHES if batch <= len(store) for n in counts]
        rows.append(Candidate(rival.name, "two-view", choices, partial(rival.count, store), rival.differences))
    return rows


def measure_candidate(s: ProfileSettings, candidate: Candidate, size: int, device: torch.device) -> Row:
    """Its row, at its fastest choice; skipped with the reason if it cannot run here."""
    wait = waiter(device)

    def rates(choice: tuple[int, int], repeats: int, seconds: float) -> Rates:
        with closing(candidate.views(*choice)) as views:
            return measure(views, repeats, seconds, wait)

    row = partial(Row, candidate.pipeline, candidate.recipe, size)
    try:
        choices = candidate.choices
        best = max(choices, key=lambda choice: rates(choice, *TRIAL).median) if len(choices) > 1 else choices[0]
        median, low, high = rates(best, s.repeats, s.seconds)
        return row(best[0], best[1], median, low, high, candidate.note)
    except (InputError, RuntimeError) as error:  # what fails in another library takes its own row only
        return row(note=f"skipped: {first_line(error)}")


def load(s: ProfileSettings, size: int, device: torch.device) -> ImageStore:
    """The store at one image size."""
    store = load_store(s.data, size=size, root=s.root, device=device)
    return store if s.images is None else repeated(store, s.images)


def measure_throughput(s: ProfileSettings, size: int, device: torch.device) -> list[Row]:
    """All rows of one image size, in one process."""
    store = load(s, size, device)
    if max(s.batch_sizes) > len(store):
        raise InputError(
            f"batch size is {max(s.batch_sizes)}, but {s.data} has {len(store)} images: give a smaller one"
        )
    rows = []
    for candidate in list_candidates(s, store, usable_cores()):
        rows.append(measure_candidate(s, candidate, size, device))
        print(f"{size} px, {candidate.pipeline}, {candidate.recipe}: {shown(rows[-1])}", file=sys.stderr, flush=True)
    return rows


def shown(row: Row) -> str:
    return row.note if row.views_per_second is None else f"{row.views_per_second:,.0f} views/s"


def reference_rate(rows: list[Row]) -> float | None:
    """Views per second of the first row of the reference."""
    rates = [row.views_per_second for row in rows if (row.pipeline, row.recipe) == REFERENCE]
    return rates[0] if rates else None


def print_table(console: Console, title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A title and a table; numbers stand to the right."""
    table = Table()
    for name in header:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title, soft_wrap=True)
    console.print(table)


def cells_of(row: Row, reference: float | None) -> tuple[str, ...]:
    """A line of the throughput table."""
    if row.views_per_second is None or row.low is None or row.high is None:
        return (row.pipeline, row.recipe, "", "", "skipped", "", "")
    ratio = f"{reference / row.views_per_second:.1f}x" if reference else ""
    spread = f"{row.low:,.0f} to {row.high:,.0f}"
    rate = f"{row.views_per_second:,.0f}"
    return (row.pipeline, row.recipe, str(row.batch_size), str(row.threads), rate, spread, ratio)


def show_throughput(s: ProfileSettings, console: Console, device: torch.device) -> list[dict[str, Any]]:
    result = []
    header = ("pipeline", "recipe", "batch", "threads", "views/s", "quartiles", "first row is")
    for size in s.sizes:
        rows = measure_throughput(s, size, device)
        reference = reference_rate(rows)
        print_table(console, title_of(s, size), header, [cells_of(row, reference) for row in rows])
        if s.rivals and not RIVALS:
            console.print("what people use today is compared in a checkout only", soft_wrap=True)
        for note in dict.fromkeys(row.note for row in rows if row.note):
            names = ", ".join(dict.fromkeys(row.pipeline for row in rows if row.note == note))
            console.print(f"{names}: {note}", soft_wrap=True)
        result += [asdict(row) for row in rows]
    return result


def show_stages(s: ProfileSettings, console: Console, device: torch.device) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    seconds, batch = s.repeats * s.seconds, s.batch_sizes[0]
    for size in s.sizes:
        store = load(s, size, device)
        for name in s.recipes:
            recipe = get_recipe(name)
            stages = break_down(store, recipe, batch, seconds)
            rows = [(row.stage, f"{row.milliseconds:.3f}", f"{100 * row.share:.1f} %") for row in stages]
            title = f"{title_of(s, size)}, {name}, batch {batch}, kornia"
            print_table(console, title, ("stage", "ms per batch", "share"), rows)
            views = compare_views(store, recipe, batch, seconds)
            pair = views.pop("pair")
            parts = " + ".join(f"{label} {ms:.2f}" for label, ms in views.items())
            line = (
                f"a whole batch {pair:.2f} ms; its views by loaders of their own {parts} = {sum(views.values()):.2f}"
            )
            console.print(line, soft_wrap=True)
            found = {"size": size, "recipe": name, "batch_size": batch, "pair_ms": pair, "views_ms": views}
            result.append({**found, "stages": [row._asdict() for row in stages]})
    if s.trace:
        write_trace(store, get_recipe(s.recipes[0]), batch, user_path(s.trace))
        console.print(f"trace: {s.trace} (open it at ui.perfetto.dev)")
    return result


def training_flags(s: ProfileSettings, recipe: str) -> list[str]:
    """What is asked of the trainer."""
    values = {
        "data": s.data,
        "size": s.sizes[0],
        "root": s.root,
        "method": s.method,
        "recipe": recipe,
        "backbone": s.backbone,
        "backend": s.backends[0],
        "batch-size": s.batch_sizes[0],
        "mixed-precision": s.mixed_precision,
    }
    flags = [text for name, value in values.items() if value for text in (f"--{name}", str(value))]
    return [*flags, "--compile"] if s.compile else flags


def show_training(s: ProfileSettings, console: Console, device: torch.device) -> list[dict[str, Any]]:
    result = []
    parts = ("data", "forward", "backward", "optimizer", "other")
    for recipe in s.recipes:
        step = profile_step(training_flags(s, recipe), s.repeats * s.seconds, cpu=device.type == "cpu")
        spent = {part: step[f"{part}_ms"] for part in parts}
        total = sum(spent.values())
        rows = [(part, f"{ms:.2f}", f"{100 * ms / total:.1f} %") for part, ms in spent.items()]
        title = f"{title_of(s, s.sizes[0])}, {s.method} on {recipe}, {s.backbone}, batch {s.batch_sizes[0]}"
        print_table(console, title, ("part", "ms per step", "share"), rows)
        console.print(
            f"as trained {step['step_ms']:.1f} ms a step, {100 * step['data_wait_share']:.1f} % of it waiting for "
            f"data; peak memory {step['peak_memory_mib']:,.0f} MiB",
            soft_wrap=True,
        )
        fed = show_feeds(s, console, device) if s.rivals and RIVALS and recipe == "two-view" else []
        result.append({"recipe": recipe, "method": s.method, "backbone": s.backbone, **step, "fed_by": fed})
    return result


def show_feeds(s: ProfileSettings, console: Console, device: torch.device) -> list[dict[str, Any]]:
    """The same step fed by others, and their loaders alone."""
    from amimv.tools.throughput.rivals.training import HEADER, cells_of_feeds, compare_feeds

    training = build([*training_flags(s, "two-view"), "--sampler", "uniform"], device.type == "cpu")
    rows = compare_feeds(training, usable_cores(), s.repeats, s.seconds)
    title = f"{title_of(s, s.sizes[0])}, {s.method} on two-view, {s.backbone}, batch {s.batch_sizes[0]}, in turns"
    print_table(console, title, HEADER, cells_of_feeds(rows))
    for row in rows:
        if row["note"]:
            console.print(f"{row['fed_by']}: skipped: {row['note']}", soft_wrap=True)
    return rows


def show_scaling(s: ProfileSettings, console: Console, device: torch.device) -> dict[str, Any]:
    memory = measure_memory(load_store(s.data, root=s.root, device=device), s.batch_sizes[0])
    scaling = measure_scaling(s.data, s.root, device, s.repeats * s.seconds)
    rows = [
        (row.axis, f"{row.value:,}", f"{row.milliseconds:.2f}", f"{row.microseconds_per_unit:.2f}") for row in scaling
    ]
    title = f"{title_of(s)}, kornia; the unit is a view, for image sizes 1000 pixels of views"
    print_table(console, title, ("varied", "value", "ms per batch", "us per unit"), rows)
    held = ", ".join(f"{mib:,.1f} MiB after {epochs} epochs" for epochs, mib in memory.items())
    console.print(f"memory held with amimv pairs: {held}", soft_wrap=True)
    if s.plot:
        draw_scaling(scaling, title_of(s), user_path(s.plot))
    return {"rows": [row._asdict() for row in scaling], "held_memory_mib": memory}


def title_of(s: ProfileSettings, size: int = 0) -> str:
    """The data set (a synthetic one says so), the size and the machine."""
    name = "phantom (synthetic)" if s.data == "phantom" else s.data
    machine = torch.cuda.get_device_name() if choose_device(s).type == "cuda" else f"CPU, {usable_cores()} cores"
    return ", ".join([name, *([f"{size} px"] if size else []), machine])


def choose_device(s: ProfileSettings) -> torch.device:
    return torch.device(best_device() if s.device == "auto" else s.device)


def profile(settings: ProfileSettings) -> dict[str, Any]:
    """Measure what was asked for, print the tables and return (and write) everything as one document."""
    s = settings
    device = choose_device(s)
    console = Console(width=150)
    document: dict[str, Any] = describe_environment({"settings": asdict(s), "device": str(device)})
    if not (s.stages or s.train or s.scale):
        document["throughput"] = show_throughput(s, console, device)
    if s.stages:
        document["stages"] = show_stages(s, console, device)
    if s.train:
        document["training"] = show_training(s, console, device)
    if s.scale:
        document["scaling"] = show_scaling(s, console, device)
    if s.json:
        user_path(s.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(user_path(s.json), document)
    return document


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 input that cannot be used)."""
    run_command(lambda: profile(read_command(ProfileSettings, __doc__)))


if __name__ == "__main__":
    main()
