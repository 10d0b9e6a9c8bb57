"""Rough FLOPs of sampling and training, to warn of work that a CPU cannot do in reasonable time."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lavie_jax.diffusion.guidance import COMPUTED
from lavie_jax.diffusion.making import make_sampler
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.stages.settings import Settings
from lavie_jax.stages.stage import StageWeights, feature_cache_of, guidance_of

CPU_FLOPS = 1e11  # of a CPU with a few cores, per second
MAX_FLOPS = 1e14  # of a sample or a training step on a CPU, above which a warning is due
OUTERMOST = 0.1  # of the FLOPs of a whole UNet, in evaluations that use its deep features again (docs/speed.md)


@runtime_checkable
class SampledWeights(StageWeights, Protocol):
    """The part of `weights.Weights` that the estimate reads."""

    schedule: Any


def unet_flops(config: UNetConfig, *, frames: int, height: int, width: int) -> float:
    """Estimates the FLOPs of a UNet for a clip of latents, within about 50 %: counting them in a trace takes minutes.

    A residual block of width w has two convolutions of 9 w^2 products per position. A transformer block has about 26:
    4 for each of three attentions, 12 for the feed-forward layers and 2 for the projections around it.
    """
    total, blocks = 0.0, 2 * config.layers_per_block + 1
    for level, channels in enumerate(config.block_out_channels):
        pixels = max(1, height >> level) * max(1, width >> level)
        products = 18 * channels**2
        if config.attention_levels[level]:
            products += 26 * channels**2 + 2 * pixels * channels  # scores, and the sum of values
        total += 2.0 * max(frames, 1) * pixels * blocks * products
    return total


def sampling_warnings(
    weights: Mapping[str, SampledWeights], settings: Mapping[str, Settings], platform: str
) -> list[str]:
    """A line for each stage whose denoising would take a CPU too long, if `platform` is "cpu"."""
    flops = sampling_flops(weights, settings) if platform == "cpu" else {}
    lines = [_warning(f"stage {stage}: a sample", value) for stage, value in flops.items()]
    return [line for line in lines if line]


def sampling_flops(weights: Mapping[str, SampledWeights], settings: Mapping[str, Settings]) -> dict[str, float]:
    """Estimates the FLOPs of denoising a sample in each stage."""
    flops = {}
    for stage, made in settings.items():
        windows = STAGES[stage].windows(STAGES[stage].latent_shape(weights[stage], made), made)
        frames, height, width = windows[0].shape
        each = unet_flops(weights[stage].unet.config, frames=frames, height=height, width=width)
        chains = len(windows) * len(STAGES[stage].segments(made)) * STAGES[stage].passes(made)
        flops[stage] = each * _calls(made, weights[stage].schedule) * chains
    return flops


def _calls(settings: Settings, schedule: Schedule) -> float:
    """Returns the number of calls of the UNet in a chain, of which those without its deep layers count little."""
    sampler = make_sampler(settings.sampler, settings.steps, schedule, settings.spacing).tail(settings.first_step)
    modes = guidance_of(settings).plan(sampler.timesteps)
    whole = feature_cache_of(settings).plan(modes)
    return sum((2 if mode == COMPUTED else 1) * (1 if deep else OUTERMOST) for mode, deep in zip(modes, whole))


def training_warning(config: Any, platform: str) -> str | None:
    """A line about a run whose steps would take a CPU too long, if `platform` is "cpu"; None for a VAE's run."""
    if platform != "cpu" or config.stage not in STAGES:
        return None
    data, factor = config.data, VAEConfig.from_dict(config.vae.to_dict()).factor
    each = unet_flops(
        UNetConfig.from_dict(config.unet.to_dict()),
        frames=data.frames + data.images, height=data.height // factor, width=data.width // factor,
    )  # fmt: skip
    return _warning("a training step", 3 * each * config.batch)  # the backward pass takes twice the forward pass


def _warning(what: str, flops: float) -> str | None:
    if flops < MAX_FLOPS:
        return None
    return (
        f"{what} takes about {flops:.0e} FLOPs, on a CPU roughly {_duration(flops / CPU_FLOPS)}, and no GPU or TPU is "
        "in use: the full-size models need one"
    )


def _duration(seconds: float) -> str:
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    name, unit = next((name, unit) for name, unit in units if seconds >= unit)
    count = max(1, round(seconds / unit))
    return f"{count} {name}{'s' * (count > 1)}"
