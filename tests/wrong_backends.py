"""Backends that are wrong in one detail each: what the contract suite has to catch. A plugin for pytest.

The backend "wrong" has all ops right but one, which is called with an argument changed, or whose result is changed. It
is held to the contract as any backend from elsewhere is. A detail is caught when a case fails by its assertions; which
were, and how, is written to the file of BIGAIN_CAUGHT. tests/test_wrong_backends.py runs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import backends
from bigain_kernels.declaration import OPS, tables_of
from bigain_kernels.tokens import share_mean

# The right op, called with the arguments of the case and those that are changed by name; the arguments by name.
Wrong = Callable[[Callable[..., Any], Any], Any]
RIGHT = "reference" if backends.get("cpp").missing else "cpp"


def no_nan(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0)


def short(x: Tensor | None) -> Tensor | None:
    """As precise as bfloat16."""
    return None if x is None else x.bfloat16().to(x.dtype)


def dense(x: Tensor) -> Tensor:
    """Read as if it were contiguous."""
    strides = torch.empty(x.shape, device="meta").stride()
    return x.as_strided(x.shape, strides)


def tail(out: Tensor, dim: int = -1) -> Tensor:
    """All but the last written."""
    written, count = torch.empty_like(out), max(out.shape[dim] - 1, 0)
    written.narrow(dim, 0, count).copy_(out.narrow(dim, 0, count))
    return written


def neighbours(a: Any, batch: int) -> dict[str, Tensor]:
    """The tables of a shared plan for neighbours in the batch, where row b has plan row b mod P."""
    names = ("slot", "offsets", "members", "anchor")
    each = batch // max(a.slot.shape[0], 1)
    return {name: getattr(a, name).repeat_interleave(each, 0) for name in names}


def first_row(x: Tensor | None) -> Tensor | None:
    """The values of the first row for all."""
    return None if x is None else x[:1].expand(x.shape)


def rank_first(similarity: Tensor) -> Tensor:
    """A NaN ranked above all numbers."""
    return torch.where(similarity.isnan(), torch.inf, similarity)


def backwards(tables: Any) -> Any:
    """Members of a slot in descending order."""
    slot, offsets, members, anchor = tables
    place = torch.arange(members.shape[1]).expand(members.shape)
    of_place = torch.searchsorted(offsets, place.int().contiguous(), right=True) - 1
    start, stop = offsets.gather(1, of_place), offsets.gather(1, of_place + 1)
    return slot, offsets, members.gather(1, start + stop - 1 - place), anchor


def low_anchor(tables: Any) -> Any:
    """The first member of a slot in the place of the token that the others merged into."""
    slot, offsets, members, _ = tables
    return slot, offsets, members, members.gather(1, offsets[:, :-1].long())


def falling(score: Tensor) -> Tensor:
    """A little smaller from token to token."""
    return score - torch.arange(score.shape[1]) * 1e-6


def nearest_first(right: Callable[..., Any], a: Any) -> list[Tensor]:
    """The nearest token is the first of the window."""
    rows = (torch.arange(a.height // a.sy) * a.sy)[:, None] * a.width
    first = (rows + torch.arange(a.width // a.sx) * a.sx).flatten()
    average, alpha = right(alpha=0.0, row_alpha=None), a.alpha if a.row_alpha is None else a.row_alpha[:, None, None]
    return [(alpha * x[:, first] + (1 - alpha) * y).to(x.dtype) for x, y in zip(a.xs, average, strict=True)]


def last_of_equal(right: Callable[..., Any], a: Any) -> Any:
    """Ties to the highest destination: those of a list that is turned around, in a grid without windows."""
    similarity, match = right()
    unit = torch.nn.functional.normalize(a.x.double(), dim=-1)
    chosen = a.destinations.flip(1).long()
    cosine = unit @ unit.gather(1, chosen[..., None].expand(-1, -1, a.x.shape[2])).transpose(1, 2)
    if a.window >= 0 or not chosen.numel():
        return similarity, match
    return similarity, torch.where(similarity.isfinite(), chosen.gather(1, cosine.max(-1).indices), match).int()


def places(right: Callable[..., Any], a: Any) -> Any:
    similarity, match = right()
    return similarity, torch.searchsorted(a.destinations, match).int()


def similar_to_itself(right: Callable[..., Any], a: Any) -> Any:
    similarity, match = right()
    return similarity.scatter(1, a.destinations.long(), 1.0), match


def gated_residual(right: Callable[..., Any], a: Any) -> Any:
    if a.gate is None or a.residual is None:
        return right()
    return right(residual=a.residual * a.gate[:, None])


def rounded_twice(right: Callable[..., Any], a: Any) -> Any:
    return right() if a.residual is None else (right(residual=None) + a.residual).to(a.y.dtype)


def image_alone(right: Callable[..., Any], a: Any) -> Any:
    k, v = a.k[:, :, : a.image_stop], a.v[:, :, : a.image_stop]
    bias = None if a.key_bias is None else a.key_bias[:, : a.key_bias.shape[1] - a.k.shape[2] + a.image_stop]
    return right(k=k, v=v, key_bias=bias)


def shared_by_neighbours(right: Callable[..., Any], a: Any) -> Any:
    return right(x=a.x.unflatten(0, (-1, a.share)).transpose(0, 1).flatten(0, 1))


def plan_with(a: Any, score: Tensor) -> Any:
    """L-GTM with another score."""
    x, grid, stride = share_mean(a.x, a.share), (a.height, a.width), (a.sy, a.sx)
    destinations = bk.select_destinations(score[: x.shape[0]], grid, stride)
    similarity, match = bk.bipartite_match(x, destinations, None if a.window < 0 else a.window, grid, stride)
    return tables_of(bk.merge_plan(similarity, match, destinations, a.r, grid))


def roughest(right: Callable[..., Any], a: Any) -> Any:
    return plan_with(a, -bk.laplacian_score(share_mean(a.x, a.share), (a.height, a.width)))


def top_left(right: Callable[..., Any], a: Any) -> Any:
    return plan_with(a, torch.zeros(a.x.shape[:2]))


WRONG: dict[str, dict[str, Wrong]] = {
    "laplacian_score": {
        "a NaN is lost": lambda right, a: right(x=no_nan(a.x)),
        "sums in bfloat16": lambda right, a: short(right()),
        "the last token is not written": lambda right, a: tail(right()),
        "strides are ignored": lambda right, a: right(x=dense(a.x)),
        "always the norm l1": lambda right, a: right(norm="l1"),
        "height and width are swapped": lambda right, a: right(height=a.width, width=a.height),
        "frames do not see each other": lambda right, a: right(
            x=a.x.reshape(-1, a.height * a.width, a.x.shape[2]), frames=1
        ).view(a.x.shape[:2]),
        "other last bits in a larger batch": lambda right, a: right() * (1 + 2.0**-23 * (a.x.shape[0] > 1)),
        "other last bits where rows are not aligned": lambda right, a: right() * (1 + 2.0**-23 * (a.x.stride(1) % 4)),
    },
    "select_destinations": {
        "ties go to the last": lambda right, a: right(score=falling(a.score)),
        "the largest score": lambda right, a: right(score=-a.score),
        "a NaN is the smallest": lambda right, a: right(score=torch.where(a.score.isnan(), -torch.inf, a.score)),
        "the last is not written": lambda right, a: tail(right()),
        "strides are ignored": lambda right, a: right(score=dense(a.score)),
        "the tile is turned": lambda right, a: right(sy=a.sx, sx=a.sy),
        "not in order": lambda right, a: right().flip(1),
    },
    "bipartite_match": {
        "a NaN is lost": lambda right, a: right(x=no_nan(a.x)),
        "products in bfloat16": lambda right, a: right(x=short(a.x)),
        "similarities in bfloat16": lambda right, a: (short(right()[0]), right()[1]),
        "the last token is not written": lambda right, a: tuple(map(tail, right())),
        "strides are ignored": lambda right, a: right(x=dense(a.x)),
        "the window is one tile wider": lambda right, a: right(window=a.window + (a.window >= 0)),
        "no window": lambda right, a: right(window=-1),
        "a match is the place in the list": places,
        "a destination is similar to itself": similar_to_itself,
        "the last destination is left out": lambda right, a: right(destinations=a.destinations[:, :-1]),
        "ties go to the highest": last_of_equal,
        "tokens without direction have similarity 0": lambda right, a: (right()[0].clamp(min=-1), right()[1]),
    },
    "merge_plan": {
        "ties go to the highest": lambda right, a: right(similarity=-falling(-a.similarity)),
        "the least similar merge": lambda right, a: right(similarity=-a.similarity),
        "a NaN merges first": lambda right, a: right(similarity=rank_first(a.similarity)),
        "members of a slot are turned": lambda right, a: backwards(right()),
        "an anchor is the first member": lambda right, a: low_anchor(right()),
        "the last offset is not written": lambda right, a: tuple(map(tail, right())),
        "the rows are exchanged": lambda right, a: tuple(table.flip(0) for table in right()),
    },
    "block_merge_plan": {
        "ties go to the last": lambda right, a: right(score=falling(a.score)),
        "the roughest tiles merge": lambda right, a: right(score=-a.score),
        "a NaN is smooth": lambda right, a: right(score=torch.where(a.score.isnan(), -torch.inf, a.score)),
        "always the maximum": lambda right, a: right(reduce="max"),
        "a mean is a sum of squares": lambda right, a: right(score=a.score.square() if a.reduce == "mean" else a.score),
        "strides are ignored": lambda right, a: right(score=dense(a.score)),
        "members of a slot are turned": lambda right, a: backwards(right()),
        "the last slot is not written": lambda right, a: (tail(right()[0]), *right()[1:]),
    },
    "token_merge": {
        "sums in bfloat16": lambda right, a: right(x=short(a.x)),
        "a NaN is lost": lambda right, a: right(x=no_nan(a.x)),
        "weights do nothing": lambda right, a: right(weights=None),
        "weights in bfloat16": lambda right, a: right(weights=short(a.weights)),
        "the plan of a neighbour": lambda right, a: right(**neighbours(a, a.x.shape[0])),
        "the last channel is not written": lambda right, a: tail(right()),
        "the last slot is not written": lambda right, a: tail(right(), 1),
        "strides are ignored": lambda right, a: right(x=dense(a.x)),
        "mlerp is a mean": lambda right, a: right(mode=a.mode.replace("mlerp", "mean")),
        "prune keeps the first member": lambda right, a: right(anchor=a.members.gather(1, a.offsets[:, :-1].long())),
        "other last bits in a larger batch": lambda right, a: right() * (1 + 2.0**-7 * (a.x.shape[0] > 1)),
    },
    "token_merge_norm": {
        "epsilon is that of PyTorch": lambda right, a: right(norm_eps=1e-5),
        "a variance of samples": lambda right, a: right() * (1 - 1 / a.x.shape[2]) ** 0.5,
        "normalized tokens in bfloat16": lambda right, a: short(right()),
        "tokens in bfloat16": lambda right, a: right(x=short(a.x)),
        "a NaN is lost": lambda right, a: right(x=no_nan(a.x)),
        "weights do nothing": lambda right, a: right(weights=None),
        "no bias": lambda right, a: right(norm_bias=a.norm_bias if a.norm_bias is None else 0 * a.norm_bias),
        "scale is the factor": lambda right, a: right(scale=None if a.scale is None else a.scale - 1),
        "the shift of the first row": lambda right, a: right(shift=first_row(a.shift)),
        "the plan of a neighbour": lambda right, a: right(**neighbours(a, a.x.shape[0])),
        "the last channel is not written": lambda right, a: tail(right()),
        "strides are ignored": lambda right, a: right(x=dense(a.x)),
    },
    "token_unmerge": {
        "a NaN is lost": lambda right, a: right(y=no_nan(a.y)),
        "no gate": lambda right, a: right(gate=None),
        "no residual": lambda right, a: right(residual=None),
        "the gate of the first row": lambda right, a: right(gate=first_row(a.gate)),
        "products in bfloat16": lambda right, a: right(gate=short(a.gate)),
        "the plan of a neighbour": lambda right, a: right(**neighbours(a, a.y.shape[0])),
        "the last channel is not written": lambda right, a: tail(right()),
        "the last token is not written": lambda right, a: tail(right(), 1),
        "strides are ignored": lambda right, a: right(y=dense(a.y)),
        "the gate takes the residual as well": gated_residual,
        "rounded before the residual is added": rounded_twice,
    },
    "kv_downsample": {
        "a NaN is lost": lambda right, a: right(xs=list(map(no_nan, a.xs))),
        "alpha is turned": lambda right, a: right(alpha=1 - a.alpha),
        "the alpha of the first row": lambda right, a: right(row_alpha=first_row(a.row_alpha)),
        "alpha in bfloat16": lambda right, a: right(alpha=float(torch.tensor(a.alpha).bfloat16())),
        "the first tensor twice": lambda right, a: right(xs=[a.xs[0]] * len(a.xs)),
        "the window is turned": lambda right, a: right(sy=a.sx, sx=a.sy),
        "nearest is the first of the window": nearest_first,
        "sums in bfloat16": lambda right, a: list(map(short, right())),
        "the last channel is not written": lambda right, a: list(map(tail, right())),
        "strides are ignored": lambda right, a: right(xs=list(map(dense, a.xs))),
    },
    "kv_downsample_attention": {
        "no scale": lambda right, a: right(scale=None),
        "no bias": lambda right, a: right(key_bias=None),
        "the bias of the first row": lambda right, a: right(key_bias=None if a.key_bias is None else a.key_bias[:1]),
        "alpha is turned": lambda right, a: right(alpha=1 - a.alpha),
        "the alpha of the first row": lambda right, a: right(row_alpha=first_row(a.row_alpha)),
        "values are not pooled as keys are": lambda right, a: right(v=short(a.v)),
        "keys in bfloat16": lambda right, a: right(k=short(a.k)),
        "text behind the image is not seen": image_alone,
        "the last query is not written": lambda right, a: tail(right(), 2),
        "strides are ignored": lambda right, a: right(k=dense(a.k)),
        "heads are not joined": lambda right, a: right().contiguous(),
    },
    "pooled_kv_projection": {
        "alpha is turned": lambda right, a: right(alpha=1 - a.alpha),
        "the alpha of the first row": lambda right, a: right(row_alpha=first_row(a.row_alpha)),
        "no bias of keys": lambda right, a: right(b_k=None),
        "no bias of values": lambda right, a: right(b_v=None),
        "keys and values are exchanged": lambda right, a: right()[::-1],
        "weights in bfloat16": lambda right, a: right(w_v=short(a.w_v)),
        "a NaN is lost": lambda right, a: right(x=no_nan(a.x)),
        "the last channel is not written": lambda right, a: tuple(map(tail, right())),
        "strides are ignored": lambda right, a: right(x=dense(a.x)),
    },
    "lgtm_plan": {
        "no window": lambda right, a: right(window=-1),
        "the plan of the first row that shares": lambda right, a: right(x=a.x[: a.x.shape[0] // a.share], share=1),
        "shared by neighbours": shared_by_neighbours,
        "tokens in bfloat16": lambda right, a: right(x=short(a.x)),
        "a NaN is lost": lambda right, a: right(x=no_nan(a.x)),
        "an anchor is the first member": lambda right, a: low_anchor(right()),
        "the roughest token of a tile": roughest,
        "a destination by position": top_left,
        "the last slot is not written": lambda right, a: (tail(right()[0]), *right()[1:]),
        "strides are ignored": lambda right, a: right(x=dense(a.x)),
    },
}


class _Wrong:
    """The backend: right but for the op and the detail at hand."""

    def __init__(self) -> None:
        self.op, self.wrong = "", WRONG["token_merge"]["a NaN is lost"]

    def implement(self, op: str) -> backends.Implementation:
        names, packet = OPS[op].flat_names, getattr(torch.ops.bigain, op)

        def run(*args: Any) -> Any:
            given = dict(zip(names, args, strict=True))
            with bk.use_backend(RIGHT):
                if op != self.op:
                    return packet(*args)
                return self.wrong(lambda **changed: packet(*(given | changed).values()), SimpleNamespace(**given))

        return run

    def refuses(self, op: str, args: tuple[Any, ...]) -> str:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        return "two dtypes are enough" if first.dtype == torch.float16 else ""


_wrong = _Wrong()


def pytest_configure() -> None:
    backends.register(
        backends.Backend("wrong", _wrong.implement, devices=("cpu",), priority=-1, refuses=_wrong.refuses)
    )


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Runs the cases of an op with one detail after another, each until a case fails."""
    caught: dict[str, str] = {}
    failures: list[str] = []

    class Failures:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Any:
            if call.excinfo is not None:
                failures.append(call.excinfo.typename)
            return (yield)

    session.config.pluginmanager.register(Failures())
    for op, details in WRONG.items():
        _wrong.op = op
        items = [item for item in session.items if op == item.module.OP]
        for detail, _wrong.wrong in details.items():
            failures.clear()
            for item in items:
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if failures:
                    caught[f"{op}: {detail}"] = failures[0]
                    # What caught one detail goes first: it may well catch the next.
                    items.remove(item)
                    items.insert(0, item)
                    break
    Path(os.environ["BIGAIN_CAUGHT"]).write_text(json.dumps(caught))
    return True
