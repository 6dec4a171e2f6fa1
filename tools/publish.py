"""A run's backbone as others load it: ``python tools/publish.py runs/NAME -o FOLDER``, and ``--push ME/NAME``.

The folder is in the form of timm's hub: weights as safetensors, ``config.json``, and a model card, ``README.md``, with
the data, the settings, the results and the command of the run. It is read again before the card is written: by
`amimv.models.load_backbone`, and by timm alone in a process of its own, unless its arguments cannot express the
network. The card says which.
"""

import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from amimv.command_line import begin_command, read_command
from amimv.signals import is_command
from amimv.tools.commands import PublishSettings

if is_command(__name__):
    begin_command(PublishSettings, __doc__)

import huggingface_hub
import torch
from safetensors.torch import save_file
from torch import nn

from amimv import InputError, run_command, shown, told, user_path
from amimv.files import replacing
from amimv.models.backbones import BackboneSpec, encode, load_backbone, save_backbone, timm_note
from amimv.tools.model_card import write_card
from amimv.trainers.commands import check_run

#: Of a published folder.
FILES = ("README.md", "backbone.json", "config.json", "model.safetensors")
#: Features may differ by this share of the largest one: another layout in memory rounds otherwise.
TOLERANCE = 1e-4

#: What someone without this package does; prints the largest difference.
ALONE = """
import sys
import timm, torch
from safetensors.torch import load_file
folder, given = sys.argv[1:]
given = load_file(given)
network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    features = network(given["images"])
assert not any(name.split(".")[0] == "amimv" for name in sys.modules)
print(float((features - given["features"]).abs().max()))
"""


def publish(settings: PublishSettings) -> None:
    """Write the folder, read it again, and push it if asked to.

    Raises:
        InputError: there is no run or no backbone in it, the folder holds something else, what is read again gives
            other features, or the hub refuses.
    """
    check_run(settings.run)
    run, folder = user_path(settings.run), user_path(settings.output)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(FILES)):
        raise InputError(f"{folder} holds something else: give another folder with -o")
    network, spec = load_backbone(run / "backbone")
    (folder / "README.md").unlink(missing_ok=True)  # it says that the folder is whole
    save_backbone(network, spec, folder)
    found = check_published(network, spec, folder)
    with replacing(folder / "README.md") as file:
        file.write(write_card(run, network, spec, settings.push or "", folder.name))
    print(f"{folder}: {found}")
    if settings.push:
        print(f"pushed to {push(folder, settings.push)}")


@torch.no_grad()
def check_published(network: nn.Module, spec: BackboneSpec, folder: Path) -> str:
    """Read the folder again, and compare the features of noise.

    Returns:
        What was compared, in words.

    Raises:
        InputError: they are others.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, spec.channels, spec.size, spec.size, generator=generator)
    features = encode(network, images)
    again, read = load_backbone(folder)
    if read != spec or not torch.equal(encode(again, images), features):
        raise InputError(f"{folder} read again gives other features than the run's backbone: is the disk sound?")
    if note := timm_note(spec):
        return f"load_backbone gives the run's features; {note}"
    difference = _difference_in_timm(folder, {"images": images, "features": features.contiguous()})
    if not difference <= TOLERANCE * float(features.abs().max()):
        raise InputError(f"{folder} loaded by timm alone gives other features, by {difference:.2g}: do not publish it")
    return f"timm alone gives the run's features (largest difference {difference:.1g}), and so does load_backbone"


def _difference_in_timm(folder: Path, given: dict[str, torch.Tensor]) -> float:
    """The largest difference from the features that timm gives in a process that imports nothing else."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "given.safetensors"
        save_file(given, path)
        command = [sys.executable, "-c", ALONE, str(folder.resolve()), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{folder} cannot be loaded by timm alone ({shown(reason, 160)}): do not publish it")
    return float(done.stdout)


def push(folder: Path, name: str) -> str:
    """Upload a published folder to the Hugging Face hub; its address.

    Raises:
        InputError: the hub is out of reach, or refuses the name or the token.
    """
    api: Any = huggingface_hub.HfApi(library_name="amimv")
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Backbone, its config and its card",
        )
    except Exception as error:  # of any kind: the code and the network are not ours
        raise InputError(
            f"{folder} is written, but not pushed to {name} ({told(error)}): see to the network, "
            "the name and the token (hf auth login), and run the same command again"
        ) from error
    return str(commit.repo_url)


def main() -> None:
    """The command: settings in, exit status out (0 done, 2 input that cannot be used, 74 files out of reach)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    run_command(lambda: publish(read_command(PublishSettings, __doc__)))


if __name__ == "__main__":
    main()
