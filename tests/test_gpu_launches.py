"""What the network launches on a GPU, recorded: kernels, tiles and sizes that are meant, and few of everything else."""

from __future__ import annotations

import gc
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton cannot be used here", allow_module_level=True)

from vitup_fast.bench import correctness, end_to_end, launches, model
from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.triton import tiles
from vitup_fast.kernels.triton.common import TYPICAL_MULTIPROCESSORS

from vitup_fast import ViTUpConfig
from vitup_fast.errors import KernelError
from vitup_fast.network.grid import Grid, GridAxis, cell_centres
from vitup_fast.network.weights import Look
from vitup_fast.ops import PositionWeights
from vitup_fast.ops.coordinates import nearest_token
from vitup_fast.ops.film_mlp import film_gamma_beta
from vitup_fast.testing import OPERATIONS, Sizes
from vitup_fast.walks import gpu
from vitup_fast.walks.plan import Spans, gpu_chunk

CPU = torch.device("cpu")
CALLS = ("prepare", "dense 448", "dense 1024", "scattered 4096")


@pytest.fixture(scope="module", params=["dinov3_splus", "dinov3_base"])
def config(request):
    return ViTUpConfig.preset(request.param)


@pytest.fixture(scope="module")
def recorded(config):
    return launches.network_launches(config, torch.bfloat16, 90, CALLS)


def named(launch):
    """Name, arguments and options of a launch."""
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    return launch.kernel.fn.__name__, values


def sampled(recorded):
    """Queries of each chunk, in order."""
    return [v["M"] for name, v in map(named, recorded) if name == "bilinear_sample_kernel"]


@pytest.mark.parametrize(("call", "queries"), [("dense 448", 448**2), ("dense 1024", 1024**2)])
def test_chunks_give_every_multiprocessor_one_tile(config, recorded, call, queries):
    *full, last = sampled(recorded[call])
    chunk = gpu_chunk(TYPICAL_MULTIPROCESSORS, config.dim)
    assert chunk * config.dim == TYPICAL_MULTIPROCESSORS * 128 * 384
    assert {*full} == {chunk}
    assert 0 < last <= chunk
    assert sum(full) + last == queries


@pytest.mark.parametrize("call", ["dense 448", "dense 1024"])
def test_full_chunks_run_the_widest_tiles(config, recorded, call):
    chunk = gpu_chunk(TYPICAL_MULTIPROCESSORS, config.dim)
    seen = Counter()
    for launch in recorded[call]:
        name, values = named(launch)
        if name != "linear_kernel" or values["M"] != chunk:
            continue
        whole_rows = (
            values["RESIDUAL"] or values["OUT_NORM"] or values["OUT_MOMENTS"] or values["K"] > 2 * 768
        )
        tile = values["BLOCK_M"], values["BLOCK_N"] * values["TILES"]
        if values["OUT_MOMENTS"]:
            assert (launch.variant, *tile) == ("linear_rows", 128, 384)
        elif not whole_rows:
            assert (launch.variant, *tile) == ("linear", 128, 128)
        seen[launch.variant] += 1
    assert {*seen} == {"linear", "linear_rows"}
    small = {launch.variant for launch in recorded[call] if named(launch)[1].get("M") == chunk}
    assert "linear_few_rows" not in small


def test_prefetching_attention(recorded):
    for call in CALLS[1:]:
        for name, values in map(named, recorded[call]):
            if name == "rope_cross_attention_kernel":
                assert (values["BLOCK_M"], values["num_stages"]) == (128, 3)


def test_few_queries_fill_the_gpu(config, recorded):
    """4096 rows in the widest tiles would be 32 blocks."""
    for name, values in map(named, recorded["scattered 4096"]):
        if name == "linear_kernel":
            columns = values["BLOCK_N"] * values["TILES"]
            blocks = -(-values["M"] // values["BLOCK_M"]) * -(-values["N"] // columns)
            assert blocks >= 64


def test_few_queries_take_few_launches(config, recorded):
    """Sampling, the position code of all blocks, at most twelve launches of a block, and the decoder."""
    found = recorded["scattered 4096"]
    names = Counter(named(x)[0] for x in found)
    assert names["position_code_kernel"] == 1
    assert len(found) <= 3 + 6 * 12
    few = gpu_chunk(TYPICAL_MULTIPROCESSORS, config.dim) >= 3 * 4096
    assert sum(x.beside for x in found) == (6 * 5 if few else 0)
    for call in ("dense 448", "dense 1024"):  # where a chunk fills the GPU
        assert {x.beside for x in recorded[call] if named(x)[1].get("M", 0) > 5632} == {False}


WRITTEN = {
    "linear_kernel": lambda v: ("p_out", *(["p_out_moments"] if v["OUT_MOMENTS"] else [])),
    "modulate_kernel": lambda v: ("p_out", "p_moments"),
    "add_layer_norm_kernel": lambda v: ("p_out", *(["p_moments"] if v["STORE_MOMENTS"] else [])),
    "rope_cross_attention_kernel": lambda v: ("p_out",),
}


def test_what_runs_beside_shares_no_memory_that_is_written(recorded):
    """But for the rows of the FiLM MLPs, which LayerNorms add in the order of the blocks."""
    found = recorded["scattered 4096"]
    if not any(x.beside for x in found):
        return
    start = next(i for i, x in enumerate(found) if x.beside)
    chain = [x for x in found[start:-1] if not x.beside]

    def memory(launches, only_written):
        spans = {}
        for launch in launches:
            name, values = named(launch)
            written = WRITTEN[name](values)
            for key, t in values.items():
                if isinstance(t, torch.Tensor) and (key in written or not only_written):
                    spans[t.data_ptr(), t.data_ptr() + t.nbytes] = name, key
        return spans

    def shared(a, b):
        return {pair for x, pair in a.items() for y in b if x[0] < y[1] and y[0] < x[1]}

    beside = [x for x in found if x.beside]
    assert not shared(memory(beside, False), memory(chain, True))
    assert shared(memory(chain, False), memory(beside, True)) == {("add_layer_norm_kernel", "p_x")}
    made = [named(x)[1]["p_out"].data_ptr() for x in beside][4::5]
    added = [named(x)[1]["p_x"].data_ptr() for x in chain if named(x)[0] == "add_layer_norm_kernel"]
    assert made == added
    assert len({*made}) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_fit_the_shared_memory_of_every_generation(dtype):
    """Counted as operands of all stages, which is what compilers make of them or more."""
    made = launches.network_and_cache(ViTUpConfig.preset("dinov3_splus"), dtype)
    for capability, most in tiles.SHARED_BYTES.items():
        with launches.recording(capability) as found:
            launches.dense(*made, side=448)
            launches.scattered(*made, count=4096)
        seen = 0
        for name, values in map(named, found):
            if "BLOCK_N" in values:
                columns = values["BLOCK_N"] * values.get("TILES", 1)
                if name == "rope_cross_attention_kernel":  # the projection, or keys and values beside queries
                    columns = max(columns, values["HEAD"])
                operands = (values["BLOCK_M"] + columns) * values["BLOCK_K"] * dtype.itemsize
                assert values["num_stages"] * operands + 1024 <= most, (capability, name)
                seen += 1
        assert seen > 100


def kinds(found):
    """All that decides the code of launches, with the variant that chose it."""
    return {
        (name, str(sorted(x.options.items(), key=str)), x.variant) for x in found for name in [named(x)[0]]
    }


def test_the_check_of_a_chunk_launches_what_the_network_does(config, recorded):
    chunk = gpu_chunk(TYPICAL_MULTIPROCESSORS, config.dim)
    with launches.recording(90) as found:
        (case,) = (c for c in correctness.chunk_cases(CPU) if c.config.dim == config.dim)
        setting = case.setting(torch.bfloat16, CPU)
        for part in case.parts:
            correctness.network_results(setting, "triton", part, size=case.size)
    for call in ("dense 448", "dense 1024"):
        full = [x for x in recorded[call] if named(x)[1].get("M", named(x)[1].get("N")) == chunk]
        assert full
        assert kinds(full) <= kinds(found)


@pytest.mark.parametrize(
    "operation", ["residual_mlp", "rope_cross_attention", "film_mlp_table", "norm_linear"]
)
def test_operations_are_timed_in_the_tiles_of_the_network(operation):
    """At the queries that bench/run_gpu.sh names."""
    config = ViTUpConfig.preset("dinov3_splus")
    queries = gpu_chunk(TYPICAL_MULTIPROCESSORS, config.dim)
    assert f"queries={queries}" in (Path(launches.__file__).parent / "run_gpu.sh").read_text()
    expansion = 1 if operation == "norm_linear" else 4
    sizes = Sizes(1, queries, config.dim, config.num_heads, (28, 28), (56, 56), expansion)
    arguments = OPERATIONS[operation].inputs(sizes, torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    with launches.recording(90) as found, torch.no_grad():
        OPERATIONS[operation].function(**arguments, impl="triton")
    (network,) = launches.network_launches(config, torch.bfloat16, 90, ("dense 448",)).values()

    def tiles_of(some):
        names = ("N", "D", "BLOCK_M", "BLOCK_N", "BLOCK_K", "TILES", "num_warps", "num_stages")
        matrix = ("linear_kernel", "rope_cross_attention_kernel")
        seen = {
            (x.variant, named(x)[0], *(x.options.get(n) for n in names))
            for x in some
            if named(x)[0] in matrix
        }
        return {str(s) for s in seen}

    assert tiles_of(found)
    assert tiles_of(found) <= tiles_of(network)


VIEWS = (
    *("view", "_unsafe_view", "unbind", "split", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice"),
    *(
        "select",
        "detach",
        "alias",
        "empty",
        "empty_strided",
        "new_empty",
        "permute",
        "view_as_real",
        "as_strided",
    ),
    *("view_as_complex", "split_with_sizes", "_reshape_alias", "empty_like", "to", "contiguous", "flatten"),
    *(
        "unflatten",
        "mT",
        "expand_as",
        "narrow",
        "chunk",
        "lift_fresh",
        "resolve_conj",
        "reshape",
        "is_complex",
    ),
)


def computed(run):
    """PyTorch's operations that compute or copy something, by name: those that call none that does, without views."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    names = Counter()

    def count(event):
        inner = sum([count(child) for child in event.cpu_children])
        name = event.name.removeprefix("aten::")
        if inner or name in VIEWS or "[" in name:
            return inner
        names[name] += 1
        return 1

    for event in profiler.events():
        if event.cpu_parent is None:
            count(event)
    return names


def test_a_second_image_is_prepared_in_few_launches(monkeypatch):
    net, *made = launches.network_and_cache(ViTUpConfig.preset("dinov3_splus"), torch.bfloat16)
    # What looks at the weights is no part of the projection.
    monkeypatch.setattr(net, "_look", lambda weights, queries: Look.NONE)
    with launches.recording(90) as found:
        counted = computed(lambda: launches.prepared(net, *made))
    assert len(found) == 1 + 6
    assert counted.total() + len(found) < 40, counted


def test_a_map_waits_for_nothing(monkeypatch):
    """Its coordinates and tables come from numbers that the CPU knows."""
    net, *made = launches.network_and_cache(ViTUpConfig.preset("dinov3_splus"), torch.bfloat16)
    # On a GPU nothing looks at the weights before a map.
    monkeypatch.setattr(net, "_look", lambda weights, queries: Look.NONE)
    with launches.recording(90):
        counted = computed(lambda: launches.dense(net, *made, side=1000))
    waiting = {
        "_local_scalar_dense",
        "item",
        "nonzero",
        "_unique2",
        "unique_dim",
        "masked_select",
        "is_nonzero",
    }
    assert not waiting & {*counted}, counted


def test_the_model_counts_every_product(config, recorded):
    found = model.predict("dense 448", recorded["dense 448"])
    queries = 448**2
    least = queries * (end_to_end.query_flops(config, 28 * 28, False) + 2 * config.dim**2)
    assert found.flops == pytest.approx(least, rel=1e-6)
    assert found.seconds > least / model.Machine().matrix
    assert found.launches == len(recorded["dense 448"])
    fast = model.predict("", recorded["dense 448"], model.Machine(l2=2 * model.Machine.l2))
    assert fast.seconds < found.seconds
    assert f"{1e3 * found.seconds:.1f} ms" in found.table()


def test_mlps_in_one_kernel_by_the_model(config, recorded):
    """Three of a block, the same products, and gathering that depends on what neighbours share."""
    several = recorded["dense 448"]
    merged = model.with_one_kernel_mlps(several)
    if config.dim != 384:
        assert merged == several
        return
    assert model.with_one_kernel_mlps(recorded["scattered 4096"]) == recorded["scattered 4096"]
    mlps = [one for one in merged if isinstance(one, model.OneKernelMLP)]
    others = [one for one in merged if not isinstance(one, model.OneKernelMLP)]
    chunks = len(sampled(several))
    assert Counter((m.hidden, m.film is not None) for m in mlps) == {
        (768, False): 6 * chunks,
        (1536, False): 6 * chunks,
        (1536, True): 6 * chunks,
    }
    one, other = model.predict("", merged), model.predict("", several)
    assert one.flops == pytest.approx(other.flops, rel=1e-9)
    kept = {one.kernel.fn.__name__ for one in others}
    assert kept == {"bilinear_sample_kernel", "rope_cross_attention_kernel", "linear_kernel"}
    quantised = model.with_one_kernel_mlps(several, fp8=True)
    kinds = [(m.hidden, m.film is None, m.fp8) for m in quantised if isinstance(m, model.OneKernelMLP)]
    assert kinds == [(m.hidden, m.film is None, True) for m in mlps]
    fast = model.predict("", quantised)
    assert fast.flops == pytest.approx(other.flops, rel=1e-9)
    assert fast.seconds < one.seconds
    few = model.with_one_kernel_mlps(recorded["scattered 4096"], fp8=True)
    assert Counter(m.hidden for m in few if isinstance(m, model.OneKernelMLP)) == {768: 6, 1536: 12}
    film = next(m for m in mlps if m.film is not None)
    scattered = film._replace(film=torch.arange(film.rows))
    assert model.mlp_cost(scattered, model.Machine()).seconds > model.mlp_cost(film, model.Machine()).seconds


def test_the_model_of_the_compiled_product(config, recorded):
    """The same products, in less time, but no faster than matrix units are and traffic allows."""
    triton = model.predict("", recorded["dense 448"])
    mixed = model.predict("", recorded["dense 448"], compiled=True)
    assert (mixed.flops, mixed.launches) == (pytest.approx(triton.flops), triton.launches)
    assert mixed.seconds < triton.seconds
    machine, own = model.Machine(), [k for k in mixed.kernels if k["kernel"].startswith("linear_sm90")]
    assert own
    for kernel in own:
        assert kernel["seconds"] > kernel["flops"] / machine.matrix
        assert kernel["seconds"] > kernel["l2"] / machine.l2
    elsewhere = model.predict("", recorded["dense 448"], capability=100, compiled=True)
    assert not [k for k in elsewhere.kernels if k["kernel"].startswith("linear_sm90")]


def test_the_model_knows_the_compiled_product():
    """Its constants are those of the source."""
    source = (Path(__file__).parent.parent / "csrc" / "cuda" / "linear_kernel.cuh").read_text()
    text = dict(re.findall(r"(\w+) = (\d+)[,;]", source))
    rows, depth, behind = (int(text[name]) for name in ("ROWS", "DEPTH", "BEHIND_LEAD"))
    assert (2 * rows, 4 * rows, depth) == (model.COMPILED_ROWS, compiled.LINEAR_ROWS, model.COMPILED_DEPTH)
    slots = dict(
        zip((256, 192), map(int, re.search(r"COLUMNS == 256 \? (\d) : (\d)", source).groups()), strict=True)
    )
    assert {n: s - behind for n, s in slots.items()} == model.COMPILED_LEAD
    assert {*compiled.LINEAR_COLUMNS} == {*slots}


@pytest.fixture(scope="module")
def training():
    """Forward and backward pass of a chunk through one block of S+, operations of PyTorch included."""
    return launches.training_launches(ViTUpConfig(384, 6, (0, 1)), torch.bfloat16, 90)


def test_the_model_counts_every_product_of_a_training_step(training):
    queries, recorded = training
    found = model.predict("training", recorded)
    D, T, code = 384, 28 * 28, 128
    two_layers = 4 * D * (2 * D + 4 * D + 4 * D)  # transition, FiLM and the last MLP
    position = 2 * D * (code + 2 * D)
    forward = two_layers + position + 4 * D * D + 4 * T * D + 2 * 2 * D * D
    # Of the FiLM MLP all is computed again, of the others a hidden layer; of attention all up to the softmax.
    again = two_layers // 2 + position + 4 * D * 4 * D + 2 * D * D + 4 * T * D
    gradients = 2 * two_layers + 2 * position + 8 * D * D + 14 * T * D + 4 * 2 * D * D
    gradients += position  # which also computes a hidden layer a third time
    projection = 3 * T * 2 * 2 * D * D
    least = queries * (forward + again + gradients) + projection
    assert found.flops == pytest.approx(least, rel=0.02)
    assert found.seconds > least / model.Machine().matrix


def test_a_training_step_launches_few_kernels_of_pytorch(training):
    """Weights are folded, and their gradients unfolded, by a launch each."""
    operations = [x for x in training[1] if isinstance(x, launches.Operation)]
    names = Counter(named(x)[0] for x in training[1] if not isinstance(x, launches.Operation))
    assert min(names["fold_kernel"], names["fold_backward_kernel"]) > 0
    assert len(operations) < 2 * names.total(), Counter(x.name for x in operations)


def test_a_training_step_runs_the_tiles_that_are_meant(training):
    queries, recorded = training
    seen = set()
    for launch in recorded:
        if isinstance(launch, launches.Operation):
            continue
        name, values = named(launch)
        if name == "linear_kernel" and values["M"] == queries:
            seen.add(launch.variant)
        elif name == "hidden_backward_kernel":
            assert (values["BLOCK_M"], values["BLOCK_N"]) == (128, 128)
        elif name == "weight_gradient_kernel" and values["M"] == queries:
            blocks = -(-values["P"] // 128) * -(-values["Q"] // 128) * len(values["p_out"])
            assert blocks / 132 / -(-blocks // 132) > 0.7
    assert seen == {"linear", "linear_rows"}


def test_smaller_chunks_are_slower_by_the_model(config):
    made = launches.network_and_cache(config, torch.bfloat16)
    seconds = []
    for chunk in (None, 8448 // 2, 8064):
        with launches.recording(90) as found:
            launches.dense(*made, side=448, query_chunk_size=chunk)
        seconds.append(model.predict("", found).seconds)
    assert seconds[0] == min(seconds)


def test_the_model_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "model.json"
    arguments = ["--preset", "tiny", "--call", "dense 448", "--copy", "2e12", "--json", str(path)]
    assert model.main(arguments) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    assert '"copy": 2000000000000.0' in path.read_text()


# Tiles


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("rows", [1, 100, 1000, 4096, 16896, 10**6])
def test_no_wider_or_narrower_tile_is_estimated_faster(capability, rows):
    ladder = (tiles.Tile(128, 384, 64, 8, 3), tiles.Tile(128, 128, 64, 8, 3), tiles.Tile(64, 64, 64, 4, 4))
    product = tiles.Product(rows, 384, 1536, 2, 2, True)
    times = [tiles.seconds(product, tile, 132, capability) for tile in ladder]
    assert min(times) > 0
    assert times[tiles.fastest(product, ladder, 132, capability)] == min(times)
    more = [tiles.seconds(product._replace(M=4 * rows), tile, 132, capability) for tile in ladder]
    assert all(a >= b for a, b in zip(more, times, strict=True))


def test_blocks_that_a_multiprocessor_holds():
    assert tiles.resident(tiles.Tile(128, 384, 64, 8, 3), 2, 90) == 1
    assert tiles.resident(tiles.Tile(128, 128, 64, 8, 3), 2, 90) == 2
    assert tiles.of_capability(tiles.SHARED_BYTES, 87) == tiles.SHARED_BYTES[86]
    assert tiles.of_capability(tiles.RATES, 75) == tiles.RATES[80]


# Spans and grids


@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 1000])
def test_spans_are_full_and_the_last_is_the_rest(chunk):
    spans = Spans(5, 8, chunk, whole_lines=False)
    parts = list(spans)
    assert [p.stop - p.start for p in parts[:-1]] == [chunk] * (len(parts) - 1)
    assert 0 < parts[-1].stop - parts[-1].start <= chunk
    assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
    assert parts[-1].stop == 40
    assert spans.longest == max(p.stop - p.start for p in parts)
    assert list(Spans(0, 1, chunk, whole_lines=False)) == [slice(0, 0)]


@pytest.mark.parametrize(("cells", "tokens"), [(448, 28), (1029, 28), (63, 9), (15, 5), (77, 7), (1000, 37)])
def test_coordinates_lie_over_the_exact_token(cells, tokens):
    axis = GridAxis.create(cells, tokens, torch.float32)
    moved = axis.over_their_tokens(tokens)
    coords = torch.from_numpy(moved.coords)
    token, _ = nearest_token(torch.stack((coords, torch.zeros_like(coords)), -1), (1, tokens))
    assert torch.equal(token, torch.from_numpy(axis.token))
    fused = (moved.coords.astype(np.float64) * tokens - 0.5).astype(np.float32)
    np.testing.assert_array_equal(np.rint(fused).clip(0, tokens - 1), axis.token)
    assert (abs(moved.coords - axis.coords) <= 2 * np.spacing(axis.coords)).all()


def grid_of(size, tokens, most_rows, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 10), (16,), (32, 16), (32,))
    positions = [PositionWeights(*(torch.randn(s, generator=generator) for s in shapes)) for _ in range(2)]
    freqs = torch.tensor([1.0, 2.0])
    return Grid(size, tokens, 2, torch.float32, CPU, freqs, positions, most_rows, **options)


@pytest.mark.parametrize("per_chunk", [True, False])
@pytest.mark.parametrize("most_rows", [None, 0, 2048])
def test_any_part_of_a_grid_has_its_queries(most_rows, per_chunk):
    size, tokens = (20, 28), (5, 7)
    grid = grid_of(size, tokens, most_rows, per_chunk=per_chunk)
    centres = cell_centres(size, torch.float32, CPU)
    token, relative = nearest_token(centres.double(), tokens)
    for span in (slice(0, 560), slice(0, 56), slice(3, 20), slice(27, 29), slice(100, 431), slice(559, 560)):
        coords, tables, shared = grid.queries(span)
        assert shared is None
        assert coords.shape == (2, span.stop - span.start, 2)
        torch.testing.assert_close(coords[1], centres[span], rtol=3e-7, atol=0)
        if tables[0] is None:
            assert most_rows is None or (most_rows == 0 and (not per_chunk or span.stop - span.start < 60))
            continue
        for table, position in zip(tables, grid.positions, strict=True):
            assert torch.equal(table.token, token[span])
            expected = film_gamma_beta(relative[span].float(), grid.freqs, position)
            torch.testing.assert_close(table.gamma_beta[table.row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "chunk"), [((20, 30), 150), ((9, 24), 50), ((3, 72), 100), ((40, 6), 37)])
def test_a_walk_gets_the_relative_positions_that_a_chunk_shares(size, chunk):
    tokens = (5, 6)
    grid = grid_of(size, tokens, 0, per_chunk=False, for_walk=True)
    token, relative = nearest_token(cell_centres(size, torch.float64, CPU), tokens)
    lengths, shared_by = set(), 0
    for span in Spans(*size, chunk, whole_lines=False):
        _, tables, shared = grid.queries(span)
        assert tables == [None, None]
        if shared is None:
            assert span.stop == size[0] * size[1]  # few are left
            continue
        assert torch.equal(shared.token, token[span])
        torch.testing.assert_close(shared.relative[shared.row], relative[span].float(), rtol=0, atol=1e-6)
        lengths.add((span.stop - span.start, len(shared.relative)))
        shared_by += span.stop - span.start
    assert shared_by > 0
    assert len({count for count, _ in lengths}) == len(lengths)  # as many for all chunks of a length


def test_tables_of_all_blocks_at_once():
    grid = grid_of((8, 8), (4, 4), 2048)
    relative = torch.rand(9, 2) - 0.5
    for table, position in zip(grid._gamma_beta_batched(relative), grid.positions, strict=True):
        torch.testing.assert_close(table, film_gamma_beta(relative, grid.freqs, position))


# Recording


class FakeGraph:
    log: list[str]

    def __init__(self):
        FakeGraph.log = []

    def capture_begin(self, capture_error_mode):
        FakeGraph.log.append(capture_error_mode)

    def capture_end(self):
        FakeGraph.log.append("end")
        if "failed" in FakeGraph.log:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        FakeGraph.log.append("replay")


class FakeStream:
    def __init__(self, handle=0, device=None):
        self.handle, self.awaited = handle, []

    def wait_stream(self, other):
        self.awaited.append(other)

    def wait_event(self, event):
        self.awaited.append(event.recorded_on)


class FakeEvent:
    recorded_on = None

    def record(self, stream):
        self.recorded_on = stream


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU's interface without one: streams are numbered as the driver makes them."""
    made = []

    class Driver:
        code = 0

        def cuStreamCreate(self, handle, flags):
            assert flags == 1  # does not wait for the default stream, on which other threads may work
            made.append(len(made) + 1)
            handle._obj.value = made[-1]
            return self.code

    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(gpu, "_own_streams", {})
    cuda = {"init": lambda: None, "device": lambda d: nullcontext(), "stream": lambda s: nullcontext()}
    cuda |= {"current_stream": lambda d: FakeStream(), "CUDAGraph": FakeGraph, "ExternalStream": FakeStream}
    for name, value in cuda.items():
        monkeypatch.setattr(gpu.torch.cuda, name, value)
    return Driver


def test_a_thread_records_on_a_stream_of_its_own(fake_gpu):
    found, both, device = {}, Barrier(2), torch.device("cuda", 0)

    def work(name):
        both.wait()
        found[name] = [gpu.own_stream(device).handle for _ in range(2)]
        both.wait()

    threads = [Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["a"][0] == found["a"][1] != found["b"][0] == found["b"][1]
    fake_gpu.code = 2
    with pytest.raises(KernelError, match="error 2 of cuStreamCreate"):
        gpu.own_stream(torch.device("cuda", 1))


@pytest.mark.parametrize("capturing", [True, False])
def test_a_second_stream_starts_after_the_first_and_is_awaited(fake_gpu, monkeypatch, capturing):
    first, device = FakeStream(), torch.device("cuda", 0)
    monkeypatch.setattr(gpu.torch.cuda, "current_stream", lambda d: first)
    monkeypatch.setattr(gpu.torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(gpu.torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with gpu.second_stream(device) as mark:
        wait = mark()
    assert not first.awaited
    wait()
    if capturing:
        (second,) = first.awaited
        assert second is gpu.own_stream(device, 1)
        assert second is not gpu.own_stream(device)
        assert second.awaited == [first]
    else:
        assert not first.awaited


def test_nothing_is_collected_while_recording(fake_gpu):
    during = []
    replay = gpu.record(lambda: during.append(gc.isenabled()), torch.device("cuda", 0))
    replay()
    assert FakeGraph.log == ["thread_local", "end", "replay"]
    assert during == [False]
    assert gc.isenabled()


def test_the_first_error_of_a_recording_is_told(fake_gpu):
    def fail():
        FakeGraph.log.append("failed")
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        gpu.record(fail, torch.device("cuda", 0))
    assert FakeGraph.log[-1] == "end"
    assert gc.isenabled()
