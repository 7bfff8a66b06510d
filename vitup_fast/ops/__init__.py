"""The five operations of ViT-Up, each with its definition, its PyTorch operator and its argument checks."""

from .bilinear_sample import bilinear_sample
from .film_mlp import FilmTable, FilmWeights, PositionWeights, film_mlp
from .implementations import implementations
from .norm_linear import norm_linear, norm_linear_argmax
from .primitives import MLPWeights
from .residual_mlp import residual_mlp
from .rope_cross_attention import AttentionWeights, rope_cross_attention

__all__ = [
    "AttentionWeights",
    "FilmTable",
    "FilmWeights",
    "MLPWeights",
    "PositionWeights",
    "bilinear_sample",
    "film_mlp",
    "implementations",
    "norm_linear",
    "norm_linear_argmax",
    "residual_mlp",
    "rope_cross_attention",
]
