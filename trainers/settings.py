"""Settings: one flat frozen dataclass, layered from defaults, YAML files and flags.

Later layers win: dataclass < ``configs/METHOD.yaml`` < ``--preset`` < ``--config FILE`` < flags, whatever the order on
the command line. Every resolved value remembers its layer.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import tyro
import yaml

from amimv import InputError, check_choice, did_you_mean, shown, user_path
from amimv.models.methods import METHODS
from amimv.pipelines import ViewPolicy, build_policy
from amimv.pipelines.operations import OPERATIONS
from amimv.pipelines.params import operation_settings
from amimv.pipelines.recipes import ALIASES as RECIPE_ALIASES
from amimv.pipelines.recipes import HARD
from amimv.trainers.checks import check, check_value, idle, refuse_contradictions, words_of
from amimv.trainers.yaml_values import coerce, read_yaml

logger = logging.getLogger("amimv")

CONFIGS = Path(__file__).parent / "configs"
#: ``amimv`` is the method `mimv` on the recipe that this project recommends; it has a YAML of its own.
METHOD_ALIASES = {"amimv": "mimv"}
#: Settings that are places, in which ``~`` is the home folder; so it is in ``data``, where that is a place.
PATHS = ("root", "cache", "indices", "output", "config")


@dataclass(frozen=True)
class PretrainSettings:
    data: str = "phantom"
    """phantom, a 2-D MedMNIST name (retinamnist, ...), the path of an .npz in MedMNIST's layout, or folder:PATH with a
    folder of images per class (without labels: with images) in PATH/train, PATH/val and PATH/test"""
    data_seed: int = 0
    """of phantom, of the long-tailed subset and of the label fractions: any 64-bit integer"""
    size: int = 0
    """of the images, in pixels: 28, 64, 128 or 224; 0: 28, or what an .npz has"""
    channels: int = 0
    """3 turns grey images into RGB; 0: as stored"""
    task: str = ""
    """what the labels are: multi-class, binary-class, ordinal-regression or 'multi-label, binary-class'; empty: as
    MedMNIST says, or inferred"""
    root: str = ""
    """folder of MedMNIST's files; empty: $AMIMV_DATA, else medmnist's own"""
    cache: str = ""
    """a folder for decoded images of folder:PATH: the next start maps them into memory in seconds; empty: none"""
    groups: str = ""
    """of images of one patient, lesion or slide, for the partner same-group: a column of NAME_index.csv beside the
    data, or FILE.csv:COLUMN; empty: train_groups, ... of an .npz that has them"""
    value_range: tuple[float, float] | None = None
    """the stored values that become 0 and 1 (12 bits in 16: 0 4095); by default those of 8 bits, and of 16 bits those
    that the training images have"""
    rho: float = 1.0
    """imbalance ratio of the training subset; 1 with the exp profile and no total is the natural set"""
    profile: str = "exp"
    """of the long tail: exp, step, pareto or natural"""
    total: int = 0
    """images in the training subset; 0: each class is capped at what it has"""
    indices: str = ""
    """an .npy file of training indices, instead of rho, profile and total"""

    method: Annotated[str, tyro.conf.arg(help=f"one of {', '.join((*METHOD_ALIASES, *METHODS))}")] = "amimv"
    recipe: str = "amimv"
    """which views of which images make up a pair: amimv, two-view, multi-crop, mimv, amimv-roles, ..., or a text such
    as "N(x)+A(y) | A(x)+N(y)" """
    online: str = "hard"
    """of recipe amimv-strength: which augmentation the online side sees, hard or soft"""
    partners: int = 1
    """partner images per anchor"""
    sampler: str = "uniform"
    """of the anchors: uniform, class-balanced, square-root, effective-number, progressive or cluster-balanced"""
    partner: str = "uniform"
    """of the partners, likewise, or same-group: another image of the anchor's patient, lesion or slide"""
    beta: float = 0.999
    """of effective-number"""
    clusters: int = 20
    """k-means clusters of cluster-balanced"""
    cluster_every: int = 5
    """epochs between two clusterings"""
    exclude_duplicates: str = "auto"
    """leave other rows of the same image out of the negatives: yes, no, or auto: with a rebalancing sampler"""
    backend: str = "kornia"
    """what renders the views: kornia or dali"""

    view_size: int = 0
    """of the views, in pixels; 0: that of the images"""
    second_crop_min: float | None = None
    """like crop_min, of side b's view in recipes two-view and multi-crop; None: as side a's"""
    second_jitter_p: float | None = None
    """like jitter_p, of that view"""
    second_grey_p: float | None = None
    """like grey_p, of that view"""
    second_blur_p: float | None = None
    """like blur_p, of that view"""
    second_solarise_p: float | None = None
    """like solarise_p, of that view"""
    local_crops: int = 6
    """local sides of recipe multi-crop"""
    local_size: int = 0
    """of the local crops, in pixels; 0: about three sevenths of the views"""
    local_crop_max: float = 0.4
    """largest area of the local crops"""

    backbone: str = "small"
    """small, or any timm model"""
    epochs: int = 0
    """length of the training; or give steps"""
    steps: int = 0
    """length of the training in optimiser steps; or give epochs"""
    batch_size: int = 256
    """global: over all processes and accumulated micro-batches"""
    accumulation: int = 1
    """micro-batches per optimiser step"""
    optimizer: str = "adamw"
    """sgd, adamw, lars, larc (LARS with a clipped rate) or another of timm's"""
    lr: float = 1e-3
    """peak learning rate, at lr_batch"""
    lr_batch: int = 0
    """the learning rate is scaled by batch_size / lr_batch; 0: not scaled"""
    weight_decay: float = 1e-4
    """not applied to biases and norms"""
    optimizer_momentum: float = 0.9
    """of SGD and LARS"""
    trust_coefficient: float = 0.001
    """of LARS"""
    warmup: float = 0.05
    """share of the training spent in linear warm-up, before the cosine"""
    mixed_precision: str = "no"
    """no, bf16 or fp16"""
    compile: bool = False
    """torch.compile the networks, and on a GPU the views, too"""
    sync_bn: bool = False
    """BatchNorm statistics over all processes (CUDA)"""
    threads: int = 0
    """of each process on the CPU; 0: what OMP_NUM_THREADS says, else its share of the cores that it may use; the 1
    that accelerate launch gives to whatever it starts does not count"""
    seed: int = 0
    """of the weights and of everything drawn in training: any 64-bit integer"""

    log_every: int = 10
    """steps between two reads of the loss (every step's value is logged)"""
    knn_every: int = 10
    """epochs between two kNN scores on the validation split; 0: none"""
    save_every: int = 200
    """steps between two checkpoints"""
    evaluate: bool = True
    """evaluate at the end"""
    label_fractions: tuple[float, ...] = (1.0,)
    """shares of the training labels that the evaluation may use"""
    supervised_steps: int = 300
    """training of the supervised reference in the evaluation, and of fine-tuning; 0: neither"""
    supervised_lr: tuple[float, ...] = (5e-3,)
    """learning rates for these; of several, the best on validation data is taken"""
    finetune: bool = False
    """evaluate the pretrained backbone fine-tuned, too"""
    baselines: str = "yes"
    """evaluate raw pixels, random initialisation and the supervised reference: yes, no, or only (no pre-training)"""
    tracker: str = ""
    """of Accelerate: tensorboard, wandb, mlflow, trackio, ...; a resumed run goes on in the same run of these four"""
    output: str = "runs"
    """folder of the run folders"""
    name: str = ""
    """of the run folder; empty: made from the settings"""
    resume: str = "no"
    """auto: go on from the newest good checkpoint, if there is one"""
    preset: str = "auto"
    """small, dermatoscopy, none, or auto: small for phantom and for the small backbone, else none"""
    config: str = ""
    """a YAML file of settings, such as a run's config.yaml"""

    def policy(self) -> ViewPolicy:
        """The augmentation ``A``."""
        return build_policy({name: getattr(self, name) for name in operation_settings()}, self.view_size or None)

    def second_policy(self) -> ViewPolicy:
        """The augmentation ``A'`` of side b in two-view recipes."""
        given = {name: getattr(self, f"second_{name}", None) for name in operation_settings()}
        return self.policy().changed(**{name: value for name, value in given.items() if value is not None})


def settings_class(method: str) -> type[PretrainSettings]:
    """`PretrainSettings` with the fields of a method's own settings; one class for a method and its alias."""
    check_choice("method", method, (*METHOD_ALIASES, *METHODS))
    return _combined(METHOD_ALIASES.get(method, method))


def _augmentation() -> list[tuple[str, Any, Any]]:
    """The settings of all operations as fields of ours: their documentation, and as defaults MIMV's augmentation."""
    described = {setting.name: setting for kind in OPERATIONS for setting in fields(kind)}
    return [
        (name, Annotated[described[name].type, tyro.conf.arg(help=described[name].metadata["help"])], value)
        for name, value in HARD.settings().items()
    ]


@cache
def _combined(method: str) -> type[PretrainSettings]:
    bases = (METHODS[method].settings, PretrainSettings)
    twice = {field.name for field in fields(bases[0])} & {field.name for field in fields(bases[1])}
    if twice:
        raise TypeError(f"settings of method {method} have names of the trainer's: {', '.join(sorted(twice))}")
    made = make_dataclass("Settings", _augmentation(), bases=bases, frozen=True, namespace={"__module__": __name__})
    return cast(type[PretrainSettings], made)


def _layer(content: dict[str, Any], cls: type, source: str) -> dict[str, Any]:
    """A file's settings, each of its type and in its range; every error begins with ``source``."""
    kinds = get_type_hints(cls)
    known = {field.name: field.default for field in fields(cls)}
    layer = {}
    for name, value in content.items():
        if name not in known:
            hint = ": " + near if (near := did_you_mean(str(name), known)) else ", see --help for all settings"
            raise InputError(f"{source}: unknown setting {shown(str(name))}{hint}")
        layer[name] = coerce(name, value, kinds[name], source, words_of(name))
        try:
            check_value(name, layer[name], known[name])
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
    return layer


def _preset_layer(preset: str, method: str) -> dict[str, Any]:
    """A preset's settings, and those that it has for one method."""
    content = read_yaml(CONFIGS / "presets" / f"{preset}.yaml")
    by_method = content.pop("methods", {})
    return content | by_method.get(METHOD_ALIASES.get(method, method), {})


def _given(argv: list[str]) -> list[str]:
    """The names of the settings that stand on the command line."""
    names = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return [name.removeprefix("no_") if name.startswith("no_") else name for name in names]


def _peek(argv: list[str], name: str) -> str | None:
    """The value of a flag that decides about layers, before the command line is parsed."""
    flag = "--" + name
    value = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            value = argv[i + 1]
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
    return value


def _layered(
    first: Callable[[str, str], str], config: dict[str, Any], source: str
) -> tuple[type[PretrainSettings], dict[str, Any], dict[str, str]]:
    """All layers up to a config's: the settings' class, their values and where each came from.

    ``first(name, default)`` tells the method, preset, data and backbone, which decide about layers.
    """
    method = first("method", PretrainSettings.method)
    cls = settings_class(method)
    preset = first("preset", PretrainSettings.preset)
    small = first("data", "phantom") == "phantom" or first("backbone", "small") == "small"
    if preset == "auto":
        preset = "small" if small else "none"
    presets = tuple(sorted(path.stem for path in (CONFIGS / "presets").glob("*.yaml")))
    check_choice("preset", preset, (*presets, "none"))

    published = CONFIGS / f"{method}.yaml"
    layers = [(f"configs/{method}.yaml", read_yaml(published))] if published.exists() else []
    if preset != "none":
        layers.append((f"preset {preset}", _preset_layer(preset, method)))
    values: dict[str, Any] = {}
    sources = {field.name: "default" for field in fields(cls)}
    for layer_source, content in [*layers, (source, config)]:
        layer = _one_length(_layer(content, cls, layer_source), layer_source)
        values |= layer
        sources |= dict.fromkeys(layer, layer_source)
    return cls, values | {"preset": preset}, sources


def _settled(cls: type[PretrainSettings], values: dict[str, Any]) -> PretrainSettings:
    """Checked settings without aliases."""
    method, recipe = (values.get(name, getattr(PretrainSettings, name)) for name in ("method", "recipe"))
    values = values | {"method": METHOD_ALIASES.get(method, method), "recipe": RECIPE_ALIASES.get(recipe, recipe)}
    settings = cls(**_at_home(values))
    check(settings)
    refuse_contradictions(settings)
    return settings


def _at_home(values: dict[str, Any]) -> dict[str, Any]:
    return values | {name: os.path.expanduser(values[name]) for name in PATHS if name in values}


def settings_from(content: dict[str, Any], source: str) -> PretrainSettings:
    """Settings from a mapping, on the layers that a config file would lie on; every error begins with ``source``.

    Raises:
        InputError: an unknown name or a bad value.
    """
    try:
        cls, values, _ = _layered(lambda name, default: str(content.get(name, default)), content, source)
        return _settled(cls, values)
    except InputError as error:
        if str(error).startswith(source):
            raise
        raise InputError(f"{source}: {error}") from error


def resolve(argv: list[str] | None = None, prog: str | None = None) -> tuple[PretrainSettings, dict[str, str]]:
    """Settings from the command line and all layers below it.

    Returns:
        The settings, aliases resolved, and for each name the layer that it came from.

    Raises:
        InputError: an unknown name or a bad value. Flags that are not known end in tyro's own message.
    """
    argv = sys.argv[1:] if argv is None else argv
    config_path = _peek(argv, "config")
    config = read_yaml(user_path(config_path)) if config_path else {}

    def first(name: str, default: str) -> str:
        value = _peek(argv, name)
        return str(config.get(name, default) if value is None else value)

    cls, values, sources = _layered(first, config, config_path or "")
    parsed = tyro.cli(cls, prog=prog, args=argv, default=cls(**values))
    flags = _one_length({name: getattr(parsed, name) for name in _given(argv) if name in sources}, "the command line")
    sources |= dict.fromkeys(flags, "flag")
    preset, method = values["preset"], first("method", PretrainSettings.method)
    settings = _settled(cls, values | flags | {"preset": preset, "method": method})
    for names, reason in idle(settings, flags):
        logger.info("no effect here: %s: %s", ", ".join(names), reason)
    return settings, sources


def _one_length(layer: dict[str, Any], source: str) -> dict[str, Any]:
    """A layer that sets epochs unsets the steps of the layers below it, and the other way round."""
    if layer.get("epochs") and layer.get("steps"):
        raise InputError(f"{source} gives both epochs and steps: give one of them")
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if layer.get(name):
            layer = layer | {other: 0}
    return layer


def to_yaml(settings: PretrainSettings, sources: dict[str, str]) -> str:
    """The resolved settings as YAML that ``--config`` reads again; each line ends with where its value came from."""
    lines = []
    for field in fields(settings):
        if field.name in ("config", "resume"):
            continue
        value = getattr(settings, field.name)
        value = list(value) if isinstance(value, tuple) else value
        dumped = yaml.safe_dump([value], default_flow_style=True, width=1000).strip()
        text = f"{field.name}: {dumped[1:-1]}"
        lines.append(f"{text:<40} # {sources[field.name]}")
    return "\n".join(lines) + "\n"


def from_yaml(path: Path) -> PretrainSettings:
    """The settings of a run folder's ``config.yaml``."""
    content = read_yaml(path)
    cls = settings_class(str(content.get("method", PretrainSettings.method)))
    return cls(**_at_home(_layer(content, cls, str(path))))
