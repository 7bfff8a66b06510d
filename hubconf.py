"""Entry points for ``torch.hub.load``, called as those of the paper's authors are.

``torch.hub.load(repository, "vit_up_dinov3_splus")`` runs from a checkout that nobody has installed: the compiled
kernels are then absent, and PyTorch or Triton computes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitup_fast import Upsampler

dependencies = ["torch", "numpy", "timm", "safetensors", "huggingface_hub"]


def vit_up_dinov3_splus(
    device: str | None = None,
    pretrained: bool = True,
    use_bfloat16: bool = True,
    hidden_layer_img_size: int | tuple[int, int] = 448,
    query_chunk_size: int | None = None,
) -> Upsampler:
    """Load ViT-Up for DINOv3 ViT-S+/16 with its published weights.

    Args:
        device: None takes a GPU if there is one.
        pretrained: False, for a network without weights, is refused as the authors do.
        use_bfloat16: weights and features in bfloat16 rather than float32; coordinates stay float32 in any case.
        hidden_layer_img_size: height and width in pixels, or one number for both, to which images are resized for
            the hidden states.
        query_chunk_size: queries walked through the network at once; None lets the library choose.

    Raises:
        InputError: an argument that does not fit, or weights that cannot be fetched.
    """
    return _load(
        "vit_up_dinov3_splus", device, pretrained, use_bfloat16, hidden_layer_img_size, query_chunk_size
    )


def vit_up_dinov3_base(
    device: str | None = None,
    pretrained: bool = True,
    use_bfloat16: bool = True,
    hidden_layer_img_size: int | tuple[int, int] = 448,
    query_chunk_size: int | None = None,
) -> Upsampler:
    """Load ViT-Up for DINOv3 ViT-B/16 with its published weights; arguments and errors as above."""
    return _load(
        "vit_up_dinov3_base", device, pretrained, use_bfloat16, hidden_layer_img_size, query_chunk_size
    )


def vit_up_dinov2_small(
    device: str | None = None,
    pretrained: bool = True,
    use_bfloat16: bool = True,
    hidden_layer_img_size: int | tuple[int, int] = 448,
    query_chunk_size: int | None = None,
) -> Upsampler:
    """Load the ViT-Up for DINOv2 ViT-S/14 that ships with this repository; arguments and errors as above."""
    return _load(
        "vit_up_dinov2_small", device, pretrained, use_bfloat16, hidden_layer_img_size, query_chunk_size
    )


def _load(
    name: str,
    device: str | None,
    pretrained: bool,
    use_bfloat16: bool,
    hidden_layer_img_size: int | tuple[int, int],
    query_chunk_size: int | None,
) -> Upsampler:
    """Load a model by its name."""
    _import_checkout()
    import torch

    import vitup_fast
    from vitup_fast.errors import expected

    if pretrained is not True:
        remedy = "Upsampler.create makes a network that can be trained."
        raise expected("pretrained", "True", pretrained, remedy)
    return vitup_fast.load(
        name,
        device=device,
        dtype=torch.bfloat16 if use_bfloat16 else torch.float32,
        hidden_layer_img_size=hidden_layer_img_size,
        query_chunk_size=query_chunk_size,
    )


def _import_checkout() -> None:
    """Import the package from this checkout, which keeps some of its rooms beside it, unless it is imported already."""
    if "vitup_fast" in sys.modules:
        return
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "vitup_fast",
        root / "vitup_fast" / "__init__.py",
        submodule_search_locations=[str(root / "vitup_fast"), str(root)],
    )
    module = sys.modules["vitup_fast"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["vitup_fast"]
        raise
