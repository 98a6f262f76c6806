"""Compressed layers of joint attention (Flux, Qwen, SD 3) written out by hand, and the calls of a model."""

from __future__ import annotations

import torch
from torch import nn

from bigain_kernels import reference

from .models import run


def attentions(model) -> dict[str, nn.Module]:
    return {
        name.removesuffix(".processor"): model.get_submodule(name.removesuffix(".processor"))
        for name in model.attn_processors
    }


def recorded(model, inputs) -> list[tuple[nn.Module, dict, object]]:
    """(attention, its arguments, its result) of every call in a forward pass."""
    calls, handles = [], []
    for attn in attentions(model).values():
        handles.append(
            attn.register_forward_hook(lambda m, args, kwargs, out: calls.append((m, kwargs, out)), with_kwargs=True)
        )
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return calls


def _rms(norm, x):
    """RMSNorm by its definition."""
    if norm is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _rotate(x, rotation):
    """(B, T, heads, d): pairs of channels as complex numbers, turned."""
    if rotation is None:
        return x
    cos, sin = rotation
    turn = torch.complex(cos[:, 0::2], sin[:, 0::2])[None, :, None]
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * turn
    return torch.view_as_real(turned).flatten(-2)


def _pool(x, grid, config, alpha):
    """(B, N, ...) pooled over its tokens."""
    shape = x.shape
    pooled = reference.kv_downsample(x.flatten(2), grid, config.factor, alpha)
    return pooled.reshape(shape[0], -1, *shape[2:])


def _nearest(grid, factor):
    """Index of the nearest token of each window, by the rule floor((i + 0.5) * H / (H // s))."""
    rows, columns = ([int((i + 0.5) * n / (n // s)) for i in range(n // s)] for n, s in zip(grid, factor, strict=True))
    return torch.tensor([row * grid[1] + column for row in rows for column in columns])


def _heads(attn, x):
    return x.unflatten(-1, (attn.heads, -1))


def _with_text(attn, states, text, text_first):
    """Queries, keys and values of the image, `states`, together with those of the text."""
    added = (
        _rms(attn.norm_added_q, _heads(attn, attn.add_q_proj(text))),
        _rms(attn.norm_added_k, _heads(attn, attn.add_k_proj(text))),
        _heads(attn, attn.add_v_proj(text)),
    )
    return (torch.cat([b, a] if text_first else [a, b], dim=1) for a, b in zip(states, added, strict=True))


def _rotation(call):
    rotation = call.get("image_rotary_emb")
    if rotation is not None and rotation[0].is_complex():  # Qwen-Image gives image and text apart
        turns = torch.cat(rotation[::-1])
        return turns.real.repeat_interleave(2, 1), turns.imag.repeat_interleave(2, 1)
    return rotation


def pooled_layer(attn, call, grid, window, config, alpha):
    """What an attention layer should return, from its definition, one explicit softmax.

    `window` is where the image stands in the joint sequence; Flux puts the text first, Stable Diffusion 3 behind.
    """
    x, text, rotation = call["hidden_states"], call.get("encoder_hidden_states"), _rotation(call)
    start, stop = window
    hidden = config.pool == "hidden"
    inside = (start, stop) if text is None or start == 0 else (0, stop - start)

    def keys(layer, norm):
        states = layer(x)
        if hidden:
            pooled = _pool(x[:, inside[0] : inside[1]], grid, config, alpha)
            states = layer(torch.cat([x[:, : inside[0]], pooled, x[:, inside[1] :]], dim=1))
        return _rms(norm, _heads(attn, states))

    query = _rms(attn.norm_q, _heads(attn, attn.to_q(x)))
    key, value = keys(attn.to_k, attn.norm_k), keys(attn.to_v, None)
    if text is not None:
        query, key, value = _with_text(attn, (query, key, value), text, start > 0)
    turns = rotation
    if hidden and rotation is not None:
        index = _nearest(grid, config.factor) + start
        rows = torch.cat([torch.arange(start), index, torch.arange(stop, rotation[0].shape[0])])
        turns = (rotation[0][rows], rotation[1][rows])
    query, key = _rotate(query, rotation), _rotate(key, turns)
    if not hidden:
        key, value = (
            torch.cat([y[:, :start], _pool(y[:, start:stop], grid, config, alpha), y[:, stop:]], dim=1)
            for y in (key, value)
        )
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if call.get("encoder_hidden_states_mask") is not None:
        padding = ~call["encoder_hidden_states_mask"]
        scores[..., : text.shape[1]].masked_fill_(padding[:, None, None], -torch.inf)
    y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
    out = (lambda z: attn.to_out[0](z)) if getattr(attn, "to_out", None) is not None else (lambda z: z)
    if text is None:
        return out(y)
    words = y[:, : text.shape[1]] if start else y[:, x.shape[1] :]
    image = y[:, text.shape[1] :] if start else y[:, : x.shape[1]]
    return out(image), words if attn.context_pre_only else attn.to_add_out(words)


def merged_layer(attn, call, grid, window, config):
    """As `pooled_layer`, of hidden states of the image that are merged before the projections, row by row."""
    x, text, rotation = call["hidden_states"], call.get("encoder_hidden_states"), _rotation(call)
    start, stop = window
    count = 0 if text is None else text.shape[1]
    inside = (start, stop) if text is None or start == 0 else (start - count, stop - count)
    plan = config.plan(x[:, inside[0] : inside[1]], grid, config.ratio)
    images, texts = [], []
    for row in range(x.shape[0]):
        one = plan.slot[row % plan.num_rows].long()
        sizes = torch.bincount(one, minlength=plan.num_slots).float()
        image = torch.zeros(plan.num_slots, x.shape[2]).index_add_(0, one, x[row, inside[0] : inside[1]])
        hidden = torch.cat([x[row, : inside[0]], image / sizes[:, None], x[row, inside[1] :]])[None]
        query, key, value = (
            _rms(attn.norm_q, _heads(attn, attn.to_q(hidden))),
            _rms(attn.norm_k, _heads(attn, attn.to_k(hidden))),
            _heads(attn, attn.to_v(hidden)),
        )
        if text is not None:
            query, key, value = _with_text(attn, (query, key, value), text[row : row + 1], start > 0)
        if rotation is not None:
            anchors = plan.anchor[row % plan.num_rows].long() + start
            rows = torch.cat([torch.arange(start), anchors, torch.arange(stop, rotation[0].shape[0])])
            query, key = (_rotate(y, (rotation[0][rows], rotation[1][rows])) for y in (query, key))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        if config.proportional:
            scores[..., start : start + plan.num_slots] += sizes.log()
        if call.get("encoder_hidden_states_mask") is not None:
            padding = ~call["encoder_hidden_states_mask"][row].bool()
            scores[..., :count].masked_fill_(padding, -torch.inf)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        image = y[:, start : start + plan.num_slots][:, one]
        if text is None:
            y = torch.cat([y[:, :start], image, y[:, start + plan.num_slots :]], dim=1)
            images.append(y if getattr(attn, "to_out", None) is None else attn.to_out[0](y))
            continue
        images.append(attn.to_out[0](image))
        words = y[:, :count] if start else y[:, plan.num_slots :]
        texts.append(words if attn.context_pre_only else attn.to_add_out(words))
    return torch.cat(images) if text is None else (torch.cat(images), torch.cat(texts))
