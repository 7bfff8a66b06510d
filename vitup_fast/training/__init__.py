"""Training of ViT-Up networks (arXiv 2606.14024): ``Run(TrainingConfig(...), folder).train()``."""

from .configuration import TrainingConfig
from .loop import Interrupted, Run

__all__ = ["Interrupted", "Run", "TrainingConfig"]
