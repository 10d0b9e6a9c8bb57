"""The maths of diffusion: noise schedules, samplers, guidance and losses.

Nothing here depends on the network: a model is any function `denoise(x_t, t)`.
"""

from lavie_jax.diffusion.guidance import guide
from lavie_jax.diffusion.loss import joint_loss, min_snr_weight
from lavie_jax.diffusion.making import SAMPLERS, chain_warning, make_sampler
from lavie_jax.diffusion.samplers import Sampler, sample
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.diffusion.spacing import SPACINGS

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Sampler",
    "Schedule",
    "guide",
    "joint_loss",
    "chain_warning",
    "make_sampler",
    "min_snr_weight",
    "sample",
]
