"""Products of bfloat16 on CPUs that have units for them, and the platform that a program is traced for.

XLA uses such units (AMX, AVX512-BF16) only where a product of bfloat16 arrays is asked for in float32. There, products
are asked for in float32 and then rounded, and convolutions are sums of such products, one for each position of the
kernel. Other dtypes and devices call jax's functions as they are.
"""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

CPUINFO = Path("/proc/cpuinfo")
UNITS = {"amx_bf16", "avx512_bf16"}  # names of the units in its flags


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has units that multiply bfloat16; False where it cannot be known."""
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text().splitlines()
        return any(UNITS & set(line.split()) for line in lines if line.startswith("flags"))
    return False


def platform() -> str:
    """Returns the platform that the program is traced for: the context mesh's (possibly absent) devices, or jax's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def accumulator(dtype: DTypeLike) -> DTypeLike | None:
    """Returns the dtype to ask for in a product of arrays of `dtype`; None for jax's choice."""
    on_units = dtype == jnp.bfloat16 and platform() == "cpu" and cpu_multiplies_bfloat16()
    return jnp.float32 if on_units else None


def dot_general(x: Array, kernel: Array, *dimensions: Any, **options: Any) -> Array:
    """Computes `lax.dot_general`, in x's dtype."""
    if (wide := accumulator(x.dtype)) is not None:
        options["preferred_element_type"] = wide
    return jax.lax.dot_general(x, kernel, *dimensions, **options).astype(x.dtype)


def conv_general_dilated(
    x: Float[Array, "n *pixels c"],
    kernel: Float[Array, "*window c d"],
    strides: tuple[int, ...],
    padding: list[tuple[int, int]],
    **options: Any,
) -> Array:
    """Computes `lax.conv_general_dilated` with channels last, in one group and without dilation."""
    if (wide := accumulator(x.dtype)) is None:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    window = kernel.shape[:-2]
    counts = [(side - k) // stride + 1 for side, k, stride in zip(x.shape[1:-1], window, strides)]

    def product(position: tuple[int, ...]) -> Array:
        """Returns the product with one position of the kernel, for all pixels."""
        pixels = (slice(k, k + (n - 1) * s + 1, s) for k, n, s in zip(position, counts, strides))
        return jnp.einsum("...c,cd->...d", x[:, *pixels], kernel[position], preferred_element_type=wide)

    return sum(map(product, np.ndindex(window))).astype(x.dtype)
