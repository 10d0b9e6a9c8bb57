"""Timestep spacing: the timesteps of the training schedule that a shorter sampling chain visits.

With T training timesteps and n steps, counted down from k = n:

    leading     (k - 1) * (T // n) + offset     what DDPM and DDIM do in Stable Diffusion; stops short of T - 1
    trailing    round(T k / n) - 1              sec. 3.3 and table 2, arXiv 2305.08891; always starts at T - 1
    linspace    even, from T - 1 to 0           sec. 4, arXiv 2102.09672
    quadratic   (T - 1) (k / n)^2               appendix D.2, arXiv 2010.02502; dense near the data
    karras      even in sigma^(1/7)             eq. 5, arXiv 2206.00364
    ays         `AYS_SIGMAS`, interpolated      "Align your steps", arXiv 2404.14507; optimised for 10 steps

The names are those of table 2 of arXiv 2305.08891 and of diffusers.
"""

import numpy as np

from lavie_jax.diffusion.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace", "quadratic", "karras", "ays")
RHO = 7.0  # the exponent that arXiv 2206.00364 recommends
# Noise levels between the first and the last that arXiv 2404.14507 found for 10 steps of Stable Diffusion 1.5. The ends
# are those of the schedule: LaVie's goes to much more noise.
AYS_SIGMAS = (6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152)


def spaced_timesteps(
    spacing: str, steps: int, schedule: Schedule, *, offset: int = 0, fractional: bool = False
) -> np.ndarray:
    """Returns the timesteps of a chain, `(steps,)`, strictly falling.

    Args:
        spacing: one of `SPACINGS`.
        steps: number of timesteps, from 1 to the schedule's.
        schedule: the schedule that the network was trained with.
        offset: added to every timestep of "leading".
        fractional: whether "linspace", "karras" and "ays" keep their fractions (float64) or round (int64). The others
            are whole.
    """
    T, k = schedule.steps, np.arange(steps, 0, -1)
    if spacing == "leading":
        timesteps = (k - 1) * (T // steps)
        return timesteps + min(offset, T - 1 - timesteps[0])  # a chain as long as the schedule has no room for it
    if spacing == "trailing":
        return np.rint(T * k / steps).astype(np.int64) - 1
    if spacing == "linspace":
        return np.linspace(T - 1, 0, steps) if fractional else _rounded_linspace(steps, T)
    if spacing == "quadratic":
        quadratic = np.rint((T - 1) * (k / steps) ** 2).astype(np.int64)
        return np.maximum(quadratic, k - 1)  # long chains would repeat timesteps near 0
    if spacing not in ("karras", "ays"):
        raise ValueError(f"unknown spacing {spacing!r}")
    sigmas = (_karras if spacing == "karras" else _ays)(steps, schedule)
    timesteps = np.interp(sigmas, schedule.sigmas, np.arange(T))
    return timesteps if fractional else _whole(timesteps, T)


def _rounded_linspace(steps: int, T: int) -> np.ndarray:
    stride = (T - 1) / max(steps - 1, 1)
    # LaVie's respacing accumulates the stride. Sums that end near .5 decide how some timesteps round, so we do too.
    return np.rint(np.add.accumulate(np.append(0.0, np.full(steps - 1, stride)))).astype(np.int64)[::-1]


def _karras(steps: int, schedule: Schedule) -> np.ndarray:
    sigmas = schedule.sigmas
    fraction = np.linspace(0, 1, steps)
    roots = (1 - fraction) * sigmas[-1] ** (1 / RHO) + fraction * sigmas[0] ** (1 / RHO)
    return roots**RHO


def _ays(steps: int, schedule: Schedule) -> np.ndarray:
    """Interpolates the logarithms of the levels. The last one, the schedule's lowest, is where the last step ends."""
    table = np.log([schedule.sigmas[-1], *AYS_SIGMAS, schedule.sigmas[0]])
    position = np.linspace(0, len(table) - 1, steps + 1)[:-1]
    return np.exp(np.interp(position, np.arange(len(table)), table))


def _whole(timesteps: np.ndarray, T: int) -> np.ndarray:
    """Rounds falling timesteps, and moves those apart that would become equal."""
    index = np.arange(len(timesteps))
    apart = np.maximum.accumulate((np.rint(timesteps) + index)[::-1])[::-1]
    return (np.minimum(apart, T - 1) - index).astype(np.int64)
