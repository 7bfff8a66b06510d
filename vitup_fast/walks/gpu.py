"""The walk by fused kernels on a GPU: row moments handed on, in memory that is reused.

Each kernel writes the moments of its rows, so that the LayerNorm that follows costs no pass of its own, and everything
between sampling and decoding lies in one workspace. From its second chunk on, a chunk of a given size replays a CUDA
graph: its launches then cost the CPU nothing, which is what a small set of queries spends its time on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError
from ..kernels.cuda import aligned, compiled_kernels
from ..network.image_cache import ImageCache
from ..network.weights import BlockWeights, DecoderWeights, NetworkWeights, Snapshot
from ..ops.coordinates import position_dtype, rope_angles, rotate_complex, token_centres
from ..ops.implementations import GPU_NAMES, compiled_operations
from ..ops.primitives import LAYER_NORM_EPS
from .operators import OperatorsWalk
from .plan import Spans
from .walk import Chunk, Decoding, Settings, Step, Walk, plain_modes

if TYPE_CHECKING:
    from ..kernels.triton.film_mlp import FoldedPosition
    from ..kernels.triton.linear import Folded
    from ..kernels.triton.residual_mlp import FoldedMLP

# Memory of the graphs that a network keeps per thread, device and stream.
GRAPH_BYTES = 128 << 20


class FoldedBlock(NamedTuple):
    """Parameters of one block as the kernels take them, LayerNorms folded into the products behind them."""

    transition: FoldedMLP
    query: Folded
    out: Folded
    position: FoldedPosition
    film: FoldedMLP
    film_norm: tuple[Tensor, Tensor]
    mlp: FoldedMLP
    image: Folded  # keys and values side by side
    token_norm: tuple[Tensor, Tensor]


def fold_block(block: BlockWeights, head_dim: int, fp8: bool = False) -> FoldedBlock:
    """Fold the parameters of one block; with ``fp8`` quantise its MLPs."""
    from ..kernels.triton.film_mlp import fold_position
    from ..kernels.triton.linear import fold
    from ..kernels.triton.residual_mlp import fold_mlp
    from ..kernels.triton.rope_cross_attention import fold_query

    attention, image = block.attention, block.image
    key_value = (
        torch.cat((image.key_weight, image.value_weight)),
        torch.cat((image.key_bias, image.value_bias)),
    )
    return FoldedBlock(
        fold_mlp(*block.transition, fp8=fp8),
        fold_query(*attention[:4], head_dim),
        fold(attention.out_weight, attention.out_bias),
        fold_position(*block.position),
        fold_mlp(*block.film.mlp, fp8=fp8),
        (aligned(block.film.out_norm_weight.contiguous()), aligned(block.film.out_norm_bias.contiguous())),
        fold_mlp(*block.mlp, fp8=fp8),
        fold(*key_value, image.norm_weight, image.norm_bias),
        (image.token_norm_weight, image.token_norm_bias),
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
    """``[gamma, beta]`` of the relative positions that the queries of a grid share, or these positions."""

    gamma_beta: Sequence[Tensor]  # [R, 2 D] per block; none if they are to be computed
    row: Tensor  # [n]
    token: Tensor  # [n]
    relative: Tensor | None = None  # [R, 2] in token units


class FilmMemory(NamedTuple):
    """What FiLM MLPs work in."""

    spare: Tensor  # [rows, D]
    moments: Tensor  # [rows, 1, 2]
    hidden: Tensor  # [rows * 4 D]


class Workspace:
    """Memory for the activations of ``rows`` queries, used again by every chunk.

    Args:
        rows: queries of a chunk, of all its images together.
        dim: feature width D.
        code_width: of the padded position code.
        dtype: compute type.
        device: where it lies.
        beside: number of blocks whose FiLM MLPs have memory of their own, to run beside the other kernels.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        code_width: int,
        dtype: torch.dtype,
        device: torch.device,
        beside: int = 0,
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.dim = dim
        self.state, self.spare = empty(rows, dim), empty(rows, dim)
        self.code = empty(rows, code_width)
        # The hidden layer is the widest; [gamma, beta] in float32 passes through the same memory.
        self.hidden = empty(rows * 4 * dim)
        # Blocks of a product that writes moments have at least 32 columns.
        self.moments = empty(rows * 2 * (dim // 32), dtype=wide)
        self.film = FilmMemory(
            empty(rows, dim) if beside else self.spare,
            empty(rows, 1, 2, dtype=wide),
            empty(rows * 4 * dim) if beside else self.hidden,
        )
        self.locals = empty(beside, rows, dim).unbind()
        everything = {self.state, self.spare, self.code, self.hidden, self.moments, *self.film, *self.locals}
        self.nbytes = sum(t.nbytes for t in everything)


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
    from ..kernels.triton.common import beside
    from ..kernels.triton.film_mlp import (
        FilmBuffers,
        Modulation,
        film_mlp,
        local_rows,
        position_code,
        position_gamma_beta,
    )
    from ..kernels.triton.linear import add_layer_norm, linear
    from ..kernels.triton.residual_mlp import residual_mlp
    from ..kernels.triton.rope_cross_attention import attend

    b, n, _ = coords.shape
    rows, dim = b * n, workspace.dim
    state, spare = workspace.state[:rows], workspace.spare[:rows]
    hidden, out_moments = workspace.hidden, workspace.moments
    token_grid = tuple(image.tokens[0].shape[1:3])
    per_image = (b, n, dim)
    film = FilmMemory(workspace.film.spare[:rows], workspace.film.moments[:rows], workspace.film.hidden)
    buffers = FilmBuffers(modulated=film.spare, modulated_moments=film.moments, hidden=film.hidden)
    code = None
    if table is None or table.relative is not None:
        # A relative position lies in the one cell of a grid of one token.
        where, cells = (coords, token_grid) if table is None else (table.relative[None] + 0.5, (1, 1))
        weight = constants.blocks[0].position.first.weight
        code = position_code(where, constants.freqs, cells, weight.shape[1], weight, workspace.code)

    def modulation(i: int) -> Modulation:
        if code is None:
            gamma_beta = table.gamma_beta[i]
        else:
            out = film.hidden.view(out_moments.dtype)[: len(code) * 2 * dim]
            gamma_beta = position_gamma_beta(code, constants.blocks[i].position, film.spare, out)
        if table is None:
            return Modulation(gamma_beta, coords, None, None)
        return Modulation(gamma_beta, None, table.row, table.token)

    done = []
    if workspace.locals:
        with beside(), second_stream(state.device) as mark:
            for i, block in enumerate(constants.blocks):
                memory = buffers._replace(local=workspace.locals[i][:rows])
                local_rows(state.view(per_image), image.tokens[i], modulation(i), block.film, memory)
                done.append(mark())
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
        linear(spare, block.out, residual=state, out=state)
        if workspace.locals:
            done[i]()
            local = workspace.locals[i][:rows]
            _, moments = add_layer_norm(
                local, block.film_norm, state, state.dtype, True, out=state, out_moments=out_moments
            )
        else:
            _, moments = film_mlp(
                state.view(per_image),
                image.tokens[i],
                modulation(i),
                block.film,
                block.film_norm,
                buffers._replace(local=film.spare, out=state, out_moments=out_moments),
                want_moments=True,
            )
        _, moments = residual_mlp(state, moments, block.mlp, hidden, **memory)
        if after_block is not None:
            after_block(depth, state, moments)
    return moments


_own_streams: dict[tuple[int, torch.device, int], torch.cuda.Stream] = {}
_capturing = threading.Lock()


def own_stream(device: torch.device, number: int = 0) -> torch.cuda.Stream:
    """A stream of a GPU that this thread alone uses: one of PyTorch's, which go round, could carry another's work.

    Args:
        device: the GPU.
        number: which of the thread's streams there.

    Raises:
        KernelError: the driver makes none.
    """
    key = threading.get_ident(), device, number
    stream = _own_streams.get(key)
    if stream is None:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        handle, not_blocking = ctypes.c_void_p(), 1
        with torch.cuda.device(device):
            torch.cuda.init()
            code = driver.cuStreamCreate(ctypes.byref(handle), not_blocking)
        if code:
            raise KernelError(f"the CUDA driver made no stream on {device}: error {code} of cuStreamCreate")
        stream = _own_streams[key] = torch.cuda.ExternalStream(handle.value, device=device)
    return stream


@contextlib.contextmanager
def second_stream(device: torch.device) -> Iterator[Callable[[], Callable[[], None]]]:
    """Launch on a second stream while a graph is recorded, else on the same one.

    Yields:
        What marks how far the launches have come, and returns what makes the first stream wait for that.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield lambda: lambda: None
        return
    first, second = torch.cuda.current_stream(device), own_stream(device, 1)

    def mark() -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(second)
        return lambda: first.wait_event(event)

    second.wait_stream(first)
    with torch.cuda.stream(second):
        yield mark


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect no garbage: what a collection frees may not be freed while launches are recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def record(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Record the launches of ``run``, which has run before, as a CUDA graph; return what replays it."""
    graph, stream = torch.cuda.CUDAGraph(), own_stream(device)
    own_stream(device, 1)  # made now, for while launches are recorded nothing should be
    stream.wait_stream(torch.cuda.current_stream(device))
    with _capturing, without_garbage_collection(), torch.cuda.device(device), torch.cuda.stream(stream):
        # Other threads may go on allocating.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # it would only say that the recording is void
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


class GraphedChunk:
    """Workspace for chunks of one size, with what their graph reads: it holds addresses, not values."""

    def __init__(self, workspace: Workspace, constants: Constants) -> None:
        self.constants, self.workspace, self.device = constants, workspace, workspace.state.device
        self.seen = False
        self.own_per_image: list[Tensor] = []
        self.own_per_chunk: list[Tensor] = []
        self.copied: Snapshot | None = None
        self.copied_images: slice | None = None
        self.moments: Tensor | None = None
        self.replay: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.workspace.nbytes + sum(t.nbytes for t in (*self.own_per_image, *self.own_per_chunk))

    def run(
        self,
        image: Image,
        coords: Tensor,
        table: Table | None,
        moments: Tensor,
        sources: Sequence[Tensor],
        images: slice,
    ) -> Tensor:
        """Walk a chunk: launched one by one the first two times, the second time also recorded, then replayed.

        Args:
            image: keys, values and tokens of the chunk's images.
            coords: where the queries are.
            table: for queries of a grid.
            moments: moments of the sampled queries.
            sources: the tensors of which ``image`` and ``table`` are views, by which they are known again.
            images: which images of those.

        Returns:
            Moments of the last state.
        """
        if not self.seen:
            self.seen = True
            return walk_blocks(self.constants, image, coords, table, self.workspace, moments)
        per_image = [*image.keys, *image.values, *image.tokens, *(() if table is None else table.gamma_beta)]
        per_chunk = [coords, *(() if table is None else table[1:])]
        per_chunk = [t for t in per_chunk if t is not None]
        if self.replay is None:
            self.own_per_image, self.own_per_chunk = (
                [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
                for tensors in (per_image, per_chunk)
            )
        if self.copied is None or self.copied_images != images or not self.copied.holds(sources):
            torch._foreach_copy_(self.own_per_image, per_image)
            # Writes to inference tensors are not counted, and to compare values would cost more than to copy them.
            countable = not any(t.is_inference() for t in sources)
            self.copied, self.copied_images = (Snapshot(sources) if countable else None), images
        torch._foreach_copy_(self.own_per_chunk, per_chunk)
        if self.replay is None:
            blocks = len(image.keys)
            keys, values, tokens, tables = (
                self.own_per_image[i * blocks : (i + 1) * blocks] for i in range(4)
            )
            own_coords, *indices = self.own_per_chunk
            own_table = (
                Table(tables, *indices) if indices else None
            )  # row, token and perhaps relative positions

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


class GpuWalk(Walk):
    """Folded weights and recorded graphs; safe for several threads, streams and GPUs: each has graphs of its own."""

    remembered = True
    makes_tables = True

    @classmethod
    def takes(cls, settings: Settings) -> bool:
        """See :meth:`Walk.takes`."""
        return settings.in_place and settings.implementation in GPU_NAMES

    @classmethod
    def query_bytes(cls, dim: int, dtype: torch.dtype) -> int:
        """See :meth:`Walk.query_bytes`."""
        return OperatorsWalk.query_bytes(dim, dtype)

    def __init__(self, weights: NetworkWeights, settings: Settings) -> None:
        self.settings, self.dtype = settings, settings.dtype
        self.dim = weights.decoders[0].weight.shape[1]
        self.device, self.fp8 = weights.freqs.device, settings.implementation == "cuda_fp8"
        with plain_modes(self.device):
            self.weights = weights.map(torch.Tensor.detach)
            weights = weights.map(lambda t: t.detach().to(self.dtype))
            blocks = [fold_block(block, self.dim // settings.heads, self.fp8) for block in weights.blocks]
            self.constants = Constants(blocks, weights.inv_freq, weights.freqs)
            self.decoders = [fold_decoder(decoder) for decoder in weights.decoders]
        self._graphed: OrderedDict[tuple[object, ...], GraphedChunk] = OrderedDict()
        self._lock = threading.Lock()

    def project(self, hidden_states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """See :meth:`Walk.project`: all depths together wherever they share a step."""
        from ..kernels.triton.common import measure_moments
        from ..kernels.triton.linear import linear

        with plain_modes(self.device):
            B, h, w, D = hidden_states[0].shape
            hidden = torch.stack(list(hidden_states)).to(self.dtype)  # [L - 1, B, h, w, D]
            rows = hidden.view(len(hidden), -1, D)
            moments = measure_moments(rows.flatten(0, 1)).view(*rows.shape[:2], 1, 2)
            both = torch.empty(*rows.shape[:2], 2 * D, dtype=self.dtype, device=self.device)
            for row, moment, block, out in zip(rows, moments, self.constants.blocks, both, strict=True):
                linear(row, block.image, moment, out=out)
            shape = (len(hidden), B, h * w, 2, self.settings.heads, D // self.settings.heads)
            key, value = both.view(shape).unbind(3)  # [L - 1, B, T, Hh, d] each
            wide = torch.promote_types(self.dtype, torch.float32)
            angles = rope_angles(token_centres((h, w), wide, self.device), self.constants.inv_freq)
            key = rotate_complex(key, angles.unsqueeze(1))
            keys, values = (t.transpose(2, 3).contiguous().unbind() for t in (key, value))
            tokens = [
                F.layer_norm(t, (D,), *block.token_norm, LAYER_NORM_EPS)
                for t, block in zip(hidden, self.constants.blocks, strict=True)
            ]
        return keys, values, tuple(tokens)

    def begin(
        self,
        cache: ImageCache,
        decoding: Decoding,
        spans: Spans,
        groups: Sequence[slice],
        scratch_bytes: int | None,
    ) -> Step:
        """See :meth:`Walk.begin`."""
        compiled = compiled_operations(self.settings.impl, cache.patch_grid)
        sources = (*cache.keys, *cache.values, *cache.tokens)
        rows = spans.longest * max(g.stop - g.start for g in groups)
        last = len(self.constants.blocks)
        beside = self._film_beside(rows)
        with plain_modes(self.device):
            cache = cache.to(self.dtype)
            decoders = {depth: self.decoders[depth] for depth in decoding.depths}
            if decoding.head is not None:
                head = decoding.decoders(self.weights)[last]
                decoders[last] = fold_decoder(DecoderWeights(*(t.detach().to(self.dtype) for t in head)))
            graphed, graphed_shape, workspace = None, None, None
            if scratch_bytes is not None or not wants_graph(self.device, decoding.depths, last):
                workspace = self._workspace(rows, beside and scratch_bytes is None)

        def step(chunk: Chunk, out: Sequence[Tensor]) -> Sequence[Tensor]:
            nonlocal graphed, graphed_shape, workspace
            images, (coords, tables, shared) = chunk
            tabulated = [t.gamma_beta for t in tables if t is not None]
            rows_of = [len(t) for t in tabulated[:1]] + ([] if shared is None else [-len(shared.relative)])
            shape = (coords.shape[0], coords.dtype, *cache.token_grid, *rows_of)
            with plain_modes(self.device), compiled_kernels(compiled):
                if workspace is None:
                    graphed, graphed_shape = self._graphed_chunk(rows, beside, (*shape, compiled)), shape
                    workspace = graphed.workspace
                replays = graphed is not None and shape == graphed_shape
                replays = replays and coords.shape[0] * coords.shape[1] == rows

                def run(image: Image, coords: Tensor, table: Table | None, moments: Tensor) -> Tensor:
                    return graphed.run(image, coords, table, moments, [*sources, *tabulated], images)

                outputs = dict(zip(decoders, out, strict=True))
                self._walk(cache[images], chunk, decoders, outputs, workspace, run if replays else None)
            return out

        return step

    def _film_beside(self, rows: int) -> bool:
        """Whether FiLM MLPs run beside the other kernels: few rows leave multiprocessors idle, and need little memory.

        So few are not for one compiled kernel, which adds to the state itself (``kernels.cuda.fills_waves``). In 8 bits
        it takes few rows as well: features do not depend on how many others there are.
        """
        return not self.fp8 and 3 * rows <= self.settings.usual_chunk(self.dim)

    def _workspace(self, rows: int, beside: bool) -> Workspace:
        """Memory for chunks of a size."""
        blocks = self.constants.blocks
        width = blocks[0].position.first.weight.shape[1]
        return Workspace(rows, self.dim, width, self.dtype, self.device, len(blocks) if beside else 0)

    def _graphed_chunk(self, rows: int, beside: bool, shape: tuple[object, ...]) -> GraphedChunk:
        """That of this thread and stream for chunks of a size and shape; those used least make room."""
        device = self.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        owner = (threading.get_ident(), device, stream)
        key = (*owner, rows, *shape)
        with self._lock:
            graphed = self._graphed.pop(key, None)
            if graphed is None:
                graphed = GraphedChunk(self._workspace(rows, beside), self.constants)
            own = [k for k in self._graphed if k[:3] == owner]
            while own and graphed.nbytes + sum(self._graphed[k].nbytes for k in own) > GRAPH_BYTES:
                del self._graphed[own.pop(0)]
            self._graphed[key] = graphed
        return graphed

    def _walk(
        self,
        cache: ImageCache,
        chunk: Chunk,
        decoders: Mapping[int, Folded],
        outputs: Mapping[int, Tensor],  # [b, n, E] or [b, n] each, contiguous
        workspace: Workspace,
        replay: Callable[[Image, Tensor, Table | None, Tensor], Tensor] | None,
    ) -> None:
        """Walk one chunk and decode it into ``outputs``.

        Args:
            cache: the images of the chunk, in the compute type.
            chunk: the queries.
            decoders: decoders of the depths asked for; with ``replay`` at most the first and the last.
            outputs: per depth, where scores go, or labels: an integer dtype asks for the argmax.
            workspace: memory for the chunk.
            replay: walks the blocks instead of :func:`walk_blocks`.
        """
        from ..kernels.triton.bilinear_sample import sample
        from ..kernels.triton.linear import linear, linear_argmax

        coords, tables, shared = chunk.queries
        b, n, _ = coords.shape
        rows, coords = b * n, coords.to(position_dtype(coords, cache.patch_grid)).contiguous()
        image = Image(cache.keys, cache.values, cache.tokens)
        table = None
        if tables[0] is not None:
            table = Table([t.gamma_beta for t in tables], tables[0].row, tables[0].token)
        elif shared is not None:
            table = Table([], shared.row, shared.token, shared.relative)

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
        if replay is not None:
            decode(len(self.constants.blocks), state, replay(image, coords, table, moments))
        else:
            walk_blocks(self.constants, image, coords, table, workspace, moments, decode)


def wants_graph(device: torch.device, depths: Iterable[int], last: int) -> bool:
    """Whether chunks may replay graphs: on a GPU that nobody captures, decoding the first and last depth alone."""
    if not set(depths) <= {0, last} or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()
