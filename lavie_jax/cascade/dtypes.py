"""What depends on the size of the models in sampling: the dtype, and the devices of a CPU."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.precision import cpu_multiplies_bfloat16
from lavie_jax.stages.settings import AUTO, DTYPES
from lavie_jax.stages.stage import StageWeights

FULL_WIDTH = 512  # channels of the widest level from which a UNet counts as one of full size


def compute_dtype(
    dtype: DTypeLike | None, devices: Sequence[jax.Device], weights: Iterable[StageWeights] = ()
) -> np.dtype:
    """Returns the dtype that `dtype` stands for, one of `DTYPES`; None is the same as "auto".

    Raises:
        UserError: the dtype is not one that the networks compute in.
    """
    if dtype is None or dtype == AUTO:
        return jnp.dtype(default_dtype(devices, weights))
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not a dtype of sampling{suggest(name, DTYPES)}")
    return jnp.dtype(name)


def default_dtype(devices: Sequence[jax.Device], weights: Iterable[StageWeights] = ()) -> DTypeLike:
    """Returns what is fast on these devices: bfloat16 on accelerators, and float32 on most CPUs.

    CPUs that have units for bfloat16 compute models of full size in it. Small models, as the shipped ones are, stay
    float32 there, so that a sample is the same on all CPUs, up to rounding.
    """
    if devices[0].platform != "cpu":
        return jnp.bfloat16
    sizes = [is_full_size(own) for own in weights]
    return jnp.bfloat16 if sizes and all(sizes) and cpu_multiplies_bfloat16() else jnp.float32


def is_full_size(weights: StageWeights) -> bool:
    """Whether a stage's UNet is about as large as the released ones."""
    return max(weights.unet.config.block_out_channels) >= FULL_WIDTH


def without_copies(devices: Sequence[jax.Device], weights: Iterable[StageWeights]) -> Sequence[jax.Device]:
    """Returns the devices to use where a CPU may have been split into several (`parallel.split_cpu`).

    Models of full size get one: their operations keep all cores busy, and each device would have a copy of the weights.
    """
    return devices[:1] if devices[0].platform == "cpu" and any(map(is_full_size, weights)) else devices
