"""The operations, each one class in one file; this list, in the order in which they are applied, is the only one.

Geometry composes from the input's side: the crop is taken of the image, what follows turns the crop.
"""

from amimv.pipelines.operations.base import Colour, ColourChange, Geometry, Operation, Pixels, Source
from amimv.pipelines.operations.blur import Blur
from amimv.pipelines.operations.crop import Crop
from amimv.pipelines.operations.elastic import Elastic
from amimv.pipelines.operations.equalise import Equalise
from amimv.pipelines.operations.erasing import Erasing
from amimv.pipelines.operations.flip import Flip
from amimv.pipelines.operations.gamma import Gamma
from amimv.pipelines.operations.grey import Grey
from amimv.pipelines.operations.jitter import Jitter
from amimv.pipelines.operations.noise import Noise
from amimv.pipelines.operations.rotation import Rotation
from amimv.pipelines.operations.sharpness import Sharpness
from amimv.pipelines.operations.shear import Shear
from amimv.pipelines.operations.solarise import Solarise
from amimv.pipelines.operations.translation import Translation

OPERATIONS: tuple[type[Operation], ...] = (
    *(Crop, Translation, Rotation, Shear, Flip),
    *(Jitter, Grey),
    *(Elastic, Equalise, Gamma, Sharpness, Blur, Solarise, Noise, Erasing),
)
#: Those of the last stage, in their order.
PIXELS: tuple[type[Pixels], ...] = tuple(cls for cls in OPERATIONS if issubclass(cls, Pixels))

__all__ = [
    "OPERATIONS",
    "PIXELS",
    "Blur",
    "Colour",
    "ColourChange",
    "Crop",
    "Elastic",
    "Equalise",
    "Erasing",
    "Flip",
    "Gamma",
    "Geometry",
    "Grey",
    "Jitter",
    "Noise",
    "Operation",
    "Pixels",
    "Rotation",
    "Sharpness",
    "Shear",
    "Solarise",
    "Source",
    "Translation",
]
