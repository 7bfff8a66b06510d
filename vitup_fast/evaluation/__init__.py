"""How good upsampled features are: faithfulness to the backbone, linear segmentation, keypoint matching."""

from .faithfulness import Faithfulness, draw_faithfulness, faithfulness_table, measure_faithfulness
from .features import FeatureFunction
from .files import Journal
from .keypoints import KeypointPair, MatchingScore, matching_table, measure_matching, read_pairs
from .scenes import make_scenes
from .segmentation import LabelledFolder, SegmentationScore, measure_segmentation, segmentation_table

__all__ = [
    "Faithfulness",
    "FeatureFunction",
    "Journal",
    "KeypointPair",
    "LabelledFolder",
    "MatchingScore",
    "SegmentationScore",
    "draw_faithfulness",
    "faithfulness_table",
    "make_scenes",
    "matching_table",
    "measure_faithfulness",
    "measure_matching",
    "measure_segmentation",
    "read_pairs",
    "segmentation_table",
]
