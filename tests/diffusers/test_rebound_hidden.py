"""Merged hidden states in families whose processors are rebound, against attention written out in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from bigain_kernels import reference
from bigain_kernels.diffusers import LGTMConfig, SiToConfig, ToMeConfig, apply_token_compression, token_compression

from .family_inputs import TEXT
from .family_models import build, case_of, outputs

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
NAMES = ["wan", "flux2", "flux_controlnet", "chroma", "hunyuan_video"]
CONFIGS = [
    LGTMConfig(merge="hidden"),
    LGTMConfig(merge="hidden", ratio=0.7, proportional=True, share_plan=2),
    LGTMConfig(merge="hidden", ratio=0.6, proportional=True, window=(1, 1), over_time=True),
    ToMeConfig(merge="hidden", mode="mlerp", destinations="first"),
]


def turned(x, angles_cos, angles_sin):
    """(B, T, heads, d) by (B, T, d), pair by pair."""
    out = torch.empty_like(x)
    cos, sin = angles_cos[:, :, None, 0::2], angles_sin[:, :, None, 1::2]
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


class Merged:
    """The plan of a call, and what follows from it: image tokens `start` to `stop` of all, `frames` grids."""

    def __init__(self, config, x, grid, start):
        self.config, self.start, self.count = config, start, grid[0] * grid[1] * grid[2]
        together = config.spans_frames and grid[0] > 1
        self.frames, planned = (1, grid) if together else (grid[0], grid[1:])
        image = x.reshape(x.shape[0] * self.frames, -1, x.shape[2])
        self.plan = config.plan(image, planned, config.ratio)
        rows = x.shape[0] * self.frames // self.plan.num_rows
        anchors = self.plan.anchor.long().repeat(rows, 1).reshape(x.shape[0], self.frames, -1)
        first = torch.arange(self.frames)[:, None] * grid[1] * grid[2]
        self.anchors = (anchors + first + start).flatten(1)
        self.sizes = self.plan.sizes().repeat(rows, 1).reshape(x.shape[0], -1)

    def down(self, x):
        rows = x.reshape(x.shape[0] * self.frames, -1, x.shape[2])
        return reference.token_merge(rows, self.plan, self.config.mode).reshape(x.shape[0], -1, x.shape[2])

    def up(self, x):
        rows = x.reshape(x.shape[0] * self.frames, -1, x.shape[2])
        return reference.token_unmerge(rows, self.plan).reshape(x.shape[0], self.count, x.shape[2])

    def left(self, table):
        """(T, d) of the tokens that are left: text, anchors, what stands behind."""
        rows = self.anchors.shape[0]
        before = table[: self.start].expand(rows, -1, -1)
        after = table[self.start + self.count :].expand(rows, -1, -1)
        return torch.cat([before, table[self.anchors], after], dim=1)

    def masked(self, mask):
        """(B, 1, 1 or tokens, tokens) of the tokens that are left, to be added."""
        rows, total = self.anchors.shape[0], mask.shape[-1]
        before, after = torch.arange(self.start), torch.arange(self.start + self.count, total)
        left = torch.cat([before.expand(rows, -1), self.anchors, after.expand(rows, -1)], dim=1)
        parts = [each[..., columns] for each, columns in zip(mask, left, strict=True)]
        if mask.shape[-2] != 1:
            parts = [each[:, columns] for each, columns in zip(parts, left, strict=True)]
        mask = torch.stack(parts)
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask

    def attend(self, query, key, value, mask=None):
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + self.masked(mask)
        if self.config.proportional:
            behind = key.shape[1] - self.start - self.sizes.shape[1]
            scores = scores + nn.functional.pad(self.sizes.float().log(), (self.start, behind))[:, None, None]
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def _wan(config, grid):
    def processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        merged = Merged(config, hidden_states, grid, 0)
        x = merged.down(hidden_states)
        states = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in states)
        tables = [merged.left(table[0, :, 0]) for table in rotary_emb]
        out = merged.attend(turned(query, *tables), turned(key, *tables), value)
        return merged.up(attn.to_out[0](out))

    return processor


def _flux(config, grid):
    def processor(attn, hidden_states, encoder_hidden_states=None, image_rotary_emb=None, attention_mask=None):
        text = encoder_hidden_states
        front = 0 if text is not None else TEXT
        count = grid[1] * grid[2]
        image = hidden_states[:, front : front + count]
        merged = Merged(config, image, grid, TEXT)
        x = torch.cat([hidden_states[:, :front], merged.down(image), hidden_states[:, front + count :]], dim=1)
        fused = hasattr(attn, "to_qkv_mlp_proj")  # with the MLP of its block
        if fused:
            inside = attn.to_qkv_mlp_proj(x)
            inner = 3 * attn.inner_dim
            query, key, value = inside[..., :inner].chunk(3, -1)
            mlp = inside[..., inner:]
        else:
            query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        query, key, value = (each.unflatten(-1, (attn.heads, -1)) for each in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if text is not None:
            words = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
            q, k, v = (each.unflatten(-1, (attn.heads, -1)) for each in words)
            query = torch.cat([attn.norm_added_q(q), query], 1)
            key, value = torch.cat([attn.norm_added_k(k), key], 1), torch.cat([v, value], 1)
        tables = [merged.left(table) for table in image_rotary_emb]
        out = merged.attend(turned(query, *tables), turned(key, *tables), value, attention_mask)
        slots = merged.anchors.shape[1]

        def whole(y, front):
            parts = y[:, :front], merged.up(y[:, front : front + slots]), y[:, front + slots :]
            return torch.cat(parts, dim=1)

        if text is None and not fused:
            return whole(out, TEXT)
        if text is None:
            return whole(attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], dim=-1)), TEXT)
        return whole(attn.to_out[0](out[:, TEXT:]), 0), attn.to_add_out(out[:, :TEXT])

    return processor


def _hunyuan_video(config, grid):
    def processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        merged = Merged(config, hidden_states, grid, 0)
        tables = [merged.left(table) for table in image_rotary_emb]
        two_streams = attn.add_q_proj is not None

        def states(x, *layers):
            query, key, value, norm_q, norm_k = layers
            query, key, value = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (query, key, value))
            return norm_q(query), norm_k(key), value

        own = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        query, key, value = states(merged.down(hidden_states), *own)
        words = states(encoder_hidden_states, *(added if two_streams else own))
        image = turned(query, *tables), turned(key, *tables), value
        joined = (torch.cat(pair, dim=1) for pair in zip(image, words, strict=True))
        out = merged.attend(*joined, attention_mask)
        slots = merged.anchors.shape[1]
        image, text = merged.up(out[:, :slots]), out[:, slots:]
        return (attn.to_out[0](image), attn.to_add_out(text)) if two_streams else (image, text)

    return processor


def expected(name, config, grid, inputs):
    model = build(name)
    with token_compression(model, config) as report:
        layers = [row.name for row in report.patched]
    for layer in layers:
        make = {"wan": _wan, "hunyuan_video": _hunyuan_video}.get(name, _flux)
        attn, processor = model.get_submodule(layer), make(config, grid)
        if name == "wan":
            attn.forward = lambda *args, attn=attn, processor=processor, **kwargs: processor(attn, *args, **kwargs)
        else:
            attn.forward = lambda attn=attn, processor=processor, **kwargs: processor(attn, **kwargs)
    return outputs(model, inputs)


def given(name, batch, size, references=0):
    inputs = case_of(name).inputs(batch, (case_of(name).frames, *size))
    if references:
        extra = torch.randn(batch, references, 4, generator=torch.Generator().manual_seed(9))
        ids = inputs["img_ids"][:, :references] + torch.tensor([10.0, 0, 0, 0])
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"], extra], dim=1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], ids], dim=1)
    return inputs


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.ratio}")
@pytest.mark.parametrize("name", NAMES)
def test_merged_hidden_states_of_rebound_families_equal_attention_written_out(name, config):
    model = build(name)
    for batch, size in ((2, (6, 8)), (2, (5, 7)), (1, (6, 6))):
        if config.share_plan == 2 and batch == 1:
            continue
        grid = (case_of(name).frames, *size)
        inputs = given(name, batch, size)
        wanted = expected(name, config, grid, inputs)
        with token_compression(model, config):
            found = outputs(model, inputs)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert (wanted - outputs(model, inputs)).abs().max() > 1e-4


def test_tokens_of_reference_pictures_behind_the_image_stay_whole():
    config, model, inputs = CONFIGS[1], build("flux2"), given("flux2", 2, (6, 8), references=5)
    wanted = expected("flux2", config, (1, 6, 8), inputs)
    apply_token_compression(model, config)
    torch.testing.assert_close(outputs(model, inputs), wanted, **CLOSE)


class ByTorch:
    """The attention of a single-stream block of Flux by PyTorch's own function."""

    def __call__(self, attn, hidden_states, text=None, attention_mask=None, image_rotary_emb=None):
        states = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = states
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def test_processors_that_attend_by_pytorch_are_turned_too():
    found, inputs = [], case_of("flux_controlnet").inputs(2, (1, 6, 8))
    for theirs in (False, True):
        model = build("flux_controlnet")
        if theirs:
            for block in model.single_transformer_blocks:
                block.attn.set_processor(ByTorch())
        apply_token_compression(model, LGTMConfig(merge="hidden", blocks=(2,)))
        with torch.no_grad():
            found.append(model(**inputs, return_dict=False)[1][0])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_merge_is_the_unpatched_model(name):
    model = build(name)
    for batch in (1, 2):
        inputs = given(name, batch, (6, 8))
        plain = outputs(model, inputs)
        for config in (LGTMConfig(merge="hidden", ratio=0.0), SiToConfig(end=0.0), LGTMConfig(min_tokens=1000)):
            with token_compression(model, config):
                assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_one_graph_compiles(name):
    torch._dynamo.reset()
    model, inputs = build(name), given(name, 2, (6, 6))

    class Decided(LGTMConfig):
        def plan(self, x, grid, ratio, timestep=None):
            noise = torch.randn(x.shape[0], x.shape[1], 8, generator=torch.Generator().manual_seed(1))
            return super().plan(noise, grid, ratio, timestep)

    with token_compression(model, Decided(proportional=True)):
        wanted = outputs(model, inputs)
        halves = build(name).bfloat16()
    with token_compression(halves, Decided(proportional=True)):
        floats = {key for key, value in inputs.items() if value.is_floating_point() and "ids" not in key}
        narrow = {key: value.bfloat16() if key in floats else value for key, value in inputs.items()}
        found = outputs(halves, narrow)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().mean() < 0.04 * wanted.abs().mean()
    apply_token_compression(model, LGTMConfig(proportional=True, modules=("attn1", "ff")))
    wanted = outputs(model, inputs)
    if name not in ("wan", "hunyuan_video"):
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    found = outputs(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)
