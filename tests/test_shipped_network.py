"""The network that ships, on real features of a photograph that it was not trained on: what random weights cannot show.

The features were computed once: ``tests/data/dinov2_small_chelsea.safetensors`` holds DINOv2 ViT-S/14's hidden states
of the middle square of ``examples/chelsea.png`` at 448 px, its last ones at 896 px (``teacher``), and what embeds
patches.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fp8_reference import mlp_fp8
from PIL import Image
from safetensors.torch import load_file

import vitup_fast
from vitup_fast.evaluation.faithfulness import middle_square
from vitup_fast.images import normalise
from vitup_fast.walks.operators import OperatorsWalk

ROOT = Path(__file__).parent.parent
SIDE = 448
# What a lower precision may take of the gain over bilinear interpolation.
BFLOAT16_SHARE, INT8_SHARE, FP8_SHARE = 0.05, 0.4, 0.05


def mean_cosine(a, b):
    """Mean over positions of maps ``[h, w, D]``."""
    return F.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def enlarged(tokens, size, mode):
    """Tokens ``[h, w, D]`` at a size, as an interpolation has them."""
    maps = F.interpolate(tokens.permute(2, 0, 1)[None], size, mode=mode)
    return maps[0].permute(1, 2, 0)


class Photograph:
    """The network, the photograph's features, and the teacher's."""

    def __init__(self):
        tensors = {
            n: t.float() for n, t in load_file(ROOT / "tests/data/dinov2_small_chelsea.safetensors").items()
        }
        self.upsampler = vitup_fast.load("vit_up_dinov2_small", backbone_weights="random", device="cpu")
        embedding = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token")
        backbone = self.upsampler.backbone
        backbone.model.load_state_dict({name: tensors[name] for name in embedding}, strict=False)
        depths = self.upsampler.vit_up.config.layer_indices
        self.states = [tensors[f"hidden.{depth}"] for depth in depths]  # [h, w, D] each
        self.teacher = tensors["teacher"]  # [2h, 2w, D]
        image = middle_square(Image.open(ROOT / "examples/chelsea.png"), 2 * SIDE)
        pixels = normalise(image, backbone.mean, backbone.std)
        h, w = self.states[0].shape[:2]
        density = self.upsampler.vit_up.config.patch_grid_density
        with torch.no_grad():
            self.grid = backbone.patch_grid(pixels, (density * h, density * w))

    def prepare(self, **options):
        """Prepare the photograph."""
        return self.upsampler.vit_up.prepare([state[None] for state in self.states], self.grid, **options)


@pytest.fixture(scope="module")
def photograph():
    with torch.no_grad():
        yield Photograph()


@pytest.fixture(scope="module")
def features(photograph):
    """At the teacher's tokens, float32."""
    with torch.no_grad():
        return photograph.upsampler.vit_up.dense(photograph.prepare(), photograph.teacher.shape[:2])[0]


def gain(photograph, features):
    """How much nearer to the teacher than bilinear interpolation."""
    bilinear = enlarged(photograph.states[-1], photograph.teacher.shape[:2], "bilinear")
    return mean_cosine(features, photograph.teacher) - mean_cosine(bilinear, photograph.teacher)


def test_it_is_nearer_to_the_teacher_than_interpolation(photograph, features):
    assert gain(photograph, features) > 0.01
    nearest = enlarged(photograph.states[-1], photograph.teacher.shape[:2], "nearest")
    assert mean_cosine(features, photograph.teacher) > mean_cosine(nearest, photograph.teacher) + 0.01


@torch.no_grad()
def test_bfloat16_keeps_the_gain(photograph, features):
    with torch.autocast("cpu", torch.bfloat16):
        low = photograph.upsampler.vit_up.dense(photograph.prepare(), photograph.teacher.shape[:2])[0]
    assert low.dtype == torch.bfloat16
    assert gain(photograph, low) > (1 - BFLOAT16_SHARE) * gain(photograph, features)


@torch.no_grad()
def test_int8_keeps_the_gain(photograph, features):
    if not any(i.name == "cpu_int8" and i.available for i in vitup_fast.ops.implementations()):
        pytest.skip("the C++ kernels are not built")
    size = photograph.teacher.shape[:2]
    vit_up = photograph.upsampler.vit_up
    low = vit_up.dense(photograph.prepare(impl="cpu_int8"), size, impl="cpu_int8")[0]
    assert gain(photograph, low) > (1 - INT8_SHARE) * gain(photograph, features)


@torch.no_grad()
def test_fp8_keeps_the_gain(photograph, features, monkeypatch):
    """The roundings of ``cuda_fp8``, as PyTorch computes them, in bfloat16."""

    def rounded(x, weights, **residual):
        return (mlp_fp8(x, weights, torch.float32) + residual.get("residual", 0)).to(torch.bfloat16)

    for operation in ("residual_mlp", "film_mlp"):
        monkeypatch.setattr(importlib.import_module(f"vitup_fast.ops.{operation}"), "mlp", rounded)
    monkeypatch.setattr(vitup_fast.walks, "WALKS", (OperatorsWalk,))
    vit_up, size = photograph.upsampler.vit_up, photograph.teacher.shape[:2]
    with torch.autocast("cpu", torch.bfloat16):
        low = vit_up.dense(photograph.prepare(impl="torch"), size, impl="torch")[0]
    assert 1e-4 < 1 - mean_cosine(low, features) < 3e-4  # measured: 1.8e-4; bfloat16 1e-5
    assert gain(photograph, low) > (1 - FP8_SHARE) * gain(photograph, features)


@torch.no_grad()
def test_adaptive_maps_hold_their_tolerance(photograph):
    """Few queries make nearly the whole map, and the report knows how nearly."""
    vit_up, size = photograph.upsampler.vit_up, (192, 192)
    with torch.autocast("cpu", torch.bfloat16):
        cache = photograph.prepare()
        whole = vit_up.dense(cache, size)[0]
        reports = []
        for tolerance in (0.3, 0.15):
            adaptive = vit_up.dense(cache, size, tolerance=tolerance, report=reports.append)[0]
    wider, report = reports
    assert (adaptive == whole).all(-1).sum() >= report.queries[0]
    assert wider.share < report.share < 0.4
    assert mean_cosine(adaptive, whole) > 0.995
    error = ((adaptive.float() - whole.float()).norm() / whole.float().norm()).item()
    assert report.error[0] / 2 < error < 2 * report.error[0]
