"""What keeps the student close to the teacher, in one scale of one depth (arXiv 2606.14024, training losses)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
TEMPERATURE = 0.5
MASKED = -1e4


def normalised_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error after normalising both by the teacher's mean and deviation over channels of each token.

    Args:
        student: features.  # [..., D]
        teacher: features.  # [..., D]
    """
    variance = teacher.var(dim=-1, keepdim=True, correction=0)  # means cancel out
    return ((student - teacher).square() / (variance + EPS)).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of one minus the cosine of ``[..., D]`` and ``[..., D]``."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1, eps=EPS).mean()


def similarity_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence between the tokens' similarities to each other, per token and per nat of a uniform guess.

    Args:
        student: features of the tokens of each image.  # [B, T, D]
        teacher: features.  # [B, T, D]
    """
    B, T, _ = student.shape
    itself = torch.eye(T, dtype=torch.bool, device=student.device)

    def log_probabilities(features: Tensor) -> Tensor:  # [B, T, T]
        unit = F.normalize(features, dim=-1, eps=EPS)
        cosines = unit @ unit.transpose(1, 2)
        return torch.log_softmax((cosines / TEMPERATURE).masked_fill(itself, MASKED), dim=-1)

    divergence = F.kl_div(
        log_probabilities(student), log_probabilities(teacher), reduction="sum", log_target=True
    )
    return divergence / (B * T * max(math.log(T), 1.0))
