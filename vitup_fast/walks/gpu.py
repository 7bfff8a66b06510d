"""How chunks of queries walk through the network on a GPU: kernels that hand row moments on, in memory that is reused.

Each kernel writes the moments of its rows, so that the LayerNorm that follows costs no pass of its own, and everything
between sampling and decoding lies in one workspace. From its second chunk on, a chunk of a given size replays a CUDA
graph: its launches then cost the CPU nothing, which is what a small set of queries spends its time on.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import FilmTable
from ..ops.coordinates import position_dtype

if TYPE_CHECKING:
    from ..kernels.triton.film_mlp import FoldedPosition
    from ..kernels.triton.linear import Folded
    from ..kernels.triton.residual_mlp import FoldedMLP
    from ..network.model import BlockWeights, DecoderWeights, ImageCache

# Memory of the graphs that a network keeps per thread, device and stream.
SESSION_BYTES = 128 << 20


class FoldedBlock(NamedTuple):
    """Parameters of one block as the kernels take them, LayerNorms folded into the products behind them."""

    transition: FoldedMLP
    query: Folded
    out: Folded
    position: FoldedPosition
    film: FoldedMLP
    film_norm: tuple[Tensor, Tensor]
    mlp: FoldedMLP


def fold_block(block: BlockWeights, head_dim: int) -> FoldedBlock:
    """Fold the parameters of one block."""
    from ..kernels.triton.film_mlp import fold_position
    from ..kernels.triton.linear import fold
    from ..kernels.triton.residual_mlp import fold_mlp
    from ..kernels.triton.rope_cross_attention import fold_query

    attention = block.attention
    return FoldedBlock(
        fold_mlp(*block.transition),
        fold_query(*attention[:4], head_dim),
        fold(attention.out_weight, attention.out_bias),
        fold_position(*block.position),
        fold_mlp(*block.film.mlp),
        (block.film.out_norm_weight.contiguous(), block.film.out_norm_bias.contiguous()),
        fold_mlp(*block.mlp),
    )


def fold_decoder(decoder: DecoderWeights) -> Folded:
    """Fold the parameters of one decoder."""
    from ..kernels.triton.linear import fold

    return fold(decoder.weight, decoder.bias, decoder.norm_weight, decoder.norm_bias)


class Constants(NamedTuple):
    """What does not change between chunks and images."""

    blocks: Sequence[FoldedBlock]
    inv_freq: Tensor  # [d / 4]
    freqs: Tensor  # [F]


class Image(NamedTuple):
    """What the blocks read of a group of images."""

    keys: Sequence[Tensor]  # [b, Hh, T, d] per block
    values: Sequence[Tensor]  # [b, Hh, T, d] per block
    tokens: Sequence[Tensor]  # [b, h, w, D] per block


class Table(NamedTuple):
    """``[gamma, beta]`` of the relative positions that the queries of a grid share."""

    gamma_beta: Sequence[Tensor]  # [R, 2 D] per block
    row: Tensor  # [n]
    token: Tensor  # [n]


class Source(NamedTuple):
    """Tensors of which a chunk reads views, and the images that it reads of them."""

    tensors: Sequence[Tensor]
    images: slice


class Workspace:
    """Memory for the activations of ``rows`` queries, used again by every chunk.

    Args:
        rows: queries of a chunk, of all its images together.
        dim: feature width D.
        dtype: compute type.
        device: where it lies.
    """

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        # The hidden layer is the widest; position code and [gamma, beta] in float32 pass through the same memory.
        self.dim = dim
        self.state = torch.empty(rows, dim, dtype=dtype, device=device)
        self.spare = torch.empty(rows, dim, dtype=dtype, device=device)
        self.hidden = torch.empty(rows * 4 * dim, dtype=dtype, device=device)
        moments = torch.promote_types(dtype, torch.float32)
        # Blocks of a product that writes moments have at least 32 columns.
        self.moments = torch.empty(rows * 2 * (dim // 32), dtype=moments, device=device)
        self.spare_moments = torch.empty(rows, 1, 2, dtype=moments, device=device)
        everything = (self.state, self.spare, self.hidden, self.moments, self.spare_moments)
        self.nbytes = sum(t.nbytes for t in everything)

    def position_buffers(self, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position code ``[rows, width]``, its hidden layer, and ``[gamma, beta]`` in the hidden layer's memory."""
        code = self.hidden[: rows * width].view(rows, width)
        gamma_beta = self.hidden.view(self.moments.dtype)[: rows * 2 * self.dim]
        return code, self.spare, gamma_beta


def walk_blocks(
    constants: Constants,
    image: Image,
    coords: Tensor,  # [b, n, 2]
    table: Table | None,
    workspace: Workspace,
    moments: Tensor,  # [b * n, parts, 2]
    after_block: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk the queries in ``workspace.state`` through all blocks, in place.

    Args:
        constants: folded weights and frequencies.
        image: keys, values and tokens.
        coords: where the queries are.
        table: for queries of a grid.
        workspace: memory; ``state`` holds the sampled queries.
        moments: moments of the sampled queries.
        after_block: called with the number of the block (from 1), its result ``[b * n, D]`` and the moments of that.

    Returns:
        Moments of the last state.
    """
    from ..kernels.triton.film_mlp import FilmBuffers, FilmSource, film_mlp, position_gamma_beta
    from ..kernels.triton.linear import linear
    from ..kernels.triton.residual_mlp import residual_mlp
    from ..kernels.triton.rope_cross_attention import attend

    b, n, _ = coords.shape
    rows, dim = b * n, workspace.dim
    state, spare = workspace.state[:rows], workspace.spare[:rows]
    hidden, out_moments = workspace.hidden, workspace.moments
    spare_moments = workspace.spare_moments[:rows]
    token_grid = tuple(image.tokens[0].shape[1:3])
    per_image = (b, n, dim)
    for depth, block in enumerate(constants.blocks, start=1):
        i = depth - 1
        memory = {"out": state, "out_moments": out_moments, "want_moments": True}
        _, moments = residual_mlp(state, moments, block.transition, hidden, **memory)
        attend(
            state.view(per_image),
            moments,
            block.query,
            coords,
            image.keys[i],
            image.values[i],
            constants.inv_freq,
            token_grid,
            out=spare.view(per_image),
        )
        linear(spare, block.out, residual=state, **memory)
        if table is None:
            width = block.position.first.weight.shape[1]
            code, position_hidden, gamma_beta = workspace.position_buffers(rows, width)
            buffers = FilmBuffers(code=code, position_hidden=position_hidden, gamma_beta=gamma_beta)
            _, gamma_beta = position_gamma_beta(coords, constants.freqs, token_grid, block.position, buffers)
            source = FilmSource(gamma_beta, coords, None, None)
        else:
            source = FilmSource(table.gamma_beta[i], None, table.row, table.token)
        buffers = FilmBuffers(
            modulated=spare,
            modulated_moments=spare_moments,
            hidden=hidden,
            local=spare,
            out=state,
            out_moments=out_moments,
        )
        _, moments = film_mlp(
            state.view(per_image),
            image.tokens[i],
            source,
            block.film,
            block.film_norm,
            buffers,
            want_moments=True,
        )
        _, moments = residual_mlp(state, moments, block.mlp, hidden, **memory)
        if after_block is not None:
            after_block(depth, state, moments)
    return moments


def record(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the launches of ``run``, which has run before, as a CUDA graph; return what replays it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        # Other threads may go on allocating.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


class _Session:
    """Workspace for chunks of one size, with what their graph reads: it holds addresses, not values."""

    def __init__(
        self, rows: int, constants: Constants, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.constants, self.device = constants, device
        self.workspace = Workspace(rows, dim, dtype, device)
        self.seen = False
        self.own_per_image: list[Tensor] = []
        self.own_per_chunk: list[Tensor] = []
        self.copied: list[tuple[weakref.ref[Tensor], int]] = []
        self.copied_images: slice | None = None
        self.moments: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.workspace.nbytes + sum(t.nbytes for t in (*self.own_per_image, *self.own_per_chunk))

    def run(
        self, image: Image, coords: Tensor, table: Table | None, moments: Tensor, source: Source
    ) -> Tensor:
        """Walk a chunk: launched one by one the first two times, the second time also recorded, then replayed."""
        if not self.seen:
            self.seen = True
            return walk_blocks(self.constants, image, coords, table, self.workspace, moments)
        per_image = [*image.keys, *image.values, *image.tokens, *(() if table is None else table.gamma_beta)]
        per_chunk = [coords, *(() if table is None else (table.row, table.token))]
        if self.replay is None:
            self.own_per_image, self.own_per_chunk = (
                [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
                for tensors in (per_image, per_chunk)
            )
        if not self._holds(source):
            torch._foreach_copy_(self.own_per_image, per_image)
            self.copied = [(weakref.ref(t), version(t)) for t in source.tensors]
            self.copied_images = source.images
        torch._foreach_copy_(self.own_per_chunk, per_chunk)
        if self.replay is None:
            blocks = len(image.keys)
            keys, values, tokens, tables = (
                self.own_per_image[i * blocks : (i + 1) * blocks] for i in range(4)
            )
            own_coords, *indices = self.own_per_chunk
            own_table = Table(tables, *indices) if indices else None

            def run() -> None:
                own_image = Image(keys, values, tokens)
                self.moments = walk_blocks(
                    self.constants, own_image, own_coords, own_table, self.workspace, moments
                )

            # Launched with the very addresses of the graph, so that nothing is left to compile while recording.
            run()
            self.replay = record(run, self.device)
        else:
            self.replay()
        return self.moments

    def _holds(self, source: Source) -> bool:
        """Whether the images and tables of the last chunk come again, unchanged."""
        if self.copied_images != source.images or len(self.copied) != len(source.tensors):
            return False
        return all(
            ref() is t and written == version(t)
            for (ref, written), t in zip(self.copied, source.tensors, strict=True)
        )


def version(t: Tensor) -> int:
    """Number of writes to a tensor, as far as PyTorch counts them."""
    return 0 if t.is_inference() else t._version


class Scheduler:
    """Walks chunks of queries of one network; holds its folded weights and its graphs.

    Safe for several threads, streams and GPUs: each has graphs and workspaces of its own.

    Args:
        constants: folded weights.
        decoders: the decoder of every depth.
        state: of the parameters that they were folded from.
        samples: a few numbers of these parameters.
        dim: feature width D.
        dtype: compute type.
    """

    def __init__(
        self,
        constants: Constants,
        decoders: Sequence[Folded],
        state: tuple[object, ...],
        samples: Tensor,
        dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.constants, self.decoders, self.dim, self.dtype = constants, decoders, dim, dtype
        self.state, self.samples = state, samples
        self._sessions: OrderedDict[tuple[object, ...], _Session] = OrderedDict()
        self._lock = threading.Lock()

    def session(self, rows: int, shape: tuple[object, ...], device: torch.device) -> _Session:
        """The session of this thread and stream for chunks of a size and shape; those used least make room."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        owner = (threading.get_ident(), device, stream)
        key = (*owner, rows, *shape)
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is None:
                session = _Session(rows, self.constants, self.dim, self.dtype, device)
            own = [k for k in self._sessions if k[:3] == owner]
            while own and session.nbytes + sum(self._sessions[k].nbytes for k in own) > SESSION_BYTES:
                del self._sessions[own.pop(0)]
            self._sessions[key] = session
        return session

    def fold_decoder(self, decoder: DecoderWeights) -> Folded:
        """Fold the parameters of a decoder."""
        return fold_decoder(decoder)

    def walk(
        self,
        cache: ImageCache,
        coords: Tensor,  # [b, n, 2]
        tables: Sequence[FilmTable | None],
        decoders: Mapping[int, Folded],
        outputs: Mapping[int, Tensor],  # [b, n, E] or [b, n] each, contiguous
        memory: Workspace | _Session,
        source: Source,
    ) -> None:
        """Walk one chunk of queries and decode it into ``outputs``.

        Args:
            cache: the images of the chunk, in the compute type.
            coords: where the queries are.
            tables: per block, for queries of a grid.
            decoders: decoders of the depths asked for; with a session at most the first and the last.
            outputs: per depth, where scores go, or labels: an integer dtype asks for the argmax.
            memory: a workspace for launches one by one, or the session of this chunk's size.
            source: what cache and tables are views of, by which a session knows them again.
        """
        from ..kernels.triton.bilinear_sample import sample
        from ..kernels.triton.linear import linear, linear_argmax

        b, n, _ = coords.shape
        rows, coords = b * n, coords.to(position_dtype(coords, cache.patch_grid)).contiguous()
        image = Image(cache.keys, cache.values, cache.tokens)
        table = None
        if tables[0] is not None:
            table = Table([t.gamma_beta for t in tables], tables[0].row, tables[0].token)
        workspace = memory.workspace if isinstance(memory, _Session) else memory

        def decode(depth: int, state: Tensor, moments: Tensor) -> None:
            if depth not in decoders:
                return
            output = outputs[depth]
            if output.dtype.is_floating_point:
                linear(state, decoders[depth], moments, out=output)
            else:
                linear_argmax(state, decoders[depth], moments, output.view(-1))

        state = workspace.state[:rows]
        moments = workspace.moments[: 2 * rows].view(rows, 1, 2)
        sample(cache.patch_grid, coords, out=state.view(b, n, self.dim), moments=moments)
        decode(0, state, moments)
        if isinstance(memory, _Session):
            decode(len(self.constants.blocks), state, memory.run(image, coords, table, moments, source))
        else:
            walk_blocks(self.constants, image, coords, table, workspace, moments, decode)


def wants_graph(device: torch.device, depths: Iterable[int], last: int) -> bool:
    """Whether chunks may replay graphs: on a GPU that nobody captures, decoding the first and last depth alone."""
    if not set(depths) <= {0, last} or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Of each network, by implementation, operations with compiled CUDA kernels, and compute type.
Schedulers = weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, tuple[str, ...], torch.dtype], Scheduler]]
SCHEDULERS: Schedulers = weakref.WeakKeyDictionary()
