"""How far apart the two orders of pooling in a layer with norm and rotation are: `python -m benchmarks.pooling_order`.

On a small random Flux model and a photograph with noise; a line for every sharpness and alpha, in percent.

Keys and values can be pooled after norm and rotation, or the hidden states before the projections, with pooled keys
rotated by the position of their window's nearest token (`pool` of `IEKVDConfig`). For alpha = 1 both take the same
tokens and agree; elsewhere they differ by what norm and rotation do to an average. The weights are random: the errors
show the arithmetic of the two orders, not what either does to the pictures of a trained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bigain_kernels.evaluation.data import load_photograph
from bigain_kernels.evaluation.metrics import Measured, mean, paired_difference


@dataclass(frozen=True)
class PoolingOrderConfig:
    """What is compared.

    Attributes:
        alphas: of the pooling.
        sharpness: factors on the normalised queries: 1 is a random model as it is made, more makes attention choose
            more sharply, as that of trained models does.
        seeds: of the weights and the noise, one model each.
        factor: of the pooling.
        grid: tokens of the picture, (rows, columns).
        patch: pixels of a token's side.
        sigma: how much noise the picture has, from 0 to 1.
    """

    alphas: tuple[float, ...] = (0.0, 0.5, 0.9, 1.0, 1.2)
    sharpness: tuple[float, ...] = (1.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    factor: int = 2
    grid: tuple[int, int] = (16, 24)
    patch: int = 4
    sigma: float = 0.5


@dataclass(frozen=True)
class PoolingOrder:
    """Relative errors ||y - y0|| / ||y0|| of the model's output y against that of the unpooled model, y0.

    `keys`: keys and values pooled after norm and rotation. `hidden`: hidden states pooled. `difference`: the second
    minus the first, paired over the weights. `apart`: between the outputs of the two.
    """

    alpha: float
    sharpness: float
    keys: Measured
    hidden: Measured
    difference: Measured
    apart: Measured


def random_flux(sharpness: float, channels: int, seed: int) -> Any:
    """A Flux model of two blocks of each kind with random weights and normalised queries multiplied by `sharpness`."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            in_channels=channels,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            axes_dims_rope=(8, 12, 12),
        ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                parameter.mul_(sharpness)
    return model


def flux_inputs(config: PoolingOrderConfig, seed: int) -> dict[str, torch.Tensor]:
    """A photograph with noise, cut into tokens, and random text: the arguments of a Flux model."""
    rows, columns = config.grid
    generator = torch.Generator().manual_seed(seed)
    size = (rows * config.patch, columns * config.patch)
    picture = F.interpolate(load_photograph("china.jpg")[None], size, mode="bilinear", antialias=True)
    tokens = F.unfold(picture * 2 - 1, config.patch, stride=config.patch).transpose(1, 2)
    noise = torch.randn(tokens.shape, generator=generator)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return {
        "hidden_states": (1 - config.sigma) * tokens + config.sigma * noise,
        "encoder_hidden_states": torch.randn(1, 16, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([config.sigma]),
        "img_ids": torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(16, 3),
    }


@torch.no_grad()
def compare_pooling_orders(config: PoolingOrderConfig | None = None) -> list[PoolingOrder]:
    """Both orders against the unpooled model, for every sharpness and alpha; means over the seeds."""
    from bigain_kernels.diffusers import IEKVDConfig, token_compression

    config = config or PoolingOrderConfig()
    found: dict[tuple[float, float], list[torch.Tensor]] = {}
    for sharpness in config.sharpness:
        for seed in config.seeds:
            inputs = flux_inputs(config, seed)
            model = random_flux(sharpness, inputs["hidden_states"].shape[2], seed)
            plain = model(**inputs).sample
            for alpha in config.alphas:
                outputs = []
                for pool in ("keys", "hidden"):
                    with token_compression(model, IEKVDConfig(factor=config.factor, alpha=alpha, pool=pool)):
                        outputs.append(model(**inputs).sample)
                keys, hidden = outputs
                errors = torch.stack([d.norm() / plain.norm() for d in (keys - plain, hidden - plain, hidden - keys)])
                found.setdefault((sharpness, alpha), []).append(errors)
    return [_measured(alpha, sharpness, torch.stack(errors)) for (sharpness, alpha), errors in found.items()]


def _measured(alpha: float, sharpness: float, errors: torch.Tensor) -> PoolingOrder:
    keys, hidden, apart = errors.unbind(1)
    return PoolingOrder(alpha, sharpness, mean(keys), mean(hidden), paired_difference(hidden, keys), mean(apart))


def main() -> None:
    for order in compare_pooling_orders():
        values = {name: getattr(order, name) for name in ("keys", "hidden", "difference", "apart")}
        shown = ", ".join(f"{name} {100 * m.value:.2f} ± {100 * m.error:.2f}" for name, m in values.items())
        print(f"sharpness {order.sharpness:g}, alpha {order.alpha:g}: {shown}")


if __name__ == "__main__":
    main()
