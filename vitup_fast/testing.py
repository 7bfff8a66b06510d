"""Checks of an implementation against float64: random inputs for every operation, and an error budget.

An implementation is as good as its error against the float64 definition, which at equal compute type must not
exceed that of plain eager PyTorch (``impl="reference"``)::

    generator = torch.Generator().manual_seed(0)
    operation = OPERATIONS["residual_mlp"]
    arguments = operation.inputs(Sizes(N=1000), generator, dtype=torch.bfloat16)
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    eager = operation.function(**arguments, impl="reference")
    assert_within_budget(operation.function(**arguments), eager, exact)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .network.config import POSITION_CODE_BANDS, ROPE_BASE, ViTUpConfig
from .network.model import ViTUp
from .ops import (
    AttentionWeights,
    FilmTable,
    FilmWeights,
    MLPWeights,
    PositionWeights,
    bilinear_sample,
    film_mlp,
    norm_linear,
    residual_mlp,
    rope_cross_attention,
)
from .ops.coordinates import rope_inv_freq
from .ops.film_mlp import film_gamma_beta

# Coordinates and frequencies have a precision of their own, whatever the compute type.
_POSITIONAL = ("coords", "freqs", "inv_freq")

Arguments = dict[str, Any]


class Sizes(NamedTuple):
    """Sizes of an operation's inputs.

    Attributes:
        B: images.
        N: queries per image.
        D: feature width.
        heads: attention heads; ``D / heads`` is a multiple of 4.
        token_grid: rows and columns of the tokens, (h, w).
        patch_grid: rows and columns of the fine patch grid, (P, Q).
        expansion: hidden width of an MLP in units of D, and output width of ``norm_linear``.
    """

    B: int = 2
    N: int = 37
    D: int = 32
    heads: int = 2
    token_grid: tuple[int, int] = (5, 7)
    patch_grid: tuple[int, int] = (9, 12)
    expansion: int = 2


class _Random:
    """Random tensors of realistic scale, drawn in float32 on the CPU so that every device gets the same."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator, self.dtype, self.device = generator, dtype, device

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return draw(shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = self._drawn(torch.randn, shape) * std + mean
        return values.to(self.device, self.dtype)

    def integers(self, high: int, count: int) -> Tensor:
        values = torch.randint(high, (count,), generator=self.generator, dtype=torch.int64, device="cpu")
        return values.to(self.device)

    def coords(self, B: int, N: int) -> Tensor:
        """Coordinates ``[B, N, 2]`` over the image and a little beyond it, float32 or better."""
        values = self._drawn(torch.rand, (B, N, 2)) * 1.1 - 0.05
        return values.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def norm(self, D: int) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[D]`` of a LayerNorm."""
        return self.normal(D, std=0.2, mean=1.0), self.normal(D, std=0.2)

    def linear(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        """Matrix ``[out, width]`` and bias ``[out]`` that keep the scale of their input."""
        return self.normal(out, width, std=width**-0.5), self.normal(out, std=0.2)

    def mlp(self, D: int, hidden: int) -> MLPWeights:
        return MLPWeights(*self.norm(D), *self.linear(hidden, D), *self.linear(D, hidden))


def bilinear_sample_inputs(
    sizes: Sizes,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Draw arguments of :func:`bilinear_sample`: grid ``[B, P, Q, D]`` and coords ``[B, N, 2]``."""
    random = _Random(generator, dtype, device)
    return {
        "grid": random.normal(sizes.B, *sizes.patch_grid, sizes.D),
        "coords": random.coords(sizes.B, sizes.N),
    }


def residual_mlp_inputs(
    sizes: Sizes,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Draw arguments of :func:`residual_mlp`: x ``[B, N, D]`` and weights."""
    random = _Random(generator, dtype, device)
    return {
        "x": random.normal(sizes.B, sizes.N, sizes.D),
        "weights": random.mlp(sizes.D, sizes.expansion * sizes.D),
    }


def rope_cross_attention_inputs(
    sizes: Sizes,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Draw arguments of :func:`rope_cross_attention`: x ``[B, N, D]``, key, value ``[B, Hh, h * w, d]``."""
    random = _Random(generator, dtype, device)
    B, N, D, heads = sizes.B, sizes.N, sizes.D, sizes.heads
    tokens = sizes.token_grid[0] * sizes.token_grid[1]
    norm, query, out = random.norm(D), random.linear(D, D), random.linear(D, D)
    return {
        "x": random.normal(B, N, D),
        "coords": random.coords(B, N),
        "key": random.normal(B, heads, tokens, D // heads),
        "value": random.normal(B, heads, tokens, D // heads),
        "weights": AttentionWeights(*norm, *query, *out),
        "inv_freq": rope_inv_freq(D // heads, ROPE_BASE).to(device),
        "token_grid": sizes.token_grid,
    }


def film_mlp_inputs(
    sizes: Sizes,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Draw arguments of :func:`film_mlp` without a table: x ``[B, N, D]``, tokens ``[B, h, w, D]``."""
    random = _Random(generator, dtype, device)
    B, N, D = sizes.B, sizes.N, sizes.D
    freqs = torch.logspace(0.0, 1.0, POSITION_CODE_BANDS, dtype=torch.float32, device=device)
    position = random.linear(D, 2 + 4 * POSITION_CODE_BANDS) + random.linear(2 * D, D)
    return {
        "x": random.normal(B, N, D),
        "coords": random.coords(B, N),
        "tokens": random.normal(B, *sizes.token_grid, D),
        "freqs": freqs,
        "position": PositionWeights(*position),
        "weights": FilmWeights(random.mlp(D, sizes.expansion * D), *random.norm(D)),
    }


def film_table_inputs(
    sizes: Sizes,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Draw arguments of :func:`film_mlp` with a table, and the coordinates that the table stands for.

    Queries lie at 16 places of random tokens. Where h and w are powers of two, float32 holds their
    coordinates exactly: then the operation means the same with and without the table.
    """
    arguments = film_mlp_inputs(sizes, generator, dtype=dtype, device=device)
    random = _Random(generator, dtype, device)
    wide = torch.promote_types(dtype, torch.float32)
    h, w = sizes.token_grid
    steps = (torch.arange(4, dtype=wide, device=device) - 1.5) / 4
    relative = torch.cartesian_prod(steps, steps)  # [16, 2]
    row, token = random.integers(16, sizes.N), random.integers(h * w, sizes.N)
    centre = torch.stack((token % w, token // w), dim=-1).to(wide) + 0.5  # [N, 2]
    coords = (centre + relative[row]) / torch.tensor((w, h), dtype=wide, device=device)
    position = PositionWeights(*(t.to(wide) for t in arguments["position"]))
    table = FilmTable(film_gamma_beta(relative, arguments["freqs"], position), row, token)
    return {**arguments, "coords": coords.expand(sizes.B, -1, -1).contiguous(), "table": table}


def norm_linear_inputs(
    sizes: Sizes,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arguments:
    """Draw arguments of :func:`norm_linear`: x ``[B, N, D]`` and the weights of norm and linear layer."""
    random = _Random(generator, dtype, device)
    norm_weight, norm_bias = random.norm(sizes.D)
    weight, bias = random.linear(sizes.expansion * sizes.D, sizes.D)
    x = random.normal(sizes.B, sizes.N, sizes.D)
    return {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}


class Operation(NamedTuple):
    """An operation and the factory of its inputs.

    Attributes:
        function: takes the arguments that ``inputs`` returns, and ``impl``.
        inputs: ``inputs(sizes, generator, *, dtype, device)``.
    """

    function: Callable[..., Tensor]
    inputs: Callable[..., Arguments]


OPERATIONS: dict[str, Operation] = {
    "bilinear_sample": Operation(bilinear_sample, bilinear_sample_inputs),
    "residual_mlp": Operation(residual_mlp, residual_mlp_inputs),
    "rope_cross_attention": Operation(rope_cross_attention, rope_cross_attention_inputs),
    "film_mlp": Operation(film_mlp, film_mlp_inputs),
    "film_mlp_table": Operation(film_mlp, film_table_inputs),
    "norm_linear": Operation(norm_linear, norm_linear_inputs),
}


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name every tensor in an operation's arguments, nested ones with a dot: ``"weights.norm_weight"``."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif hasattr(value, "_asdict"):
            found.update({f"{name}.{field}": t for field, t in tensors_of(value._asdict()).items()})
    return found


def with_tensors(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Arguments:
    """Return the arguments with some tensors replaced, named as by :func:`tensors_of`."""
    replaced: Arguments = {}
    for name, value in arguments.items():
        if hasattr(value, "_asdict"):
            prefix = name + "."
            inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            replaced[name] = type(value)(**with_tensors(value._asdict(), inner))
        else:
            replaced[name] = tensors.get(name, value)
    return replaced


def differentiable_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name the tensors that gradients may be asked for: with a table, not those that it replaces."""
    constant = ("freqs", "inv_freq", *(("coords", "position") if "table" in arguments else ()))
    return {
        name: t
        for name, t in tensors_of(arguments).items()
        if t.is_floating_point() and name.split(".")[0] not in constant
    }


def cast(arguments: Mapping[str, Any], dtype: torch.dtype) -> Arguments:
    """Cast features and weights; a table keeps float32 or better, coordinates and frequencies their dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        name: t.to(wide if name.startswith("table.") else dtype)
        for name, t in tensors_of(arguments).items()
        if t.is_floating_point() and name not in _POSITIONAL
    }
    return with_tensors(arguments, tensors)


def random_network(
    config: ViTUpConfig,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ViTUp:
    """Create a network with every part active: also the modulation, which training starts at zero."""
    network = ViTUp(config)
    random = _Random(generator, torch.float32, "cpu")
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                weight, bias = random.norm(module.weight.shape[0])
            elif isinstance(module, nn.Linear):
                weight, bias = random.linear(*module.weight.shape)
            else:
                continue
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return network.to(device, dtype)


def random_image(
    config: ViTUpConfig,
    generator: torch.Generator,
    *,
    batch: int = 1,
    token_grid: tuple[int, int] = (28, 28),
    patch_grid: tuple[int, int] = (224, 224),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], Tensor]:
    """Draw hidden states, L times ``[B, h, w, D]``, and a fine patch grid ``[B, P, Q, D]``."""
    random = _Random(generator, dtype, device)
    hidden_states = [random.normal(batch, *token_grid, config.dim) for _ in range(config.num_layers)]
    return hidden_states, random.normal(batch, *patch_grid, config.dim)


def random_coords(
    generator: torch.Generator, batch: int, count: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw float32 coordinates ``[B, N, 2]`` over the image and a little beyond it."""
    return _Random(generator, torch.float32, device).coords(batch, count)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of ``actual - exact`` over that of ``exact``, over the whole tensor, in float64."""
    exact = exact.detach().double()
    difference = actual.detach().to(exact.device).double() - exact
    norm = torch.linalg.vector_norm(exact)
    return (torch.linalg.vector_norm(difference) / norm.clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 1.0, name: str = "output"
) -> None:
    """Assert that a result's error is at most ``factor`` times that of eager PyTorch.

    The budget is at least the error of the exact result rounded to the dtype of ``actual`` (half a unit
    per element): where eager PyTorch happens to be exact, a correctly rounded result still passes.

    Args:
        actual: the result to judge.
        eager: the result of plain PyTorch (``impl="reference"``) in the same dtype, from the same inputs.
        exact: the float64 result from the same inputs, widened.
        factor: how many times eager's error is allowed; 1.0 is the aim, 1.5 the limit.
        name: what the message calls the result.

    Raises:
        AssertionError: the error is larger or not a number, or shape or dtype differ; holds all numbers.
    """
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(exact.shape)} {eager.dtype}"
        )
    error, eager_error = relative_error(actual, exact), relative_error(eager, exact)
    rounding = relative_error(exact.to(actual.dtype), exact)
    budget = factor * max(eager_error, rounding)
    if not error <= budget:
        raise AssertionError(
            f"{name}: relative error {error:.3e} exceeds the budget {budget:.3e}"
            f" = {factor} * max(eager {eager_error:.3e}, rounding {rounding:.3e}) in {actual.dtype}"
        )


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN or the largest integer, so that reads of unwritten memory show."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
