"""What can be set of the data, as `amimv.trainers.settings` has it of all else; and the roles that settings have."""

from dataclasses import dataclass

from amimv.fields import NOTHING, SEED, setting
from amimv.pipelines import PROFILES
from amimv.pipelines.sources.labels import check_task_name
from amimv.pipelines.sources.table import by_role
from amimv.pipelines.sources.value_range import check_range
from amimv.trainers import conditions

#: Roles of settings: a place, in which ``~`` is the home folder; what decides which published split is read; which of
#: its training images are used; what acts without a pre-training, too.
PATH, SPLIT, SUBSET, ALONE = "path", "split", "subset", "alone"


@dataclass(frozen=True)
class DataSettings:
    """The images of a run, and which of those for training it sees."""

    data: str = setting(
        "phantom",
        "phantom, a 2-D MedMNIST name (retinamnist, ...), the path of an .npz in MedMNIST's layout, folder:PATH "
        "with a folder of images per class (without labels: with images) in PATH/train, PATH/val and PATH/test, or "
        "csv:FILE with a row for each image",
        roles=(ALONE, SPLIT),
    )
    data_seed: int = setting(
        0,
        "of phantom, of the long-tailed subset and of the label fractions: any 64-bit integer",
        *SEED,
        roles=(ALONE, SPLIT),
        idle=conditions.NOTHING_DRAWN,
    )
    columns: tuple[str, ...] = setting(
        (),
        "of csv:FILE, which is what: image=NAME label=NAME (of several labels, 0 or 1 each: label=A,B) group=NAME "
        "split=NAME; those that are not given are found by the names that they usually have",
        check=by_role,
        roles=(ALONE, SPLIT),
    )
    split: tuple[float, float, float] | None = setting(
        None,
        "shares of train, val and test, such as 0.7 0.1 0.2, by which data without splits are cut, each class alike "
        "and groups kept whole",
        check=conditions.check_shares,
        roles=(ALONE, SPLIT),
    )
    split_seed: int = setting(
        0, "which of these splits: any 64-bit integer", *SEED, roles=(ALONE, SPLIT), idle=conditions.NOT_CUT
    )
    resplit: bool = setting(
        False,
        "with split: join the splits that the data have, and cut all images anew, as by the lesions (groups) of a set "
        "that was published with some of them in several splits",
        roles=(ALONE, SPLIT),
    )
    skip_damaged: bool = setting(
        False,
        "of files: try them all first, list those that cannot be decoded, and leave them out",
        roles=(ALONE, SPLIT),
        idle=conditions.NO_FILES,
    )
    size: int | None = setting(
        None,
        "of the images, in pixels: 28, 64, 128 or 224, and any of files; unset: 28, or what an .npz has, or 224 of "
        "files",
        1,
        roles=(ALONE, SPLIT),
    )
    channels: int | None = setting(
        None,
        "3 turns grey images into RGB; unset: as stored",
        1,
        choices=("1", "3"),
        called="number of channels",
        roles=(ALONE, SPLIT),
    )
    task: str | None = setting(
        None,
        "what the labels are: multi-class, binary-class, ordinal-regression or 'multi-label, binary-class'; "
        "unset: as MedMNIST says, or inferred",
        check=check_task_name,
        roles=(ALONE, SPLIT),
    )
    root: str | None = setting(
        None,
        "folder of MedMNIST's files; unset: $AMIMV_DATA, else medmnist's own",
        touches=NOTHING,
        roles=(ALONE, SPLIT, PATH),
        idle=conditions.NO_ROOT,
    )
    cache: str | None = setting(
        None,
        "a folder for decoded images of files: the next start maps them into memory in seconds",
        touches=NOTHING,
        roles=(ALONE, PATH),
        idle=conditions.NO_FILES,
    )
    groups: str | None = setting(
        None,
        "of images of one patient, lesion or slide, for the partner same-group, for split, and for the score on test "
        "images that share none with training: a column of "
        "NAME_index.csv beside the data, or FILE.csv:COLUMN; unset: those that a csv:FILE or an .npz has",
        roles=(ALONE, SPLIT),
        idle=conditions.NO_GROUPS,
    )
    value_range: tuple[float, float] | None = setting(
        None,
        "the stored values that become 0 and 1 (12 bits in 16: 0 4095); unset: those of 8 bits, and of 16 bits "
        "those that the training images have",
        check=check_range,
        roles=(ALONE, SPLIT),
    )
    profile: str = setting("exp", "of the long tail", choices=PROFILES, roles=(ALONE, SUBSET))
    rho: float = setting(
        1.0,
        "imbalance ratio of the training subset; 1 with the exp profile and no total is the natural set",
        1,
        check=conditions.check_rho,
        roles=(ALONE, SUBSET),
    )
    total: int | None = setting(
        None, "images in the training subset; unset: each class is capped at what it has", 1, roles=(ALONE, SUBSET)
    )
    indices: str | None = setting(
        None, "an .npy file of training indices, instead of rho, profile and total", roles=(ALONE, PATH)
    )
