"""A pass for torch.compile that fuses what stands around our ops in a model's graph.

    torch.compile(model, options=compile_options())
    model.compile_repeated_blocks(options=compile_options())

LayerNorm, with the scale and shift of adaLN where they follow, goes into the merge behind it, and the gate and the
residual behind an unmerge go into the unmerge: the normalized tokens and the unmerged ones never reach memory. A result
that anything else uses has to be in memory anyway, so it stays as it is: in a DiT that plans on the modulated tokens,
the norm. Graphs without our ops are not touched, and eager code is what it was. Inductor's documented hook for such a
pass is `post_grad_custom_pre_pass`; nothing is switched on by importing this module. docs/performance.md has the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import ops as _ops  # noqa: F401 - defines the namespace
from .declaration import PUBLIC

_aten, _bigain = torch.ops.aten, PUBLIC
# Calls that leave the values of a tensor as they are, but for a rounding between dtypes.
_SAME_VALUES = (torch.ops.prims.convert_element_type.default, _aten.alias.default)


class _Norm(NamedTuple):
    """A LayerNorm found in a graph: the arguments of `token_merge_norm` behind the plan and the weights."""

    x: fx.Node
    eps: float
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    scale: fx.Node | None = None
    shift: fx.Node | None = None


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _has_shape(node: Any, shape: tuple[Any, ...]) -> bool:
    """Whether a node is known to be a tensor of this shape, without a guard on symbolic sizes."""
    value = _value(node)
    if value is None or value.dim() != len(shape):
        return False
    return all(statically_known_true(a == b) for a, b in zip(value.shape, shape, strict=True))


def _unconverted(node: Any) -> Any:
    """What a chain of conversions between dtypes starts from."""
    while isinstance(node, fx.Node) and node.target in _SAME_VALUES:
        node = node.args[0]
    return node


def _operands(node: Any, target: Any) -> Iterator[tuple[Any, Any]]:
    """The operands of a sum or product in both orders; nothing where the node is no such call."""
    if isinstance(node, fx.Node) and node.target == target and not node.kwargs:
        first, second = node.args
        yield _unconverted(first), _unconverted(second)
        yield _unconverted(second), _unconverted(first)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _normalized(node: Any) -> _Norm | None:
    """(x - mean) * rsqrt(variance + eps) over the channels of (B, N, C), as Inductor writes it."""
    for deviation, inverse in _operands(node, _aten.mul.Tensor):
        if getattr(deviation, "target", None) != _aten.sub.Tensor or getattr(inverse, "target", None) != (
            _aten.rsqrt.default
        ):
            continue
        x, mean = deviation.args
        for variance, eps in _operands(inverse.args[0], _aten.add.Tensor):
            if not isinstance(eps, float) or not isinstance(variance, fx.Node) or not isinstance(mean, fx.Node):
                continue
            statistics = mean.args[0]
            if variance.args != (statistics, 0) or mean.args != (statistics, 1):
                continue
            assert isinstance(statistics, fx.Node)
            if statistics.target != _aten.var_mean.correction or statistics.args[0] != x:
                continue
            axes = statistics.args[1]
            last = isinstance(axes, (list, tuple)) and list(axes) in ([2], [-1])
            if last and statistics.kwargs == {"correction": 0, "keepdim": True}:
                return _Norm(_unconverted(x), eps)
    return None


def _affine(node: Any, channels: Any) -> _Norm | None:
    """A norm, or a norm times a weight (C,) plus a bias (C,)."""
    for product, bias in _operands(node, _aten.add.Tensor):
        for normalized, weight in _operands(product, _aten.mul.Tensor):
            if _has_shape(bias, (channels,)) and _has_shape(weight, (channels,)):
                norm = _normalized(normalized)
                if norm is not None:
                    return norm._replace(weight=weight, bias=bias)
    return _normalized(node)


def _modulated(node: Any, batch: Any, channels: Any) -> _Norm | None:
    """A norm, or a norm times (1 + scale) plus shift, both (B, 1, C)."""
    row = (batch, 1, channels)
    for product, shift in _operands(node, _aten.add.Tensor):
        for inner, factor in _operands(product, _aten.mul.Tensor):
            for scale, one in _operands(factor, _aten.add.Tensor):
                if one == 1 and _has_shape(scale, row) and _has_shape(shift, row):
                    norm = _affine(inner, channels)
                    if norm is not None:
                        return norm._replace(scale=scale, shift=shift)
    return _affine(node, channels)


def _per_row(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    """(B, 1, C) as (B, C)."""
    if node is None:
        return None
    if node.target == _aten.unsqueeze.default and node.args[1] in (1, -2):
        return node.args[0]  # type: ignore[return-value]
    row = graph.call_function(_aten.squeeze.dim, (node, 1))
    value = _value(node)
    row.meta["val"] = None if value is None else value.squeeze(1)
    return row


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node, like: fx.Node) -> None:
    """`new` in the place of `old`; its result has shape, dtype and strides of `like`."""
    new.meta["val"] = like.meta["val"]
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _fuse_norm(graph: fx.Graph, merge: fx.Node) -> bool:
    """Put the norm in front of a merge into it, where nothing else uses the normalized tokens; whether it was done."""
    tokens, *tables, mode, weights = merge.args
    value = _value(tokens)
    if mode != "mean" or value is None:
        return False
    node: Any = tokens
    while isinstance(node, fx.Node) and _only_user(node) is not None and node.target in _SAME_VALUES:
        node = node.args[0]
    if _only_user(node) is None:
        return False
    norm = _modulated(node, value.shape[0], value.shape[2])
    if norm is None or not _has_shape(norm.x, tuple(value.shape)):
        return False
    x = _value(norm.x)
    # The op returns the dtype of the tokens. Where the norm reads tokens whose channels lie apart through a copy, that
    # copy would have to be in memory in the place of the norm.
    if x is None or x.dtype != value.dtype or norm.x.target == _aten.clone.default:
        return False
    with graph.inserting_before(merge):
        scale, shift = _per_row(graph, norm.scale), _per_row(graph, norm.shift)
        args = (norm.x, *tables, weights, norm.eps, norm.weight, norm.bias, scale, shift)
        fused = graph.call_function(_bigain.token_merge_norm.default, args)
    _replace(graph, merge, fused, merge)
    return True


def _fuse_residual(graph: fx.Graph, unmerge: fx.Node) -> bool:
    """Put the residual behind an unmerge into it, with a gate between them, where nothing else uses what it makes."""
    y, *tables, residual, gate = unmerge.args
    value, node = _value(unmerge), _only_user(unmerge)
    if residual is not None or gate is not None or value is None or node is None:
        return False
    row, before = (value.shape[0], 1, value.shape[2]), unmerge
    for tokens, factor in _operands(node, _aten.mul.Tensor):
        if tokens is unmerge and _has_shape(factor, row):
            gate, before = factor, node
    total = _only_user(before)
    for tokens, other in _operands(total, _aten.add.Tensor):
        if tokens is not before or not _has_shape(other, tuple(value.shape)) or total is None:
            continue
        sum_value, residual_value = _value(total), _value(other)
        assert sum_value is not None
        assert residual_value is not None
        same = sum_value.dtype == value.dtype == residual_value.dtype
        strides = zip(sum_value.stride(), value.stride(), strict=True)
        if not same or not all(statically_known_true(a == b) for a, b in strides):
            return False
        if not statically_known_true(residual_value.stride(2) == 1):
            return False
        with graph.inserting_before(total):
            args = (y, *tables, other, _per_row(graph, gate))
            fused = graph.call_function(_bigain.token_unmerge.default, args)
        _replace(graph, total, fused, unmerge)
        return True
    return False


class FuseAroundMerges(CustomGraphPass):
    """The pass; see the module. It changes the graph that it is given."""

    def __call__(self, graph: fx.Graph) -> None:
        unmerges = graph.find_nodes(op="call_function", target=_bigain.token_unmerge.default)
        merges = graph.find_nodes(op="call_function", target=_bigain.token_merge.default)
        fused = [_fuse_residual(graph, node) for node in unmerges] + [_fuse_norm(graph, node) for node in merges]
        if any(fused):
            graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        """What Inductor's cache of compiled graphs tells this pass by: its source."""
        return get_hash_for_files((__file__,))


def compile_options(**options: Any) -> dict[str, Any]:
    """`options` for torch.compile with the pass in them.

    torch.compile takes options or a mode; for both, give `**torch._inductor.list_mode_options(mode)`.

    Args:
        options: further options of Inductor.

    Raises:
        ValueError: the options hold a pass of their own.
    """
    if options.get("post_grad_custom_pre_pass") is not None:
        raise ValueError("post_grad_custom_pre_pass: got a pass, expected none; call FuseAroundMerges() from your pass")
    return {**options, "post_grad_custom_pre_pass": FuseAroundMerges()}
