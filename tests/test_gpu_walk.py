"""The walk by Triton kernels: whatever way chunks are launched, the numbers are those of the definition."""

from __future__ import annotations

from threading import Barrier, Lock, Thread

import pytest
import torch
from conftest import FAST_IMPLS, query_bytes

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton cannot be used here", allow_module_level=True)

from vitup_fast.kernels.triton import common, film_mlp

import vitup_fast
from vitup_fast import InputError, ViTUpConfig
from vitup_fast.network import model
from vitup_fast.testing import assert_within_budget, random_coords, random_image, random_network
from vitup_fast.walks import gpu
from vitup_fast.walks.gpu import GpuWalk, Workspace
from vitup_fast.walks.plan import gpu_chunk

CONFIG = ViTUpConfig(dim=64, num_heads=2, layer_indices=(0, 1, 2))
TOKENS, PATCHES, COUNT = (3, 4), (6, 7), 23


@pytest.fixture(scope="module")
def network():
    return random_network(CONFIG, torch.Generator().manual_seed(1), dtype=torch.float64)


def make_image(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return random_image(
        CONFIG, generator, batch=batch, token_grid=TOKENS, patch_grid=PATCHES, dtype=torch.float64
    )


@pytest.fixture(scope="module")
def cache(network):
    with torch.no_grad():
        return network.prepare(*make_image(2), impl="reference")


@pytest.fixture(scope="module")
def coords():
    return random_coords(torch.Generator().manual_seed(3), 2, COUNT).double()


@pytest.fixture(autouse=True)
def forgetful(network):
    """Each test makes walks of its own."""
    network._walks.clear()


@pytest.fixture
def recorded(monkeypatch):
    """Graphs as on a GPU, except that replaying one runs its launches again; counts recordings and replays."""
    counts = {"recorded": 0, "replayed": 0}

    def record(run, device):
        counts["recorded"] += 1

        def replay():
            counts["replayed"] += 1
            run()

        return replay

    monkeypatch.setattr(gpu, "record", record)
    monkeypatch.setattr(gpu, "wants_graph", lambda device, depths, last: set(depths) <= {0, last})
    return counts


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


HEAD = (
    torch.randn(5, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    torch.arange(5).double(),
)


@pytest.fixture(params=[True, False], ids=["beside", "in turn"])
def beside(request, monkeypatch):
    """Whether FiLM MLPs of all blocks come first, in memory of their own, or each in its turn."""
    monkeypatch.setattr(GpuWalk, "_film_beside", lambda self, rows: request.param)


@pytest.mark.parametrize("chunk", [COUNT, 2 * COUNT, 15])
def test_equals_definition(network, cache, coords, chunk, beside):
    with torch.no_grad():
        for options in ({}, {"return_all_layers": True}, {"head": HEAD}):
            actual = network(cache, coords, impl="triton", query_chunk_size=chunk, **options)
            close(actual, network(cache, coords, impl="reference", **options))
        labels = network(cache, coords, impl="triton", head=HEAD, labels=True, query_chunk_size=chunk)
        scores = network(cache, coords, impl="reference", head=HEAD)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), scores.argmax(-1))


@pytest.mark.parametrize("chunk", [None, 30])
def test_dense_equals_definition(network, cache, chunk):
    """In float32, for only there grids have tables."""
    single, single_cache = vitup_fast.ViTUp(CONFIG).float(), cache.to(torch.float32)
    single.load_state_dict(network.state_dict())
    done = []
    with torch.no_grad():
        for options in ({}, {"head": tuple(t.float() for t in HEAD)}):
            actual = single.dense(
                single_cache,
                (6, 8),
                impl="triton",
                query_chunk_size=chunk,
                progress=done.append,
                **options,
            )
            exact = network.dense(cache, (6, 8), impl="reference", **({"head": HEAD} if options else {}))
            eager = single.dense(single_cache, (6, 8), impl="reference", **options)
            assert_within_budget(actual, eager, exact, factor=1.5)
        labels = single.dense(single_cache, (6, 8), impl="triton", labels=True, **options)
    assert sum(done) == 2 * 48
    assert labels.shape == (2, 6, 8)
    assert (labels.long() == exact.argmax(-1)).float().mean() > 0.98


def test_adaptive_maps(network, cache, recorded):
    """Chunks are of one length but for the last of each half step, so that graphs serve them too."""
    options = {"tolerance": 0.5, "query_chunk_size": 12}
    reports = []
    with torch.no_grad():
        maps = [
            network.dense(cache[:1], (9, 12), impl=impl, report=reports.append, **options)
            for impl in ("triton", "reference")
        ]
    close(*maps)
    assert reports[0].queries == reports[1].queries
    assert 0.3 < reports[0].share < 1
    assert recorded["replayed"] > 0


def test_second_chunk_is_recorded_and_later_ones_replayed(network, cache, coords, recorded):
    expected = network(cache, coords, impl="reference").detach()
    with torch.no_grad():
        for calls in range(1, 4):
            close(network(cache, coords, impl="triton"), expected)
            assert recorded == {"recorded": min(calls - 1, 1), "replayed": max(calls - 2, 0)}


def test_graphs_follow_images_coordinates_and_weights(network, cache, coords, recorded):
    """A graph reads fixed addresses: everything that changes has to be brought there."""
    changed = vitup_fast.ViTUp(CONFIG).double()
    changed.load_state_dict(network.state_dict())
    other = changed.prepare(*make_image(5), impl="reference").to(torch.float64)
    moved = coords.flip(1)
    with torch.no_grad():
        for _ in range(3):
            for image in (cache, other):
                for where in (coords, moved):
                    actual = changed(image, where, impl="triton")
                    close(actual, network(image, where, impl="reference"))
        assert recorded["recorded"] == 1
        other.keys[0].mul_(1.5)
        close(changed(other, coords, impl="triton"), network(other, coords, impl="reference"))
        changed.vit_up_blocks[0].mlp.mlp[0].weight.mul_(1.1)
        for _ in range(3):
            close(changed(cache, coords, impl="triton"), changed(cache, coords, impl="reference"))


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_inference_mode_and_no_grad_share_graphs(network, coords, recorded, modes):
    with modes[0]():
        cache = network.prepare(*make_image(7), impl="reference")
    for mode in modes:
        with mode():
            for _ in range(3):
                close(network(cache, coords, impl="triton"), network(cache, coords, impl="reference"))
    assert recorded["recorded"] == 1


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_writes_to_caches_in_inference_mode_are_seen(network, coords, recorded, impl):
    with torch.inference_mode():
        image = network.prepare(*make_image(8), impl=impl)
        for step in range(4):
            close(network(image, coords, impl="triton"), network(image, coords, impl="reference"))
            (image.keys, image.values, image.tokens)[step % 3][step % 2].mul_(1.5)
    assert recorded["replayed"] > 0


@pytest.mark.parametrize("chunk", [15, COUNT, 40])
def test_graphs_with_ragged_chunks_and_groups_of_images(network, coords, recorded, chunk, beside):
    images = make_image(6, batch=3)
    where = torch.cat((coords, coords[:1].flip(1)))
    with torch.no_grad():
        cache = network.prepare(*images, impl="reference")
        expected = network(cache, where, impl="reference")
        for _ in range(3):
            close(network(cache, where, impl="triton", query_chunk_size=chunk), expected)
    assert recorded["replayed"] > 0


def test_graphs_of_dense_maps(network, cache, recorded):
    single, single_cache = vitup_fast.ViTUp(CONFIG).float(), cache.to(torch.float32)
    single.load_state_dict(network.state_dict())
    with torch.no_grad():
        for size in ((4, 6), (6, 6), (4, 6)):
            exact = network.dense(cache, size, impl="reference")
            eager = single.dense(single_cache, size, impl="reference")
            for _ in range(2):
                actual = single.dense(single_cache, size, impl="triton", query_chunk_size=12)
                assert_within_budget(actual, eager, exact, factor=1.5)
    assert recorded["replayed"] > 0


def test_threads_have_graphs_of_their_own(network, cache, coords, recorded):
    expected = network(cache, coords, impl="reference").detach()
    failures, one_at_a_time, both = [], Lock(), Barrier(2)

    def work():
        both.wait()  # so that neither gets the identity of the other
        try:
            for _ in range(3):
                with one_at_a_time, torch.no_grad():  # the interpreter is not made for threads
                    close(network(cache, coords, impl="triton"), expected)
        except AssertionError as error:
            failures.append(error)
        both.wait()

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert recorded["recorded"] == 2


def test_graphs_share_a_budget(network, cache, coords, recorded, monkeypatch):
    one = Workspace(2 * COUNT, 64, 128, torch.float64, coords.device, beside=2).nbytes
    monkeypatch.setattr(gpu, "GRAPH_BYTES", 2 * one)
    with torch.no_grad():
        for count in (COUNT, COUNT - 1, COUNT - 2, COUNT - 3):
            network(cache, coords[:, :count], impl="triton")
    (walk,) = (known.walk for known in network._walks.values())
    assert 1 <= len(walk._graphed) <= 2
    assert sum(graphed.nbytes for graphed in walk._graphed.values()) <= 2 * one


def test_a_memory_budget_keeps_nothing(network, cache, coords, recorded):
    per_query = query_bytes(network, "triton")
    with torch.no_grad():
        actual = network(cache, coords, impl="triton", max_memory=10 * per_query)
    close(actual, network(cache, coords, impl="reference").detach())
    assert recorded["recorded"] == 0
    workspace = Workspace(10, 64, 128, torch.float64, coords.device)
    assert workspace.nbytes <= 10 * per_query


@pytest.mark.parametrize("tiles", [1, 3])
def test_chunks_allocate_nothing(network, cache, coords, monkeypatch, tiles, beside):
    """Also where LayerNorm of complete rows takes a pass of its own."""
    settings = common.settings_for("linear_rows", coords, 64) | {"BLOCK_N": 32 * tiles, "TILES": 1}
    walk_blocks, inside, allocated = gpu.walk_blocks, [], []
    empty = torch.empty

    def watched(*args, **kwargs):
        if inside:
            allocated.append(args)
        return empty(*args, **kwargs)

    def walk(*args):
        inside.append(True)
        try:
            return walk_blocks(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(gpu, "walk_blocks", walk)
    monkeypatch.setattr(torch, "empty", watched)
    with torch.no_grad(), common.overridden_settings({"linear_rows": settings}):
        actual = network(cache, coords, impl="triton")
    assert not allocated
    monkeypatch.undo()
    close(actual, network(cache, coords, impl="reference").detach())


def test_autocast_computes_in_its_dtype(network, cache, coords):
    single, single_cache = vitup_fast.ViTUp(CONFIG).float(), cache.to(torch.float32)
    single.load_state_dict(network.state_dict())
    where = coords.float()
    with torch.no_grad():
        exact = network(cache, where.double(), impl="reference")
        with torch.autocast("cpu", torch.bfloat16):
            actual = single(single_cache, where, impl="triton")
            eager = single(single_cache, where, impl="reference")
    assert actual.dtype == torch.bfloat16
    assert_within_budget(actual, eager, exact, factor=1.5)


def test_gradients_go_through_the_operators(network, cache, coords):
    leaf = coords.clone().requires_grad_()
    network.requires_grad_(False)
    try:
        (grad,) = torch.autograd.grad(network(cache, leaf, impl="triton").sum(), leaf)
        (exact,) = torch.autograd.grad(network(cache, leaf, impl="reference").sum(), leaf)
    finally:
        network.requires_grad_(True)
    torch.testing.assert_close(grad, exact, rtol=1e-7, atol=1e-7)


def test_writes_through_data_are_noticed(network, cache, coords):
    changed = vitup_fast.ViTUp(CONFIG).double()
    changed.load_state_dict(network.state_dict())
    with torch.no_grad():
        changed(cache, coords, impl="triton")
        changed.vit_up_blocks[1].mlp.mlp[2].weight.data.mul_(2)
        image = changed.prepare(*make_image(2), impl="reference")
        close(changed(image, coords, impl="triton"), changed(image, coords, impl="reference"))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_nothing_to_do(network, cache, coords, impl):
    with torch.no_grad():
        assert network(cache, coords[:, :0], impl=impl).shape == (2, 0, 64)
        assert network(cache, coords[:, :0], impl=impl, head=HEAD, labels=True).shape == (2, 0)


def test_labels_need_a_head(network, cache, coords):
    with pytest.raises(InputError, match="labels: expected a head"):
        network(cache, coords, labels=True)


def test_memory_of_a_pass_stays_within_the_goal():
    """128 MB beyond output, weights and cache, also for the larger model with graphs: counted, not allocated."""
    for preset in ("dinov3_splus", "dinov3_base"):
        config = ViTUpConfig.preset(preset)
        rows = gpu_chunk(132, config.dim)
        blocks, tokens = config.num_layers - 1, 28 * 28
        meta = torch.device("meta")
        workspace = Workspace(rows, config.dim, 128, torch.bfloat16, meta)
        few = Workspace(rows // 3, config.dim, 128, torch.bfloat16, meta, beside=blocks)
        copies = blocks * (3 * tokens * config.dim * 2 + 256 * 2 * config.dim * 4) + rows * (8 + 16)
        assert max(workspace.nbytes, few.nbytes) + copies < 128e6


@pytest.mark.parametrize("beside", [False], indirect=True)
def test_maps_of_many_relative_positions_share_those_of_a_chunk(
    network, cache, recorded, monkeypatch, beside
):
    """The walk makes their tables, also where chunks begin within a row, and the last one has none."""
    monkeypatch.setattr(model, "SHARED_TABLE_ROWS", 3)
    single, single_cache = vitup_fast.ViTUp(CONFIG).float(), cache.to(torch.float32)
    single.load_state_dict(network.state_dict())
    lengths = []
    position_code = film_mlp.position_code
    monkeypatch.setattr(
        film_mlp, "position_code", lambda c, *rest: lengths.append(c.numel() // 2) or position_code(c, *rest)
    )
    with torch.no_grad():
        for size in ((9, 24), (7, 32)):
            exact = network.dense(cache, size, impl="reference")
            eager = single.dense(single_cache, size, impl="reference")
            for _ in range(3):
                actual = single.dense(single_cache, size, impl="triton", query_chunk_size=50)
                assert_within_budget(actual, eager, exact, factor=1.5)
    assert recorded["replayed"] > 0
    assert 4 * 6 in lengths  # rows that a chunk of 50 may touch, and columns in one token
