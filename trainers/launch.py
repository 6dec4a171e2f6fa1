"""What the launcher says: Accelerate's settings, the processes of a job, and which of them tells why it ends.

Whatever ``accelerate launch``, its config file or the environment asks of Accelerate is taken over and recorded, or
refused by name; docs/launching.md has the table.
"""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from amimv import InputError, first_line, user_path
from amimv.signals import EXIT_INTERRUPTED, interruption, rank_of
from amimv.threads import LAUNCHED
from amimv.trainers.settings import PretrainSettings

logger = logging.getLogger("amimv")
T = TypeVar("T")

#: What asks for a training that this is not.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context or sequence parallel)",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient clipping",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "SageMaker's data or model parallelism",
    "ACCELERATE_IN_TPU_POD": "TPUs",
    "ACCELERATE_DOWNCAST_BF16": "TPUs",
    "XLA_USE_BF16": "TPUs",
    "XLA_DOWNCAST_BF16": "TPUs",
}
#: What Accelerate itself, or `asked`, obeys.
OBEYED = (
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_USE_CPU"),
    *("ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_LOG_LEVEL", "ACCELERATE_USE_SAGEMAKER"),
    *("ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH", "ACCELERATE_CONFIG_DS_FIELDS"),
)
OFF = ("", "0", "n", "no", "f", "false", "off", "none", "default")


def _on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").strip().lower() not in OFF


def asked(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """The settings that Accelerate's variables ask for, each with its variable; a launcher's defaults ask for nothing.

    Raises:
        InputError: for what the training has no form of.
    """
    for name, what in REFUSED.items():
        if _on(environment, name):
            raise InputError(f"{name} asks for {what}, which this training does not use: leave it out of the launch")
    found: dict[str, tuple[str, Any]] = {}
    name = "ACCELERATE_MIXED_PRECISION"
    if _on(environment, name):
        if (precision := environment[name].lower()) not in ("bf16", "fp16"):
            raise InputError(f"{name} is {precision}, expected no, bf16 or fp16")
        found["mixed_precision"] = (name, precision)
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    steps = environment.get(name) or "1"
    if not steps.isdecimal() or int(steps) < 1:
        raise InputError(f"{name} is {steps}, expected a whole number of at least 1")
    if int(steps) > 1:
        found["accumulation"] = (name, int(steps))
    if _on(environment, LAUNCHED):
        details = [name for name in environment if name.startswith("ACCELERATE_DYNAMO_") and name != LAUNCHED]
        if environment[LAUNCHED].lower() != "inductor" or any(_on(environment, name) for name in details):
            raise InputError(f"{LAUNCHED} is {environment[LAUNCHED]}, expected no, or inductor in its default mode")
        found["compile"] = (LAUNCHED, True)
    return found


def take_over(
    settings: PretrainSettings, sources: dict[str, str], environment: Mapping[str, str]
) -> tuple[PretrainSettings, dict[str, str]]:
    """Settings and their sources with what the launcher asks for, above defaults and presets.

    Raises:
        InputError: it contradicts a flag or the config file, or asks for what the training has no form of.
    """
    changes: dict[str, Any] = {}
    launcher = "accelerate launch" if LAUNCHED in environment else "environment"
    for name, (variable, value) in asked(environment).items():
        own, source = getattr(settings, name), sources[name]
        if own == value:
            continue
        flag = "--" + name.replace("_", "-")
        if source == "flag" or (settings.config and user_path(source) == user_path(settings.config)):
            where = flag if source == "flag" else source
            raise InputError(f"{variable} asks for {flag} {value}, but {where} says {own}: leave one of them out")
        changes[name], sources = value, sources | {name: f"{launcher} ({variable})"}
    return replace(settings, **changes), sources


def without_effect(environment: Mapping[str, str]) -> list[str]:
    """A line for each thing that was asked for in vain."""
    known = (*OBEYED, *REFUSED)
    idle = sorted(
        name
        for name in environment
        if name.startswith("ACCELERATE_") and name not in known and not name.startswith("ACCELERATE_DYNAMO_")
    )
    lines = [f"set, but of no effect here: {', '.join(idle)}"] if idle else []
    if LAUNCHED in environment and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        lines.append("accelerate launch starts one process without several GPUs: on CPUs take torchrun (see README)")
    return lines


def make_accelerator(settings: PretrainSettings, folder: Path, cpu: bool = False) -> Accelerator:
    """Accelerate by the settings alone, see `take_over`; on CUDA GPUs if there are any, unless ``cpu``."""
    s = settings
    cuda = torch.cuda.is_available()
    if s.mixed_precision == "fp16" and not cuda:
        raise InputError("mixed precision fp16 needs a GPU, and there is none: use no or bf16")
    if s.sync_bn and not cuda:
        raise InputError("sync-bn needs GPUs, and there is none: leave it out")
    try:
        accelerator = Accelerator(
            cpu=cpu or not cuda,  # no device of another kind has been tried
            mixed_precision=s.mixed_precision,
            # Buffers are each process's own: BatchNorm's statistics, which nobody synchronises unless asked to.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loss is divided already
            dynamo_backend="no",  # the networks are compiled already
            log_with=s.tracker,
            project_dir=str(folder),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"Accelerate refused the settings: {first_line(error)}") from error
    device = accelerator.device
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not cuda):
        raise InputError(
            f"Accelerate chose the device {device}, expected a CUDA GPU or, by ACCELERATE_USE_CPU=true, cpu"
        )
    if s.tracker and not accelerator.log_with:
        raise InputError(f"tracker '{s.tracker}' is not installed: pip install {s.tracker}, or leave it out")
    if s.threads:
        torch.set_num_threads(s.threads)
    return accelerator


def agree(accelerator: Accelerator, values: list[Any], source: int = 0) -> list[Any]:
    """One rank's values on every process."""
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(values, src=source)
    return values


def on_main(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What rank 0 gets from it, on every process; so is what stops it."""
    value, problem = None, None
    if accelerator.is_main_process:
        try:
            value = act()
        except (InputError, OSError) as error:
            problem = error
    value, problem = agree(accelerator, [value, problem])
    if problem is not None:
        raise problem
    return value


def main_first(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What every rank gets from it, rank 0 before the others; what stops rank 0 stops them all."""
    found: list[T] = []
    on_main(accelerator, lambda: found.append(act()))
    return found[0] if found else act()


def share(accelerator: Accelerator, value: Any) -> list[Any]:
    """Every rank's value on every process, in the order of ranks."""
    values = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(values, value)
    return values


def _board(environment: Mapping[str, str]) -> dist.Store | None:
    """Where the processes of a job can tell one another why they end, in whatever state their collectives are:
    torchrun's own store, which outlives them. None without one.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    except (KeyError, ValueError, RuntimeError):
        return None
    return dist.PrefixStore(f"amimv/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _read(board: dist.Store | None, key: str, patience: float = 0.0) -> str:
    """What stands there, by then; empty if nothing does."""
    try:
        if board is None or not (patience or board.check([key])):
            return ""
        if patience:
            board.wait([key], timedelta(seconds=patience))
        return board.get(key).decode()
    except RuntimeError:  # the wait is over, or the launcher is gone
        return ""


def run_ranked(command: Callable[[], tuple[int, str]], advice: str, environment: Mapping[str, str]) -> int:
    """Run a process's share of a job and print why it ended early, so that each reason stands there once.

    Rank 0 prints its own. The others print what rank 0 does not end with, too, after their rank. A process that fails
    because another one has ended says nothing, and nor does one that is told to stop because another one failed.

    Args:
        command: gives an exit status and the line for it; empty for none.
        advice: of the line after SIGTERM or SIGINT.
        environment: of the process.

    Returns:
        The exit status; of a process that ends because another one failed, that one's.
    """
    rank, board = rank_of(environment), _board(environment)
    try:
        try:
            status, message = command()
        except Exception as error:
            if not _read(board, "ended"):
                if board is not None:
                    error.add_note(f"(on rank {rank})")
                    _tell(board, "failed", "1")
                    _tell(board, "ended", "error")
                raise
            # Its collectives broke: that is not its own.
            status, message = EXIT_INTERRUPTED, _read(board, "ended")
    except KeyboardInterrupt as stop:
        status, message = EXIT_INTERRUPTED, interruption(stop, advice)
    return _say(status, message, rank, board) if status else 0


def _say(status: int, message: str, rank: int, board: dist.Store | None) -> int:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the line comes first
    if status == EXIT_INTERRUPTED:
        if failed := _read(board, "failed"):
            return int(failed)
        _tell(board, "ended", message)
        if rank == 0:
            print(message, file=sys.stderr, flush=True)
        return status
    if rank == 0:
        print(message, file=sys.stderr, flush=True)
    _tell(board, "failed", str(status))
    _tell(board, "ended", message)
    _tell(board, f"rank {rank}", message)
    # Before the processes are connected, rank 0 may be far behind: importing torch, say.
    patience = 5.0 if dist.is_initialized() else 60.0
    if rank > 0 and _read(board, "rank 0", patience) != message:
        print(f"rank {rank}: {message}", file=sys.stderr, flush=True)
    return status


def _tell(board: dist.Store | None, key: str, value: str) -> None:
    try:
        if board is not None:
            board.set(key, value)
    except RuntimeError:  # the launcher is gone
        pass
