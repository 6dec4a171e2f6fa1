"""The table of docs/backbones.md: the smallest model of every timm module, trained one step at three image sizes.

    python tests/models/every_timm_module.py [MODEL ...]

About a quarter of an hour on one core. Each step (forward, backward, two images, on the CPU) has a process of its own,
so that a crash of torch is a row and not the end.
"""

import os
import re
import signal
import sys
import warnings
from multiprocessing import get_context
from multiprocessing.connection import Connection

import timm
import torch

from amimv import InputError
from amimv.models.backbones import BackboneSpec, build_backbone, encode

#: Families that share a module with a smaller one.
ALSO = (
    "repvgg_a0",
    "fastvit_t8",
    "vit_tiny_r_s16_p8_224",
    "mixer_s16_224",
    "maxvit_rmlp_pico_rw_256",
    "vit_small_patch16_dinov3",
)

#: Seconds for one step.
LIMIT = 90
TOO_SLOW = f"no result in {LIMIT} s"


def count_parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())


def smallest_model(module: str) -> str:
    """The model with the fewest parameters, timm's own test models aside."""
    names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
    return min(names, key=count_parameters)


def module_of(name: str) -> str:
    return str(timm.model_entrypoint(name).__module__.rpartition(".")[2])


def native_size(name: str) -> int:
    return int(timm.get_pretrained_cfg_value(name, "input_size")[1])


def train_step(name: str, size: int, result: Connection) -> None:
    """Send ``yes``, or why not, from this process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the C library's last words
    torch.manual_seed(0)
    try:
        network = build_backbone(BackboneSpec(name, size=size))
        features = encode(network, torch.randn(2, 3, size, size))
        features.square().sum().backward()
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())
        result.send("yes" if finite else "gradients that are not finite")
    except InputError as error:
        result.send(str(error))
    except Exception as error:
        result.send(f"{type(error).__name__}: {error}")


def outcome(name: str, size: int) -> str:
    here, there = get_context("fork").Pipe()
    process = get_context("fork").Process(target=train_step, args=(name, size, there))
    process.start()
    there.close()
    try:
        said = here.recv() if here.poll(LIMIT) else TOO_SLOW
    except EOFError:
        process.join()
        code = process.exitcode or 0
        said = f"torch died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    process.kill()
    process.join()
    return str(said)


def table_row(name: str, said: dict[int, str]) -> str:
    """From the sizes, the native one first, and what came of each."""
    cells = ["yes" if result == "yes" else "?" if result == TOO_SLOW else "no" for result in said.values()]
    reasons = {size: inner_reason(result) for size, result in said.items() if result != "yes"}
    why = "; ".join(f"{size}: {reason}" for size, reason in reasons.items())
    return f"| {module_of(name)} | `{name}` | {cells[0]} ({native_size(name)}) | {cells[1]} | {cells[2]} | {why} |"


def inner_reason(message: str) -> str:
    """Without what the other cells of the row say."""
    message = re.split(": (?:choose|see) ", re.sub(r"^backbone '\S+' ", "", message))[0]
    return re.sub(r"^cannot take images of \d+ pixels \((.*)\)$", r"\1", message)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or sorted({*map(smallest_model, timm.list_modules()), *ALSO}, key=module_of)
    print(f"| timm module | model tried | native | 64 | 28 | why not |\n|{'---|' * 6}")
    for name in names:
        sizes = (native_size(name), 64, 28)
        print(table_row(name, {size: outcome(name, size) for size in sizes}), flush=True)


if __name__ == "__main__":
    main()
