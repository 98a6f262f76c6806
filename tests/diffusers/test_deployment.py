"""What CUDA graphs and ahead-of-time compilation ask of a compressed model."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, SiToConfig, ToMeConfig, apply_token_compression

from .family_models import build, case_of, outputs
from .models import dit_inputs, flux_inputs, run, tiny_dit, tiny_flux, tiny_unet, unet_inputs

CONFIGS = [
    LGTMConfig(modules=("attn1", "ff"), proportional=True),
    ToMeConfig(cached_assignment=True, share_plan=2),
    SiToConfig(),
    IEKVDConfig(alpha=(0.8, 1.2)),
]
GIVES_GRID = ("flux", "flux_controlnet")


def fake_pass(name, config):
    """A forward pass on tensors that have no values, so that whoever reads one raises; tensors that are made without
    a device come to lie elsewhere, where they do not meet the others."""
    model = tiny_unet() if name == "unet" else build(name)
    inputs = unet_inputs() if name == "unet" else case_of(name).inputs(2, (case_of(name).frames, 6, 6))
    apply_token_compression(model, config)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("meta"):
        inputs = {key: mode.from_tensor(value) if torch.is_tensor(value) else value for key, value in inputs.items()}
        if name == "unet":
            inputs["timestep"] = torch.full((), 500, device="cpu")
        if name in GIVES_GRID:
            inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
        return outputs(model, inputs)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("name", ["unet", "dit", "flux", "wan", "flux_controlnet"])
def test_a_pass_waits_for_no_device_and_copies_nothing_to_it(name, config):
    """So a CUDA graph can hold it, with mode="reduce-overhead" too: all shapes and sizes are known on the host."""
    assert fake_pass(name, config).device.type == "cpu"


def test_what_does_wait_is_found():
    with pytest.raises(DataDependentOutputException):
        fake_pass("dit", replace(CONFIGS[0], end=0.5))  # whether a timestep is compressed decides on shapes


class Graph(NamedTuple):
    """What torch.compile hands to inductor, and what it says of its inputs."""

    graph: torch.fx.GraphModule
    static: set[int]
    mutated: list[int]


def graphs_of(model, inputs):
    """The graphs of one pass, behind dynamo and AOTAutograd: those that mode="reduce-overhead" would capture."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        metadata = torch._guards.TracingContext.get().fw_metadata
        graphs.append(Graph(graph, set(metadata.static_input_indices), metadata.mutated_inp_runtime_indices))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    found = [run(compiled, inputs) for _ in range(2)]
    torch._dynamo.reset()
    return graphs, found


def unfit(graph):
    """Why a graph of a compressed model cannot be captured and replayed, or None."""
    nodes = list(graph.graph.graph.nodes)
    values = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    given = [value for index, value in enumerate(values) if index not in graph.static]
    if graph.mutated:
        return "it writes to its inputs"
    if not all(isinstance(value, torch.Tensor) for value in values):
        return "it has numbers of the host among its inputs"
    # A number of the host as a tensor: a graph would keep the one that it was captured with.
    if any(value.dim() == 0 for value in given):
        return "it has tensors without dimensions among its inputs"
    called = [node.target for node in nodes if node.op == "call_function"]
    ops = [target for target in called if isinstance(target, torch._ops.OpOverload)]
    # Attentions can drop out, and have the tag always; these do not.
    drawing = [op for op in ops if "dropout_p" not in {argument.name for argument in op._schema.arguments}]
    if any(torch.Tag.nondeterministic_seeded in op.tags for op in drawing):
        return "it draws from the random state of the host"
    if any(torch.Tag.data_dependent_output in target.tags for target in ops):
        return "it reads values on the host"
    results = [node.meta["val"] for node in nodes if torch.is_tensor(node.meta.get("val"))]
    if not all(isinstance(size, int) for result in results for size in result.shape):
        return "it has shapes that hang on values"
    found = get_first_incompatible_cudagraph_node(graph.graph)
    return None if found is None else f"it has {found.target}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_graphs_of_a_pass_can_be_captured_and_replayed(name, config):
    """Nothing is written to inputs, weights stay where they are, and nothing is drawn or read on the host."""
    model, inputs = build(name, 1), case_of(name).inputs(2, (case_of(name).frames, 6, 6))
    if name in GIVES_GRID:
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    apply_token_compression(model, config)
    wanted = run(model, inputs)
    graphs, found = graphs_of(model, inputs)
    assert [unfit(graph) for graph in graphs] == [None] * len(graphs)
    # All that the model holds keeps its address: what comes anew with a pass is what the caller gave.
    new = sum(len(node.meta["val"].shape) > 0 for graph in graphs for node in inputs_of(graph))
    assert 0 < new <= len(graphs) * sum(map(torch.is_tensor, inputs.values()))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], wanted, atol=3e-5, rtol=3e-5)


def inputs_of(graph):
    nodes = [node for node in graph.graph.graph.nodes if node.op == "placeholder"]
    return [node for index, node in enumerate(nodes) if index not in graph.static]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x, n: x.add_(n), "it writes to its inputs"),
        (lambda x, n: x + torch.rand_like(x), "it draws from the random state of the host"),
        (lambda x, n: x * n, "it has tensors without dimensions among its inputs"),
        (lambda x, n: x[torch.nonzero(x[0])[:, 0]], "it has shapes that hang on values"),
    ],
)
def test_graphs_that_cannot_are_found(step, reason):
    found = []

    def keep(graph, example_inputs):
        metadata = torch._guards.TracingContext.get().fw_metadata
        found.append(unfit(Graph(graph, set(metadata.static_input_indices), metadata.mutated_inp_runtime_indices)))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(step, backend=aot_autograd(fw_compiler=keep))(torch.ones(3, 3), torch.tensor(2.0))
    assert reason in found


# Minutes of a C++ compiler.
@pytest.mark.skipif("BIGAIN_TEST_AOTI" not in os.environ, reason="BIGAIN_TEST_AOTI is not set")
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_ahead_of_time_compilation(name, tmp_path):
    if name == "dit":
        model, inputs = tiny_dit(num_layers=1), dit_inputs()
    else:
        model, inputs = tiny_flux(num_layers=1, num_single_layers=1), flux_inputs(size=(6, 6))
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    apply_token_compression(model, CONFIGS[0])
    wanted, arguments = run(model, inputs), {**inputs, "return_dict": False}
    with torch.no_grad():
        program = torch.export.export(model, (), arguments, strict=False)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    found = torch._inductor.aoti_load_package(path)(**arguments)
    found = found[0] if isinstance(found, (tuple, list)) else found
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=3e-5)
