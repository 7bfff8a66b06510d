"""Reading the parameters of an ONNX file, as PyTorch exports a DINOv2 (Hugging Face's ``Dinov2Model``)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..errors import require

PATCH_EMBEDDING = re.compile(r"(.*?)embeddings\.patch_embeddings\.projection\.weight")


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Read the parameters of an ONNX file under their PyTorch names.

    Exporting transposes the matrices of linear layers and takes their names, and cuts position tables in two: a matrix
    is named after the bias that is added to its product, and the tables are joined.
    """
    onnx = require("onnx", "onnx", "reading .onnx files")
    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    added = {}
    for node in graph.node:
        if node.op_type == "Add":
            for product, bias in (node.input, reversed(node.input)):
                added[product] = bias
    for node in graph.node:
        bias = added.get(node.output[0], "") if node.op_type == "MatMul" else ""
        name = f"{bias.removesuffix('bias')}weight"
        if bias.endswith(".bias") and bias in tensors and node.input[1] in tensors and name not in tensors:
            tensors[name] = tensors[node.input[1]].T.contiguous()  # [out, in]
    named = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    if embedding := next((match for name in named if (match := PATCH_EMBEDDING.fullmatch(name))), None):
        table = f"{embedding[1]}embeddings.position_embeddings"
        width = len(named[embedding[0]])
        anonymous = [t for name, t in tensors.items() if "::" in name and t.ndim == 3]
        halves = sorted((t for t in anonymous if t.shape[::2] == (1, width)), key=lambda half: half.shape[1])
        if table not in named and len(halves) == 2:
            named[table] = torch.cat(halves, dim=1)  # [1, 1 + h w, D]
    return named
