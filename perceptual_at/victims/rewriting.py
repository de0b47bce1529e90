"""Graphs rewritten to cost less: values written over where nobody else reads them, the layout that each layer likes."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SUMS = {operator.add, operator.iadd, torch.add}
_ACTIVATIONS = {torch.relu, functional.relu}


_MANY_WEIGHTS, _FEW_PLACES = 2**19, 64  # where oneDNN's float32 kernels for channels_last lose, by 20 to 100 %


def write_in_place(graph: fx.GraphModule) -> None:
    """Let each ReLU and each sum write over its input where only it reads that, forward and backward.

    A value may be written over if it was computed for this node alone, by an operation whose result is its own memory
    and is not kept for the backward pass: convolutions, linear layers and batch norms keep their inputs, sums nothing.
    Shapes must be known, as `ShapeProp` notes them.
    """
    for node in graph.graph.nodes:
        if _is_relu(node, graph) and _is_free(node.args[0], node, graph):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (node.args[0],), {}
        elif _is_sum(node):
            left, right = node.args
            if not _is_free(left, node, graph):
                left, right = right, left
            if _is_free(left, node, graph):
                node.op, node.target, node.args = "call_method", "add_", (left, right)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _is_relu(node: fx.Node, graph: fx.GraphModule) -> bool:
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or any(node.kwargs.values()):
        return False
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    return (node.op == "call_function" and node.target in _ACTIVATIONS) or (
        node.op == "call_method" and node.target == "relu"
    )


def _is_sum(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _SUMS and len(node.args) == 2 and not node.kwargs


def _is_free(value: Any, node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a value of the same form as the node's belongs to it alone."""
    if not isinstance(value, fx.Node) or len(value.users) > 1 or value.users.get(node, 0) is not None:
        return False
    if _form(value) is None or _form(value) != _form(node):
        return False
    if value.op == "call_module":
        layer = graph.get_submodule(str(value.target))
        return type(layer) in _LAYERS or isinstance(layer, _BatchNorm)
    return _is_sum(value) or (value.op == "call_method" and value.target == "add_")


def _form(node: fx.Node) -> Any:
    """Shape and dtype; None where they are not known."""
    meta = node.meta.get("tensor_meta")
    return None if meta is None or not hasattr(meta, "shape") else (tuple(meta.shape), meta.dtype)


def late_layers(graph: fx.GraphModule) -> list[str]:
    """Convolutions that a CPU runs faster on contiguous images than on channels_last ones; gives their names.

    Those are the first with many weights and few places, as in the last stage of a residual network, and all that come
    after it. Their inputs are made contiguous in the graph.
    """
    late: list[str] = []
    for node in list(graph.graph.nodes):
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        form = _form(node)
        if type(layer) is not nn.Conv2d or form is None or not isinstance(node.args[0], fx.Node):
            continue
        if late or (layer.weight.numel() >= _MANY_WEIGHTS and form[0][-2] * form[0][-1] <= _FEW_PLACES):
            with graph.graph.inserting_before(node):
                node.replace_input_with(node.args[0], graph.graph.call_method("contiguous", (node.args[0],)))
            late.append(str(node.target))
    graph.recompile()
    return late
