"""The configs of diffusers' schedulers: the diffusion process of a teacher, and which processes are supported."""

from __future__ import annotations

import reprlib
from typing import Any

import torch

from dmd2.diffusion import (
    Parametrization,
    Schedule,
    discrete_schedule,
    eps_prediction,
    v_prediction,
    x0_prediction,
)
from dmd2.errors import Refused, near_miss

SCHEDULER = "scheduler/scheduler_config.json"
"""Its place in a pipeline."""
MAX_TIMESTEPS = 100_000
PREDICTIONS: dict[str, Parametrization] = {
    "epsilon": eps_prediction,
    "v_prediction": v_prediction,
    "sample": x0_prediction,
}
"""`prediction_type` of a scheduler -> parametrization."""
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers of the variance preserving process with betas. Those of flow matching and EDM have other noise levels."""
ZERO_SNR = "rescale_betas_zero_snr"
PROCESS_SETTINGS = {"timestep_type": "discrete", "use_flow_sigmas": False, "snr_shift_scale": 1.0}
"""Settings of schedulers that change the process -> the only value that is supported."""
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", ZERO_SNR)
"""Settings of a scheduler that are the process itself; the others are how it is sampled."""


def complete_scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config with the missing values filled in from the defaults of its class, which differ between classes."""
    import diffusers

    if (name := config.get("_class_name")) not in SCHEDULERS:
        raise Refused(
            f"the teacher's scheduler is {name!r}, of a process that is not known; {near_miss(str(name), SCHEDULERS)}"
        )
    defaults = {k: v for k, v in getattr(diffusers, str(name))().config.items() if not k.startswith("_")}
    whole = defaults | config
    for setting, supported in PROCESS_SETTINGS.items():
        if whole.get(setting, supported) != supported:
            raise Refused(
                f"the teacher's scheduler has {setting} = {whole[setting]!r:.60}, a process that is not supported; it must be {supported!r}"
            )
    return whole


def check_sampler(config: dict[str, Any]) -> None:
    """Raise Refused for a scheduler that does not follow its own settings, or cannot sample in one step, as the evaluation does."""
    import diffusers

    name = config["_class_name"]
    if config.get(ZERO_SNR) and ZERO_SNR not in getattr(diffusers, name)().config:
        raise Refused(
            f"the teacher's scheduler has {ZERO_SNR}, which a {name} does not follow; name one that does in {SCHEDULER}, such as DDIMScheduler"
        )
    if name == "PNDMScheduler" and not config["skip_prk_steps"]:
        raise Refused(
            "the teacher's PNDMScheduler starts with Runge-Kutta steps (skip_prk_steps is false) and cannot take fewer than 4 "
            f"steps, and the evaluation samples the teacher in one too; set skip_prk_steps to true in {SCHEDULER}, as Stable Diffusion does"
        )


def noise_schedule(config: dict[str, Any]) -> Schedule:
    """The noise schedule of a complete scheduler config (`complete_scheduler_config`)."""
    kind, form = config["prediction_type"], config["beta_schedule"]
    if kind not in PREDICTIONS:
        raise Refused(f"the teacher's prediction_type is {kind!r}; {near_miss(str(kind), PREDICTIONS)}")
    if config["trained_betas"] is not None:
        raise Refused(
            "the teacher's scheduler lists trained_betas, which are not supported; it must name a beta_schedule"
        )
    low, high, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if not (isinstance(count, int) and 1 <= count <= MAX_TIMESTEPS):
        raise Refused(
            f"the teacher's num_train_timesteps is {reprlib.repr(count)}; it must be from 1 to {MAX_TIMESTEPS}"
        )
    if form == "scaled_linear":
        beta = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64) ** 2
    elif form == "linear":
        beta = torch.linspace(low, high, count, dtype=torch.float64)
    else:
        raise Refused(f"the teacher's beta_schedule is {form!r}; known: linear, scaled_linear")
    zero_terminal = bool(config.get("rescale_betas_zero_snr"))
    if zero_terminal and kind == "epsilon":
        raise Refused(
            "the teacher predicts noise under a schedule with zero terminal SNR (rescale_betas_zero_snr), where noise says "
            "nothing of the image; such a teacher must predict v"
        )
    return discrete_schedule(beta, zero_terminal)
