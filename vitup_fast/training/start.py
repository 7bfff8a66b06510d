"""Where training starts: a network that already interpolates the backbone's hidden states.

Nothing but the parameters of the published architecture is used. Keys and queries that do not depend on content
leave the attention a function of distance alone, made to be a narrow bell: the query reads the tokens around it
as an interpolation does. Least squares make the decoders undo the LayerNorms on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..network.backbone import Backbone
from ..network.grid import cell_centres
from ..network.model import ViTUp
from ..network.weights import collect
from ..ops import bilinear_sample, film_mlp, residual_mlp, rope_cross_attention

BELL_WIDTH = 0.42  # standard deviation in tokens: the cosine to bilinear interpolation is highest there
FAR = 12.0  # logits below the peak from where on a token no longer counts

SMALL = 0.05
RIDGE = 0.1
BELL_RIDGE = 1e-3
MOST_TOKENS = 128


@torch.no_grad()
def start_as_interpolation(
    network: ViTUp,
    backbone: Backbone,
    images: Sequence[Tensor],
    size: tuple[int, int],
    grid: tuple[int, int],
) -> None:
    """Set all parameters of a network so that it interpolates hidden states.

    Args:
        network: whose parameters are overwritten; draws from PyTorch's generator as it was made.
        backbone: gives the hidden states.
        images: normalised, to which transitions and decoders are fitted.  # [1, 3, H, W] each
        size: of the image in pixels for hidden states.
        grid: rows and columns of the fine patch grid.
    """
    dim = network.config.dim
    identity = torch.eye(dim, dtype=network.dtype, device=network.device)
    for block in network.vit_up_blocks:
        norm, first, _, second = block.transition_mlp.mlp
        _set_norm(norm)
        # gelu(x) - gelu(-x) = x: the MLP takes LN(q) away from q, which leaves nothing once it is as large.
        first.weight.copy_(torch.cat((identity, -identity)))
        second.weight.copy_(torch.cat((-identity, identity), dim=1))
        for layer in (first, second):
            layer.bias.zero_()
        attention = block.cross_attention
        _set_norm(block.norm_q_global)
        _set_norm(block.norm_h_global)
        query, key = _bell(network.rope.inv_freq)  # [d] each
        heads = network.config.num_heads
        for layer, bias in ((attention.q_proj, query), (attention.k_proj, key)):
            layer.weight.mul_(SMALL)
            layer.bias.copy_(bias.repeat(heads))
        for layer in (attention.v_proj, attention.out_proj):
            layer.weight.copy_(identity)
            layer.bias.zero_()
        # The branch of the nearest token and the last MLP begin small, and free to learn.
        block.norm_h_local.weight.fill_(SMALL)
        block.norm_h_local.bias.zero_()
        block.mlp.mlp[-1].weight.mul_(SMALL)
        block.mlp.mlp[-1].bias.zero_()
    _fit_transitions(network, backbone, images, size, grid)
    _fit_decoders(network, backbone, images, size, grid)


def _set_norm(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1)
    norm.bias.zero_()


def _bell(inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Find constant queries and keys ``[d]`` whose rotated product falls with distance like a Gaussian's exponent.

    Rotation by distance turns the pairs of channel k into ``a_k cos(2 pi f_k distance)``: a cosine series, fitted
    to the parabola near zero and to anything far below the peak elsewhere.
    """
    n = len(inv_freq)
    frequencies = inv_freq.to("cpu", torch.float64)
    distance = torch.linspace(0, MOST_TOKENS, 64 * MOST_TOKENS + 1, dtype=torch.float64, device="cpu")
    target = -(distance.square() / (2 * BELL_WIDTH**2)).clamp(max=FAR)
    basis = torch.cos(2 * torch.pi * distance[:, None] * frequencies)  # [T, n]
    basis = torch.cat(
        (basis, torch.ones_like(distance)[:, None]), dim=1
    )  # a constant drops out of the softmax
    weight = 1 + 400 * torch.exp(-distance.square() / 2)
    scaled = basis * weight[:, None].sqrt()
    ridge = BELL_RIDGE * weight.sum() * torch.eye(n + 1, dtype=torch.float64, device="cpu")
    ridge[-1, -1] = 0
    series = torch.linalg.solve(scaled.T @ scaled + ridge, scaled.T @ (target * weight.sqrt()))[:n]
    # Logits are divided by sqrt(d); x and y have n pairs each, of which the first channel alone is used.
    product = series * (4 * n) ** 0.5
    root = product.abs().sqrt()
    query, key = torch.zeros(2, 2, n, 2, dtype=torch.float64, device="cpu")
    query[..., 0], key[..., 0] = root, root * product.sign()
    return tuple(t.flatten().to(inv_freq) for t in (query, key))


def _fit_transitions(
    network: ViTUp,
    backbone: Backbone,
    images: Sequence[Tensor],
    size: tuple[int, int],
    grid: tuple[int, int],
) -> None:
    """Scale what transitions take away to the queries that come to them: patch embeddings are small, others are not."""
    weights = collect(network)
    caches = [network.prepare(backbone.hidden_states(i, size), backbone.patch_grid(i, grid)) for i in images]
    h, w = caches[0].token_grid
    coords = cell_centres((2 * h, 2 * w), torch.float32, network.device)[None]
    queries = [bilinear_sample(cache.patch_grid, coords) for cache in caches]  # [1, N, D] each
    for i, (layers, block) in enumerate(zip(network.vit_up_blocks, weights.blocks, strict=True)):
        deviation = torch.stack([q.float().std(dim=-1, correction=0).mean() for q in queries]).mean()
        layers.transition_mlp.mlp[-1].weight.mul_(deviation)
        local = weights.freqs, block.position, block.film
        for k, cache in enumerate(caches):
            query = residual_mlp(queries[k], block.transition)
            attended = cache.keys[i], cache.values[i], block.attention, weights.inv_freq, cache.token_grid
            query = film_mlp(rope_cross_attention(query, coords, *attended), coords, cache.tokens[i], *local)
            queries[k] = residual_mlp(query, block.mlp)


def _fit_decoders(
    network: ViTUp,
    backbone: Backbone,
    images: Sequence[Tensor],
    size: tuple[int, int],
    grid: tuple[int, int],
) -> None:
    """Set the decoders so that queries at token centres decode to the tokens' hidden states, by least squares."""
    depths, dim = network.config.num_layers, network.config.dim
    eye = torch.eye(dim, dtype=network.dtype, device=network.device)
    for decoder in network.decoder_mlp:
        _set_norm(decoder.mlp[0])
        decoder.mlp[1].weight.copy_(eye)
        decoder.mlp[1].bias.zero_()
    moments = [torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device="cpu") for _ in range(depths)]
    products = [torch.zeros(dim + 1, dim, dtype=torch.float64, device="cpu") for _ in range(depths)]
    for image in images:
        states = backbone.hidden_states(image, size)
        h, w = states[0].shape[1:3]
        cache = network.prepare(states, backbone.patch_grid(image, grid))
        decoded = network.dense(
            cache, (h, w), return_all_layers=True
        )  # LayerNormed queries: decoders are identities
        for depth, (query, state) in enumerate(zip(decoded, states, strict=True)):
            x = query.reshape(-1, dim).to("cpu", torch.float64)
            x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64, device="cpu")), dim=1)  # [N, D + 1]
            moments[depth] += x.T @ x
            products[depth] += x.T @ state.reshape(-1, dim).to("cpu", torch.float64)
    for decoder, moment, product in zip(network.decoder_mlp, moments, products, strict=True):
        # A multiple of the identity undoes a LayerNorm but for what it forgets; a few images shall not say more.
        prior = torch.eye(dim + 1, dim, dtype=torch.float64, device="cpu")
        prior *= product[:-1].trace() / moment[:-1, :-1].trace()
        ridge = RIDGE * moment[:-1, :-1].trace() / dim * torch.eye(dim + 1, dtype=torch.float64, device="cpu")
        ridge[-1, -1] = 0
        solution = prior + torch.linalg.solve(moment + ridge, product - moment @ prior)  # [D + 1, D]
        decoder.mlp[1].weight.copy_(solution[:-1].T)
        decoder.mlp[1].bias.copy_(solution[-1])
