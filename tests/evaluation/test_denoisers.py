"""Adapters of diffusers models to one calling convention."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from bigain_kernels.diffusers import LGTMConfig
from bigain_kernels.evaluation.classify import ClassifierConfig, classify
from bigain_kernels.evaluation.denoisers import PromptDenoiser, diffuse
from bigain_kernels.evaluation.generate import GenerateConfig, generate


def _unet(**settings: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=8,
        **settings,
    ).eval()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffuse_agrees_with_the_scheduler(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    noisy, target = diffuse(scheduler, clean, noise, t)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, t))
    expected = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}
    torch.testing.assert_close(target, expected[kind])


def test_flow_matching_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^scheduler: got FlowMatchEulerDiscreteScheduler"):
        PromptDenoiser(_unet(), FlowMatchEulerDiscreteScheduler(), torch.zeros(3, 5, 12))


def test_prompts_of_a_unet_are_its_classes() -> None:
    embeddings = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1))
    denoiser = PromptDenoiser(_unet(), DDPMScheduler(clip_sample=False), embeddings)
    assert denoiser.num_classes == 3
    assert denoiser.sample_shape == (4, 8, 8)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 7])
    direct = denoiser.model(noisy, t, encoder_hidden_states=embeddings[[2, 3]]).sample
    torch.testing.assert_close(denoiser(noisy, t, torch.tensor([2, 3])), direct)
    config = ClassifierConfig(stages=((1, 2), (2, 1)))
    result = classify(denoiser, noisy, torch.tensor([0, 1]), config, compression=LGTMConfig(ratio=0.5), share_plan=True)
    assert result.errors.isfinite().all()
    assert generate(denoiser, torch.tensor([0, 1]), GenerateConfig(steps=2)).shape == (2, 4, 8, 8)


def test_pooled_prompts_and_sizes_reach_an_sdxl_unet() -> None:
    model = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10
    )
    generator = torch.Generator().manual_seed(1)
    embeddings, pooled = torch.randn(4, 5, 12, generator=generator), torch.randn(4, 10, generator=generator)
    time_ids = torch.tensor([16.0, 16.0, 0.0, 0.0, 16.0, 16.0])
    denoiser = PromptDenoiser(model, DDPMScheduler(), embeddings, pooled, time_ids)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 7])
    added = {"text_embeds": pooled[[2, 3]], "time_ids": time_ids.expand(2, -1)}
    direct = model(noisy, t, encoder_hidden_states=embeddings[[2, 3]], added_cond_kwargs=added).sample
    torch.testing.assert_close(denoiser(noisy, t, torch.tensor([2, 3])), direct)
