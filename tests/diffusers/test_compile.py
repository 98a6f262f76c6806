"""torch.compile of the repeated blocks: the same numbers, and as many graphs as the model has without compression."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
)

from .models import (
    dit_inputs,
    flux_inputs,
    qwen_inputs,
    run,
    sd3_inputs,
    tiny_dit,
    tiny_flux,
    tiny_qwen,
    tiny_sd3,
    tiny_unet,
    unet_inputs,
)

pytestmark = pytest.mark.slow

# The second makes sizes dynamic; the third, odd one must not be new to the graphs.
SIZES = ((16, 16), (12, 20), (18, 18))


class Graphs:
    """A torch.compile backend that counts the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module, example_inputs):
        self.count += 1
        return module.forward


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _unet_graphs(config, sizes=SIZES):
    model, graphs = tiny_unet(), Graphs()
    if config is not None:
        apply_token_compression(model, config)
    calls = [unet_inputs(size=size, timestep=torch.tensor(900 - 100 * i)) for i, size in enumerate(sizes)]
    eager = [run(model, inputs) for inputs in calls]
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    for inputs, wanted in zip(calls, eager, strict=True):
        torch.testing.assert_close(run(model, inputs), wanted, atol=1e-6, rtol=1e-6)
    return graphs.count


def test_unet_blocks_compile_to_no_more_graphs_than_one_set_more():
    plain = _unet_graphs(None)
    for config in (
        LGTMConfig(max_downsample=2, modules=("attn1", "attn2")),
        ToMeConfig(share_plan=2),
        LGTMConfig(max_downsample=2, proportional=True),
        IEKVDConfig(max_downsample=2, alpha=(0.8, 1.2)),
    ):
        torch._dynamo.reset()
        assert _unet_graphs(config) == plain, config
    # The block that plans and the blocks that use its plan; the ratio of each call.
    for config in (LGTMConfig(max_downsample=2, cached_assignment=True), LGTMConfig(ratio=(0.3, 0.7))):
        torch._dynamo.reset()
        assert _unet_graphs(config) <= 2 * plain, config


def test_dit_blocks_compile_to_as_many_graphs_as_without_compression():
    counts = []
    for config in (None, ToMeConfig(), ToMeConfig(proportional=True, share_plan=2), IEKVDConfig(alpha=(0.8, 1.2))):
        torch._dynamo.reset()
        model, graphs = tiny_dit(), Graphs()
        if config is not None:
            apply_token_compression(model, config)
        eager = run(model, dit_inputs())
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=graphs)
        torch.testing.assert_close(run(model, dit_inputs()), eager, atol=1e-6, rtol=1e-6)
        counts.append(graphs.count)
    assert counts[0] < 4  # blocks share graphs
    assert counts[1:] == counts[:1] * 3


@pytest.mark.parametrize(
    ("build", "inputs"), [(tiny_flux, flux_inputs), (tiny_sd3, sd3_inputs), (tiny_qwen, qwen_inputs)]
)
def test_joint_blocks_compile_to_as_many_graphs_as_without_compression(build, inputs):
    counts = []
    pooled = (IEKVDConfig(alpha=(0.8, 1.2)), IEKVDConfig(pool="hidden"))
    for config in (None, *pooled, LGTMConfig(proportional=True)):
        torch._dynamo.reset()
        model, graphs = build(), Graphs()
        if config is not None:
            apply_token_compression(model, config)
        calls = [inputs(size=size) for size in ((8, 8), (12, 20), (10, 6))]
        eager = [run(model, call) for call in calls]
        blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
        for block in blocks:
            block.compile(fullgraph=True, backend=graphs)
        for call, wanted in zip(calls, eager, strict=True):
            torch.testing.assert_close(run(model, call), wanted, atol=1e-5, rtol=1e-5)
        counts.append(graphs.count)
    assert counts[1:] == counts[:1] * 3


@pytest.mark.parametrize("pool", ["keys", "hidden"])
def test_whole_joint_models_compile(pool):
    config = IEKVDConfig(alpha=(0.8, 1.2), pool=pool)
    for build, layers, inputs in (
        (tiny_flux, {"num_layers": 1, "num_single_layers": 1}, flux_inputs(size=(6, 10))),
        (tiny_sd3, {"num_layers": 2}, sd3_inputs()),  # the first has two attentions, the last leaves its text
        (tiny_qwen, {"num_layers": 2}, qwen_inputs()),
    ):
        torch._dynamo.reset()
        eager, model = build(**layers), build(**layers)
        apply_token_compression(eager, config)
        wanted = run(eager, inputs)
        apply_token_compression(model, config)
        if build is tiny_flux:
            # Reading the grid breaks the graph.
            broken = torch.compile(model, backend=Graphs())
            torch.testing.assert_close(run(broken, inputs), wanted, atol=1e-5, rtol=1e-5)
            torch._dynamo.reset()
            inputs = {**inputs, "joint_attention_kwargs": {"bigain_grid": (6, 10)}}
        compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
        torch.testing.assert_close(run(compiled, inputs), wanted, atol=1e-5, rtol=1e-5)


def test_applying_to_a_compiled_model_adds_one_set_and_removing_adds_none():
    model, graphs = tiny_unet(), Graphs()
    plain = run(model, unet_inputs())
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    torch.testing.assert_close(run(model, unet_inputs()), plain, atol=1e-6, rtol=1e-6)
    unpatched = graphs.count
    apply_token_compression(model, LGTMConfig(ratio=0.5))
    compressed = run(model, unet_inputs())
    assert graphs.count == unpatched + 1  # full resolution alone is patched
    apply_token_compression(model, LGTMConfig(ratio=0.7))
    stronger = run(model, unet_inputs())
    assert not torch.allclose(stronger, compressed, atol=1e-4)
    graphs_before_removal = graphs.count
    remove_token_compression(model)
    torch.testing.assert_close(run(model, unet_inputs()), plain, atol=1e-6, rtol=1e-6)
    assert graphs.count == graphs_before_removal
    eager = tiny_unet()
    apply_token_compression(eager, LGTMConfig(ratio=0.5))
    torch.testing.assert_close(compressed, run(eager, unet_inputs()), atol=1e-6, rtol=1e-6)


def test_whole_model_compiles():
    for config in (LGTMConfig(), LGTMConfig(proportional=True), IEKVDConfig(alpha=(0.8, 1.2))):
        torch._dynamo.reset()
        model = tiny_dit(num_layers=2)
        plain = run(model, dit_inputs())
        compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
        apply_token_compression(compiled, config)
        eager = tiny_dit(num_layers=2)
        apply_token_compression(eager, config)
        torch.testing.assert_close(run(compiled, dit_inputs()), run(eager, dit_inputs()), atol=1e-6, rtol=1e-6)
        remove_token_compression(compiled)
        torch.testing.assert_close(run(compiled, dit_inputs()), plain, atol=1e-6, rtol=1e-6)
