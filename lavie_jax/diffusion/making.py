"""Samplers by name: `make_sampler`, and checks of where a chain starts.

A chain starts from pure noise, although x_t at its first timestep holds alpha_t x0. Chains that start almost without
noise are refused, because they return the noise that they were given; so are those that leave most of their fresh noise
in the result. `chain_warning` describes chains that have a little of either.
"""

import dataclasses

from lavie_jax.diffusion.consistency import LCM
from lavie_jax.diffusion.samplers import DDIM, DDPM, Euler, RespacedDDIM, RespacedDDPM, Sampler
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.diffusion.second_order import DPMSolver2M, Heun, UniPC
from lavie_jax.diffusion.spacing import SPACINGS
from lavie_jax.errors import UserError, suggest

# abar at the first timestep may exceed that of the schedule's last by this much before `chain_warning` reports it.
# Stable Diffusion's last timestep has 0.005 (arXiv 2305.08891).
MAX_EXCESS_SIGNAL = 0.02
MAX_RESIDUAL_NOISE = 0.9  # standard deviation, for data of standard deviation 1: above, the result is noise
VISIBLE_NOISE = 0.1

_SAMPLERS = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "respaced_ddim": RespacedDDIM,
    "respaced_ddpm": RespacedDDPM,
    "heun": Heun,
    "dpm++2m": DPMSolver2M,
    "unipc": UniPC,
    "lcm": LCM,
}
SAMPLERS = tuple(_SAMPLERS)


def make_sampler(name: str, steps: int, schedule: Schedule, spacing: str | None = None) -> Sampler:
    """Returns the sampler called `name`, one of `SAMPLERS`.

    Args:
        name: one of `SAMPLERS`.
        steps: number of steps; a step is one network evaluation, with heun two.
        schedule: the schedule that the network was trained with.
        spacing: one of `SPACINGS`; None is the sampler's own.

    Raises:
        UserError: an unknown name or spacing, a spacing that the sampler cannot take, or a number of steps that the
            schedule or the sampler cannot do, such as those that start almost without noise.
    """
    sampler = original_sampler(name, steps, schedule, spacing)
    _check_start(name, sampler)
    _check_residual_noise(name, sampler)
    return sampler


def original_sampler(name: str, steps: int, schedule: Schedule, spacing: str | None = None) -> Sampler:
    """Returns the same as `make_sampler`, also for chains that return noise, which the original programs run."""
    kind = _kind(name)
    if not isinstance(steps, int) or not 1 <= steps <= schedule.steps:
        raise UserError(f"steps must be a whole number from 1 to {schedule.steps}, not {steps!r}")
    spacing = kind.default_spacing if spacing is None else spacing
    if spacing not in SPACINGS:
        raise UserError(f"unknown timestep spacing {spacing!r}{suggest(spacing, SPACINGS)}")
    return kind(steps, schedule, spacing)


def state_arrays(name: str) -> int:
    """Returns the number of arrays in the state of the sampler called `name`, each in the shape of x.

    Raises:
        UserError: an unknown name.
    """
    return _kind(name).state_arrays


def adds_noise(name: str) -> bool:
    """Whether the sampler called `name` adds fresh noise at every step.

    Raises:
        UserError: an unknown name.
    """
    return _kind(name).needs_noise


def _kind(name: str) -> type[Sampler]:
    if name not in _SAMPLERS:
        raise UserError(f"unknown sampler {name!r}{suggest(name, SAMPLERS)}")
    return _SAMPLERS[name]


def _name(sampler: Sampler) -> str:
    return next(name for name, kind in _SAMPLERS.items() if kind is type(sampler))


def _starts_noisy(sampler: Sampler) -> bool:
    """Whether the first timestep is in the noisy half of the schedule."""
    return bool(sampler.step_timesteps[0] >= (sampler.schedule.steps - 1) / 2)


def _excess_signal(sampler: Sampler) -> float:
    """The signal's share of the variance at the first timestep, less that at the schedule's last."""
    return float(sampler.levels[0] - sampler.schedule.alphas_cumprod[-1])


def _check_start(name: str, sampler: Sampler) -> None:
    """Refuses chains that return their own noise."""
    steps, schedule, first = sampler.steps, sampler.schedule, sampler.step_timesteps[0]
    if not _starts_noisy(sampler):
        longer = (dataclasses.replace(sampler, steps=n) for n in range(steps + 1, schedule.steps + 1))
        least = next(other.steps for other in longer if _starts_noisy(other))
        general = {name: kind for name, kind in _SAMPLERS.items() if kind is not LCM}  # which is for distilled networks
        able = [n for n, kind in general.items() if _starts_noisy(kind(steps, schedule, kind.default_spacing))]
        raise UserError(
            f"{name} cannot sample in {steps} step{'s' * (steps > 1)}: with {sampler.spacing!r} spacing it starts at "
            f"timestep {first}, almost without noise, and would return noise. Use at least {least} steps, or a sampler "
            f"that can: {', '.join(able)}"
        )


def _check_residual_noise(name: str, sampler: Sampler) -> None:
    """Refuses chains whose result is mostly their fresh noise."""
    if sampler.residual_noise > MAX_RESIDUAL_NOISE:
        raise UserError(
            f"{name} cannot sample in {sampler.steps} steps: the noise that it adds before the last step would remain "
            f"in the result. Use at least {_least_steps(sampler, MAX_RESIDUAL_NOISE)} steps, or a deterministic sampler"
        )


def _least_steps(sampler: Sampler, residual_noise: float) -> int:
    """Returns the least number of steps, above the sampler's, with at most this residual noise."""
    longer = (dataclasses.replace(sampler, steps=n) for n in range(sampler.steps + 1, sampler.schedule.steps + 1))
    return next(other.steps for other in longer if other.residual_noise <= residual_noise)


def chain_warning(sampler: Sampler) -> str | None:
    """Returns a warning about a chain that starts far below the last timestep or leaves visible noise, or None."""
    steps, schedule = sampler.steps, sampler.schedule
    if sampler.residual_noise > VISIBLE_NOISE:
        return (
            f"{_name(sampler)} with {steps} steps leaves noise of standard deviation {sampler.residual_noise:.2f} in "
            f"the result. Use at least {_least_steps(sampler, VISIBLE_NOISE)} steps, or a deterministic sampler."
        )
    if _excess_signal(sampler) <= MAX_EXCESS_SIGNAL:
        return None
    others = (dataclasses.replace(sampler, steps=n) for n in range(1, schedule.steps + 1))
    good = [other.steps for other in others if _starts_noisy(other) and _excess_signal(other) <= MAX_EXCESS_SIGNAL]
    nearest = min(good, key=lambda n: abs(n - steps))
    return (
        f"{_name(sampler)} with {steps} steps and {sampler.spacing!r} spacing starts at timestep "
        f"{sampler.step_timesteps[0]} of {schedule.steps}, where {sampler.levels[0]:.1%} of the variance should be "
        f"signal but all of it is noise. {nearest} steps, or another sampler or spacing, start closer to "
        "the last timestep."
    )
