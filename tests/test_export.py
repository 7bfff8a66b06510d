"""Exported files give the Upsampler's features without this library's operators."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch._inductor.config

from vitup_fast import InputError, Upsampler, ViTUpConfig
from vitup_fast.cli import main
from vitup_fast.export import export, exported_program
from vitup_fast.network.backbone import config_for
from vitup_fast.sources import seeded_network
from vitup_fast.testing import assert_within_budget

pytest.importorskip("timm")
IMAGE_SIZE = (37, 50)


@pytest.fixture(scope="module")
def model() -> Upsampler:
    tiny = ViTUpConfig.preset("tiny")
    options = (*dict(tiny.backbone_options, depth=1).items(),)
    config = config_for(tiny.backbone, (0, 1), backbone_options=options, hidden_layer_img_size=32)
    network, vit = seeded_network(config)
    return Upsampler(network, vit).eval().requires_grad_(False)


def inputs(points: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(points)
    image = torch.randn(1, 3, *IMAGE_SIZE, generator=generator)
    return {"image": image, "coords": torch.rand(1, points, 2, generator=generator)}


def assert_features(
    features: torch.Tensor, model: Upsampler, image: torch.Tensor, coords: torch.Tensor
) -> None:
    exact = copy.deepcopy(model).double()(image.double(), coords)
    cache = model.vit_up.prepare(
        model.backbone.hidden_states(image, model.hidden_layer_img_size),
        model.backbone.patch_grid(image, model.patch_grid_size),
        impl="reference",
    )
    assert_within_budget(features, model.vit_up(cache, coords, impl="reference"), exact, factor=1.5)


def test_programs_hold_operators_of_pytorch_alone(model):
    program = exported_program(model, IMAGE_SIZE)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not [name for name in called if "vitup" in name or "mkldnn" in name]
    for points in (1, 33):
        asked = inputs(points)
        assert_features(program.module()(**asked), model, **asked)


def test_onnxruntime_gives_the_same_features(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(model, tmp_path / "points.onnx", IMAGE_SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["points.onnx"]
    session = runtime.InferenceSession(tmp_path / "points.onnx", providers=["CPUExecutionProvider"])
    for points in (3, 41):
        asked = inputs(points)
        features = session.run(["features"], {name: tensor.numpy() for name, tensor in asked.items()})[0]
        assert_features(torch.from_numpy(features), model, **asked)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")
def test_the_command_line_compiles_a_map_and_compares_it(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.aot_inductor, "compile_wrapper_opt_level", "O0")
    model.save_pretrained(tmp_path / "model.safetensors")
    file = tmp_path / "map.pt2"
    sizes = ["--image-size", "32", "32", "--size", "3", "5"]
    assert main(["export", "--pt2", str(file), *sizes, "--model", str(tmp_path / "model.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "a map of 3 x 5 cells" in shown
    assert float(shown.rpartition(" ")[2]) < 1e-5
    image = inputs(1)["image"][..., :32, :32].contiguous()
    features = torch._inductor.aoti_load_package(str(file))(image=image)
    torch.testing.assert_close(features, model.dense(image, (3, 5)), rtol=1e-4, atol=1e-4)


def test_compiled_dense_maps_are_one_graph(model):
    image = inputs(1)["image"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda image: model.dense(image, (3, 5)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model.dense(image, (3, 5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_files_that_cannot_be_written(name, model, tmp_path, capsys):
    if name == "model.onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match="path: expected a file in a folder that exists"):
        export(model, tmp_path / "none" / name, IMAGE_SIZE)
    with pytest.raises(InputError, match="image_size: expected"):
        export(model, tmp_path / name, (0, 3))
    other = {"model.onnx": "--pt2", "model.pt2": "--onnx"}[name]
    assert main(["export", other, str(tmp_path / name), "--model", "tiny", "--weights", "random"]) == 2
    assert f"{other}: expected a file name that ends in" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_endings_name_formats(model, tmp_path):
    with pytest.raises(InputError, match=r"path: expected a file name that ends in \.onnx or \.pt2"):
        export(model, tmp_path / "model.bin", IMAGE_SIZE)
