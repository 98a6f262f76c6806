"""Timesteps as schedulers really give them: the noisiest step is the noisiest under all of them, or refused."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from bigain_kernels import tome_plan
from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    SiToConfig,
    ToMeConfig,
    apply_token_compression,
    patch,
    remove_token_compression,
    token_compression,
)
from bigain_kernels.diffusers.schedulers import NUMBERED, TimestepRange, numbered, range_of

from .models import recorded_plans, run, tiny_dit, tiny_unet, unet_inputs

CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
KNOWN = [
    DDIMScheduler(),
    DDIMScheduler(num_train_timesteps=400),
    EulerDiscreteScheduler(use_karras_sigmas=True),
    EulerDiscreteScheduler(**CONTINUOUS),
    EulerDiscreteScheduler(**CONTINUOUS, sigma_min=0.002, sigma_max=120.0),
    EDMEulerScheduler(),
    EDMDPMSolverMultistepScheduler(sigma_min=0.01),
    FlowMatchEulerDiscreteScheduler(),
]


class Pipe:
    """As much of a pipeline as compression looks at."""

    def __init__(self, model, scheduler):
        self.unet, self.scheduler = model, scheduler

    def steps(self, count=6):
        self.scheduler.set_timesteps(count)
        for timestep in self.scheduler.timesteps:
            run(self.unet, unet_inputs(timestep=timestep))


def recorded(monkeypatch):
    """What is decided for all forward passes from now on."""
    seen, make = [], patch.make_forward

    def record(*args):
        seen.append(make(*args))
        return seen[-1]

    monkeypatch.setattr(patch, "make_forward", record)
    return seen


@pytest.mark.parametrize("scheduler", KNOWN, ids=lambda scheduler: type(scheduler).__name__)
def test_schedules_run_from_the_noisiest_step_to_the_cleanest(scheduler, monkeypatch):
    seen = recorded(monkeypatch)
    pipe = Pipe(tiny_unet(), scheduler)
    apply_token_compression(pipe, IEKVDConfig(alpha=(0.8, 1.2)))
    pipe.steps()
    alphas = [forward.alpha[0].item() for forward in seen]
    assert alphas == sorted(alphas)
    assert 0.8 <= alphas[0] < 0.95
    assert 1.1 < alphas[-1] <= 1.2 + 1e-6
    seen.clear()
    apply_token_compression(pipe, LGTMConfig(end=0.5))
    pipe.steps()
    active = [forward.active for forward in seen]
    assert active == sorted(active, reverse=True)
    assert active[0]
    assert not active[-1]


@pytest.mark.parametrize("scheduler", KNOWN, ids=lambda scheduler: type(scheduler).__name__)
@pytest.mark.parametrize("config", [ToMeConfig(max_downsample=2), SiToConfig(ratio=0.3)])
def test_random_patterns_differ_from_step_to_step(scheduler, config, monkeypatch):
    pipe = Pipe(tiny_unet(), scheduler)
    apply_token_compression(pipe, config)
    with recorded_plans(monkeypatch) as records:
        pipe.steps(12)
    layers = len(records) // 12
    patterns = {tuple(plan.anchor[0].tolist()) for _, plan in records[::layers]}
    assert len(patterns) >= 11


def all_schedulers():
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name) if "Scheduler" in name and "Flax" not in name else None
        if inspect.isclass(cls) and issubclass(cls, SchedulerMixin) and not cls.__module__.endswith("dummy_objects"):
            required = [
                parameter
                for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]
                if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            if not required and cls is not SchedulerMixin:
                yield cls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of diffusers' own code
@pytest.mark.parametrize("cls", list(all_schedulers()), ids=lambda cls: cls.__name__)
def test_every_scheduler_is_understood_or_refused_by_name(cls):
    """What `range_of` says is what the scheduler's own timesteps show; the others are refused where it matters."""
    scheduler = cls()
    told, model = range_of(scheduler), tiny_unet()
    if told is None:
        with pytest.raises(ValueError, match=f"^end: got .*{cls.__name__}"):
            apply_token_compression(Pipe(model, scheduler), LGTMConfig(end=0.5))
        assert not hasattr(model, "_bigain")
        apply_token_compression(Pipe(model, scheduler), LGTMConfig())  # does not depend on it
        apply_token_compression(Pipe(model, scheduler), LGTMConfig(end=0.5, num_train_timesteps=1000))
        return
    scheduler.set_timesteps(8)
    steps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    # The first step is not far below the noisiest, the last not far above the cleanest; inverse schedulers go up.
    noise = told.noise(steps)
    assert noise.min() < 0.3
    assert noise.max() > 0.7
    outside = torch.maximum(told.cleanest - steps, steps - told.noisiest).amax()
    assert outside <= 0.01 * (told.noisiest - told.cleanest)


def test_numbered_schedulers_all_exist():
    missing = [name for name in NUMBERED if not hasattr(diffusers, name)]
    assert not missing


def test_the_scheduler_of_the_call_counts(monkeypatch):
    """Pipelines get other schedulers after compression was applied."""
    seen = recorded(monkeypatch)
    pipe = Pipe(tiny_unet(), DDIMScheduler())
    apply_token_compression(pipe, IEKVDConfig(alpha=(0.8, 1.2)))
    pipe.scheduler = EDMEulerScheduler()
    pipe.steps()
    assert seen[0].alpha[0] == pytest.approx(0.8)
    pipe.scheduler = diffusers.KarrasVeScheduler()
    with pytest.raises(ValueError, match=r"^alpha: got .*KarrasVeScheduler"):
        run(pipe.unet, unet_inputs(timestep=3))
    # A copy has no pipeline, and keeps what its original knew.
    pipe.scheduler = EDMEulerScheduler()
    run(pipe.unet, unet_inputs(timestep=torch.tensor(1.0955)))
    clone = copy.deepcopy(pipe.unet)
    seen.clear()
    run(clone, unet_inputs(timestep=torch.tensor(1.0955)))
    assert seen[0].alpha[0] == pytest.approx(0.8, abs=1e-4)
    # So does what was there before a block of code.
    with token_compression(pipe, LGTMConfig()):
        pass
    seen.clear()
    run(pipe.unet, unet_inputs(timestep=torch.tensor(1.0955)))
    assert seen[0].alpha[0] == pytest.approx(0.8, abs=1e-4)
    remove_token_compression(pipe)


def test_compression_does_not_keep_a_pipeline_alive():
    import gc
    import weakref

    pipe = Pipe(tiny_unet(), DDIMScheduler())
    model, reference = pipe.unet, weakref.ref(pipe)
    apply_token_compression(pipe, LGTMConfig(end=0.5))
    del pipe
    gc.collect()
    assert reference() is None
    run(model, unet_inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_random_patterns_in_16_bits_are_those_of_float32(dtype, monkeypatch):
    """Timesteps that 16 bits hold exactly: blocks are kept apart by sums that they do not hold."""
    anchors = {}
    for kind in (torch.float32, dtype):
        model = tiny_unet()
        apply_token_compression(model, ToMeConfig(max_downsample=2))
        with recorded_plans(monkeypatch) as records:
            for timestep in (992.0, 640.0, 400.0, 128.0):
                run(model, unet_inputs(timestep=torch.tensor([timestep], dtype=kind).expand(2)))
        anchors[kind] = [tuple(plan.anchor[0].tolist()) for _, plan in records]
    assert anchors[dtype] == anchors[torch.float32]
    assert len(set(anchors[dtype])) == len(anchors[dtype])


def test_patterns_of_large_16_bit_timesteps_differ():
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    plans = [
        tome_plan(x, (8, 8), 0.5, timestep=torch.tensor([timestep], dtype=torch.float16))
        for timestep in (1100.0, 1900.0)
    ]
    assert not torch.equal(plans[0].assign(), plans[1].assign())


@pytest.mark.parametrize("timestep", [999, 999.0, torch.tensor(999), torch.tensor(999.0), torch.tensor([999.0] * 2)])
def test_forms_of_one_timestep_give_one_pattern(timestep, monkeypatch):
    def anchors(value):
        model = tiny_unet()
        apply_token_compression(model, ToMeConfig(seed=2**62 + 3))
        with recorded_plans(monkeypatch) as records:
            run(model, unet_inputs(timestep=value))
        return [tuple(plan.anchor[0].tolist()) for _, plan in records]

    assert anchors(timestep) == anchors(999)


def test_noise_of_a_range():
    told = TimestepRange(-1.5, 1.0)
    assert told.noise(1.0) == 1.0
    assert told.noise(-9.0) == 0.0
    half = told.noise(torch.tensor([1.0, -1.5, 2.0], dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    assert half.tolist() == [1.0, 0.0, 1.0]
    assert numbered(1000).noise(999) == 1.0


def test_a_bare_model_counts_from_a_thousand(monkeypatch):
    seen = recorded(monkeypatch)
    model = tiny_dit()
    apply_token_compression(model, IEKVDConfig(alpha=(0.8, 1.2)))
    for timestep in (999, 0):
        run(
            model,
            {
                **{"hidden_states": torch.randn(1, 4, 16, 16), "class_labels": torch.tensor([1])},
                "timestep": torch.tensor([timestep]),
            },
        )
    assert [round(forward.alpha.item(), 4) for forward in seen] == [0.8, 1.2]
