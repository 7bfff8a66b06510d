"""vitup_fast: features of a vision transformer at any continuous image coordinate, fast (ViT-Up)."""

from .config import ViTUpConfig
from .errors import CheckpointError, InputError, MissingPackageError
from .model import ImageCache, ViTUp
from .upsampler import Upsampler, WeightsUnavailableError, accelerate, load

__version__ = "0.1.0"

__all__ = [
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
