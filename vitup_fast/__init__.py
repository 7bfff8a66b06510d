"""vitup_fast: features of a vision transformer at any continuous image coordinate, fast (ViT-Up)."""

import sys as _sys

from . import kernels as kernels  # offers its kernels to the operations
from .accelerate import accelerate
from .errors import CheckpointError, InputError, MissingPackageError
from .network import backbone, checkpoint, config, model
from .network.adaptive import AdaptiveReport
from .network.config import ViTUpConfig
from .network.model import ImageCache, ViTUp
from .sources import WeightsUnavailableError
from .upsampler import Upsampler, load

__version__ = "0.1.0"

__all__ = [
    "AdaptiveReport",
    "CheckpointError",
    "ImageCache",
    "InputError",
    "MissingPackageError",
    "Upsampler",
    "ViTUp",
    "ViTUpConfig",
    "WeightsUnavailableError",
    "accelerate",
    "load",
]

# Names under which these modules are imported as well.
_sys.modules.update(
    {f"{__name__}.{m.__name__.rpartition('.')[2]}": m for m in (backbone, checkpoint, config, model)}
)
