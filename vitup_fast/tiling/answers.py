"""What is asked of every cell, how it is computed of a window, and what is made of the blended sums."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, brief, expected, require
from ..heads import head_parameters
from ..images import write_atomically
from ..network.adaptive import AdaptiveReport, Refinement
from ..upsampler import Upsampler
from .plan import ADAPTIVE_CELLS

FEATURES = ("float16", "int8")
PALETTE_SAMPLES = 4096


class Product(NamedTuple):
    """One array of the output, ``[Y, X]`` or ``[C, Y, X]``."""

    name: str
    channels: int | None
    dtype: str
    nodata: float  # where nothing was computed

    def known(self, values: np.ndarray) -> np.ndarray:  # the same shape, bool
        """Where something was computed."""
        return ~np.isnan(values) if np.isnan(self.nodata) else values != self.nodata


class Basis(NamedTuple):
    """Principal components of features, and the range in which they are shown."""

    mean: Tensor  # [D]
    components: Tensor  # [D, K]
    low: Tensor  # [K]
    high: Tensor  # [K]


@dataclass(frozen=True)
class Answers:
    """What is asked of every cell; at least one thing.

    Attributes:
        weight: of a linear head.  # [C, D]
        bias: of the head.  # [C]
        labels: the index of the head's largest blended score.
        scores: the head's blended scores.
        basis: principal components to show.
        similar: unit vectors to which the blended cosine is computed.  # [Q, D]
        features: "float16", or "int8" with a scale for each cell, or for points "float32"; None for no features.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    labels: bool = False
    scores: bool = False
    basis: Basis | None = None
    similar: Tensor | None = None
    features: str | None = None

    @property
    def classes(self) -> int:
        """Scores of the head."""
        return 0 if self.weight is None else self.weight.shape[0]

    def channels(self, dim: int) -> int:
        """Numbers that are blended in a cell, for features of this width."""
        linear = dim if self.features else len(self._linear()[0])
        return linear + (0 if self.similar is None else len(self.similar))

    def decoded(self, dim: int) -> list[int]:
        """Numbers that the network makes of a cell: features, or scores and components."""
        if not self._folds:
            return [dim]
        components = 0 if self.basis is None else self.basis.components.shape[1]
        return [n for n in (self.classes, components) if n]

    def products(self, dim: int) -> tuple[Product, ...]:
        """Arrays of the output."""
        found = []
        if self.labels:
            small = self.classes < 256
            found.append(Product("labels", None, "uint8" if small else "uint16", 255 if small else 65535))
        if self.scores:
            found.append(Product("scores", self.classes, "float32", float("nan")))
        if self.basis is not None:
            found.append(Product("pca", self.basis.components.shape[1], "uint8", 0))
        if self.similar is not None:
            found.append(Product("similar", len(self.similar), "float32", float("nan")))
        if self.features:
            found.append(Product("features", dim, self.features, 0))
        if self.features == "int8":
            found.append(Product("scale", None, "float32", 0))
        return tuple(found)

    @property
    def by_margin(self) -> bool:
        """Whether labels are all that is asked, so that a tolerance is one of the margin between scores."""
        return (
            self.labels and not (self.scores or self.features) and self.basis is None and self.similar is None
        )

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """All that determines the answers beside the model."""
        basis = [] if self.basis is None else list(self.basis._asdict().items())
        named = [("weight", self.weight), ("bias", self.bias), ("similar", self.similar), *basis]
        return [(name, tensor) for name, tensor in named if tensor is not None]

    def to(self, device: torch.device) -> Answers:
        """Move all tensors to a device."""
        moved = {n: t.to(device) for n, t in self.named_tensors() if n in ("weight", "bias", "similar")}
        if self.basis is not None:
            moved["basis"] = Basis(*(t.to(device) for t in self.basis))
        return replace(self, **moved)

    def _linear(self) -> tuple[Tensor, Tensor]:  # [C + K, D], [C + K]
        """Head and principal components as one linear layer, in float32."""
        weights, biases = [], []
        if self.weight is not None:
            weights.append(self.weight.float())
            biases.append(weights[0].new_zeros(self.classes) if self.bias is None else self.bias.float())
        if self.basis is not None:
            components = self.basis.components.float().T
            weights.append(components)
            biases.append(-(components @ self.basis.mean.float()))
        if not weights:
            device = None if self.similar is None else self.similar.device
            return (
                torch.empty(0, 1, dtype=torch.float32, device=device),
                torch.empty(0, dtype=torch.float32, device=device),
            )
        return torch.cat(weights), torch.cat(biases)

    def of_windows(
        self, model: Upsampler, images: Tensor | None, size: tuple[int, int], coords: Tensor | None
    ) -> Tensor:  # [B, h, w, channels]
        """Compute what is blended of a batch of windows.

        Args:
            model: features of windows.
            images: normalised windows; None keeps those that the model was given last.  # [B, 3, H, W]
            size: rows and columns of cells, (h, w).
            coords: (x, y) of the cells in [0, 1]; None where they tile the window.  # [B, h * w, 2]

        Returns:
            Numbers in float32 on the model's device.
        """
        head = self._linear() if self._folds else None
        if coords is None:
            out = model.dense(images, size, head=head)
        else:
            out = model(images, coords, head=head).unflatten(1, size)
        return self._blended(out.float())

    def of_windows_adaptively(
        self,
        model: Upsampler,
        images: Tensor,
        size: tuple[int, int],
        coords: Tensor,
        pitch: float,
        tolerance: float,
    ) -> tuple[Tensor, AdaptiveReport]:  # [B, h, w, channels]
        """Compute what is blended of a batch of windows where it changes, and interpolate the rest.

        Scores and components have a root mean square each, to which the tolerance is relative; so have features, and
        what is made of them. Labels alone take it relative to the margin between the two largest scores.

        Args:
            model: see :meth:`of_windows`, as the next three.
            images: normalised windows.  # [B, 3, H, W]
            size: rows and columns of cells, (h, w).
            coords: (x, y) of the cells in [0, 1].  # [B, h * w, 2]
            pitch: from one cell to the next, as a share of the window's side.
            tolerance: see :meth:`ViTUp.dense`, above 0.

        Returns:
            Numbers in float32 on the model's device, and what they have cost.
        """
        model.set_images(images)
        cache, network, coords = model.get_cache_data(), model.vit_up, coords.to(model.device)
        head = self._linear() if self._folds else None
        widths = self.decoded(network.config.dim)
        limits = {"query_chunk_size": model.query_chunk_size, "max_memory": model.max_memory}
        B, cells, dtype = len(images), size[0] * size[1], network.compute_dtype
        outputs = [torch.empty(B, cells, width, dtype=dtype, device=model.device) for width in widths]
        tokens = tuple(n * pitch * t for n, t in zip(size, cache.token_grid, strict=True))
        refinement = Refinement(size, tokens, model.device)
        queries, errors = [], []
        for i in range(B):

            def ask(part: Tensor, i: int = i) -> tuple[Tensor, ...]:
                found = network(cache[i], coords[i : i + 1, part], head=head, **limits)[0]
                return found.split(widths, dim=-1)

            layers = [output[i] for output in outputs]
            asked, error = refinement.fill(layers, ask, tolerance, self.by_margin, ADAPTIVE_CELLS)
            queries.append(asked)
            errors.append(error)
        out = torch.cat([output.float() for output in outputs], dim=-1) if len(outputs) > 1 else outputs[0]
        report = AdaptiveReport(cells, tuple(queries), tuple(torch.stack(errors).tolist()))
        return self._blended(out.float().unflatten(1, size)), report

    @property
    def _folds(self) -> bool:
        """Whether all that is asked is linear, so that features are never made."""
        return not self.features and self.similar is None

    def _blended(self, out: Tensor) -> Tensor:  # [B, h, w, channels]
        """Make what is blended of features or, if all is linear, of what the network has made of them."""
        if self._folds:
            return out
        parts = [out]
        if not self.features:
            weight, bias = self._linear()
            parts = [out @ weight.T + bias] if len(weight) else []
        if self.similar is not None:
            unit = out / out.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            parts.append(unit @ self.similar.T)
        return torch.cat(parts, dim=-1)

    def finish(self, sums: Tensor, norm: Tensor, valid: np.ndarray) -> dict[str, np.ndarray]:
        """Make the products of a block.

        Args:
            sums: weighted sums, overwritten.  # [h, w, channels]
            norm: sums of the weights.  # [h, w]
            valid: cells to answer.  # [h, w]

        Returns:
            Arrays by the names of :meth:`products`, ``[h, w]`` or ``[C, h, w]``.

        Raises:
            InputError: blended numbers that are not finite, or features beyond float16.
        """
        known = torch.from_numpy(valid).to(norm.device)
        known &= norm > 0
        blended = sums.div_(norm.clamp_min(1e-30).unsqueeze(-1))
        blended.masked_fill_(~known.unsqueeze(-1), 0)
        if not blended.isfinite().all():
            raise expected(
                "features", "finite numbers", "NaN or infinity", "float16 overflows: try bfloat16."
            )
        dim = blended.shape[-1] - (0 if self.similar is None else len(self.similar))
        linear, cosines = blended[..., :dim], blended[..., dim:]
        found: dict[str, Tensor] = {}
        if self.features:
            found |= self._features(linear)
            weight, bias = self._linear()
            linear = linear @ weight.T + bias if len(weight) else linear[..., :0]
        scores, projected = linear[..., : self.classes], linear[..., self.classes :]
        if self.labels:
            # Integers beyond 8 bits become uint16 in NumPy: few of PyTorch's operations know them.
            found["labels"] = scores.argmax(dim=-1).masked_fill_(~known, 255 if self.classes < 256 else 65535)
        if self.scores:
            found["scores"] = scores.masked_fill(~known.unsqueeze(-1), float("nan"))
        if self.basis is not None:
            share = (projected - self.basis.low) / (self.basis.high - self.basis.low)
            shown = (share.clamp(0, 1) * 254).round() + 1
            found["pca"] = shown.masked_fill_(~known.unsqueeze(-1), 0)
        if self.similar is not None:
            found["similar"] = cosines.masked_fill(~known.unsqueeze(-1), float("nan"))
        return {p.name: self._array(found[p.name], p) for p in self.products(dim)}

    @staticmethod
    def _array(values: Tensor, product: Product) -> np.ndarray:
        """Bring values into a product's dtype and order of axes."""
        if product.channels is not None:
            values = values.permute(2, 0, 1)
        return np.ascontiguousarray(values.cpu().numpy().astype(product.dtype, copy=False))

    def _features(self, features: Tensor) -> dict[str, Tensor]:
        """Round features to float16, or to 8 bits with one scale a cell; or leave them in float32."""
        if self.features == "float32":
            return {"features": features}
        largest = features.abs().amax(dim=-1)
        if self.features == "int8":
            scale = largest / 127
            return {
                "features": (features / scale.clamp_min(1e-30).unsqueeze(-1)).round(),
                "scale": scale,
            }
        if largest.numel() and largest.max() > torch.finfo(torch.float16).max:
            raise expected("--features", "numbers that float16 holds", f"{largest.max():g}", "Choose int8.")
        return {"features": features.half()}


def read_head(path: str | os.PathLike[str], dim: int) -> tuple[Tensor, Tensor | None]:
    """Read a linear head: ``weight`` [C, D] and, if there is one, ``bias`` [C] of a safetensors or npz file.

    Raises:
        InputError: missing, broken, without a weight, or of another width than the features'.
    """
    tensors = _read_tensors(Path(path))
    if "weight" not in tensors:
        raise expected(brief(path, 500), "a tensor named weight", ", ".join(tensors) or "none")
    try:
        weight, bias = head_parameters((tensors["weight"], tensors.get("bias")), dim)
    except InputError as error:
        raise InputError(f"{brief(path, 500)}: {error}") from error
    return weight.float(), None if bias is None else bias.float()


def read_vectors(path: str | os.PathLike[str], dim: int) -> Tensor:  # [Q, D]
    """Read vectors of features, ``[D]`` or ``[Q, D]``, the only array of a npy, npz or safetensors file.

    Raises:
        InputError: missing, broken, of another width than the features', or a vector without a direction.
    """
    tensors = _read_tensors(Path(path))
    if len(tensors) != 1:
        raise expected(brief(path, 500), "one array", ", ".join(tensors) or "none")
    return unit_vectors(brief(path, 500), *tensors.values(), dim)


def unit_vectors(name: str, vectors: Tensor, dim: int) -> Tensor:  # [Q, D]
    """Check vectors ``[D]`` or ``[Q, D]``, and give them length one.

    Raises:
        InputError: another width than the features', or a vector without a direction.
    """
    vectors = torch.atleast_2d(vectors.float())
    if vectors.dim() != 2 or vectors.shape[1] != dim or not len(vectors):
        raise expected(name, f"vectors of shape (Q, {dim})", tuple(vectors.shape))
    norms = vectors.norm(dim=1, keepdim=True)
    if not (norms.isfinite() & (norms > 0)).all():
        raise expected(name, "finite vectors other than zero", "zero, NaN or infinity")
    return vectors / norms


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all arrays of a file."""
    try:
        if path.suffix == ".safetensors":
            return require("safetensors.torch", "timm", "reading safetensors").load_file(path)
        loaded = np.load(path, allow_pickle=False)
        arrays = {"array": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except ImportError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{brief(path, 500)}: cannot be read ({brief(reason, 300)}).") from error


def fit_basis(features: Tensor, count: int) -> Basis:
    """Find principal components of features, and the range that all but two percent of them lie in.

    Args:
        features: a sample.  # [N, D]
        count: number of components K.

    Raises:
        InputError: fewer features than components, or some that are not finite.
    """
    sample = features.to("cpu", torch.float64)
    if not sample.isfinite().all():
        raise expected("features", "finite numbers", "NaN or infinity", "float16 overflows: try bfloat16.")
    if not 1 <= count <= min(sample.shape):
        raise expected("--pca", f"from 1 to {min(sample.shape)} components", count)
    mean = sample.mean(0)
    _, _, rows = torch.linalg.svd(sample - mean, full_matrices=False)
    components = rows[:count].T
    # The sign of a component is arbitrary; fix it so that pictures are reproducible.
    components = components * torch.where(components.sum(0) < 0, -1.0, 1.0)
    projected = (sample - mean) @ components
    low, high = torch.quantile(projected, projected.new_tensor((0.01, 0.99)), dim=0)
    high = torch.maximum(high, low + 1e-12)
    return Basis(*(t.float().contiguous() for t in (mean, components, low, high)))


def save_basis(path: Path, basis: Basis) -> None:
    """Write a basis as safetensors."""
    save = require("safetensors.torch", "timm", "writing safetensors").save_file
    write_atomically(path, lambda temporary: save(basis._asdict(), temporary))


def read_basis(path: str | os.PathLike[str], dim: int) -> Basis:
    """Read a basis that :func:`save_basis` wrote.

    Raises:
        InputError: missing, broken, or of another width than the features'.
    """
    tensors = _read_tensors(Path(path))
    if set(tensors) != set(Basis._fields):
        raise expected(brief(path, 500), f"tensors {', '.join(Basis._fields)}", ", ".join(tensors) or "none")
    basis = Basis(**tensors)
    if tuple(basis.mean.shape) != (dim,) or basis.components.shape[0] != dim:
        raise expected(brief(path, 500), f"components of width {dim}", tuple(basis.components.shape))
    return basis
