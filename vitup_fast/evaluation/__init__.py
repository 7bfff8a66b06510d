"""How good upsampled features are: faithfulness to the backbone, linear segmentation, keypoint matching."""

from .faithfulness import Faithfulness, draw_faithfulness, faithfulness_table, measure_faithfulness
from .features import FeatureFunction, ImageFeatures, methods_of

__all__ = [
    "Faithfulness",
    "FeatureFunction",
    "ImageFeatures",
    "draw_faithfulness",
    "faithfulness_table",
    "measure_faithfulness",
    "methods_of",
]
