"""The nodes, in the V3 schema of ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .compression import Method, patched, unpatched

CATEGORY = "model_patches/bigain"
_TOKENS = (
    "Layers with fewer image tokens stay as they are: 4096 are those of SD1 at 512 x 512, SDXL and Flux at 1024 x 1024."
)


def _when() -> list:
    """The inputs that both methods have."""
    return [
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="0 is the first, noisiest step."
        ),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01),
        io.Int.Input("min_tokens", default=2048, min=1, max=1 << 20, tooltip=_TOKENS),
    ]


class BiGainLGTM(io.ComfyNode):
    """L-GTM: merges smooth tokens before attention and copies results back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BiGainLGTM",
            display_name="BiGain: merge tokens (L-GTM)",
            category=CATEGORY,
            description="Fewer tokens in self-attention: smooth ones merge, edges and textures stay.",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "ratio", default=0.5, min=0.0, max=0.75, step=0.01, tooltip="Part of the tokens that merges."
                ),
                *_when(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, ratio, start_percent, end_percent, min_tokens) -> io.NodeOutput:
        return io.NodeOutput(patched(model, Method(ratio=ratio, min_tokens=min_tokens), start_percent, end_percent))


class BiGainIEKVD(io.ComfyNode):
    """IE-KVD: pools keys and values, queries stay."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BiGainIEKVD",
            display_name="BiGain: pool keys and values (IE-KVD)",
            category=CATEGORY,
            description="Fewer keys and values in self-attention; every token keeps its query.",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input(
                    "factor", default=2, min=1, max=8, tooltip="Windows of factor x factor tokens become one."
                ),
                io.Float.Input(
                    "alpha",
                    default=0.9,
                    min=-1.0,
                    max=2.0,
                    step=0.01,
                    tooltip="1 takes the nearest token, 0 the average; outside it extrapolates.",
                ),
                *_when(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, factor, alpha, start_percent, end_percent, min_tokens) -> io.NodeOutput:
        method = Method(factor=factor, alpha=alpha, min_tokens=min_tokens)
        return io.NodeOutput(patched(model, method, start_percent, end_percent))


class BiGainRemove(io.ComfyNode):
    """Takes compression out again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BiGainRemove",
            display_name="BiGain: remove",
            category=CATEGORY,
            description="The model without token compression; other patches stay.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(unpatched(model))


class BiGainExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [BiGainLGTM, BiGainIEKVD, BiGainRemove]


async def comfy_entrypoint() -> BiGainExtension:
    return BiGainExtension()
