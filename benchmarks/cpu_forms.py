"""Measures the forms that convolutions and attention have on a CPU against XLA's plain ones, in one run.

    python benchmarks/cpu_forms.py [--rounds 8]

Rows are convolutions along the frames and in small frames (`models/layers.py`), and attention over all pixels
(`models/attention.py`). Both forms of a row take turns, on the same arrays in float32; the fastest round counts.
"""

import argparse
import functools
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lavie_jax import results
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.models import attention, layers
from lavie_jax.program_cache import cores

CONVOLUTIONS = (  # kernel, frames of a clip (or clips of frames), height, width, channels
    ((5, 1, 1), (2, 17, 64, 64, 24)),
    ((5, 1, 1), (2, 17, 32, 32, 48)),
    ((5, 1, 1), (2, 17, 16, 16, 96)),
    ((3, 3), (8, 3, 4, 1280)),
    ((3, 3), (8, 5, 8, 1280)),
)
ATTENTION = ((10, 4096, 1, 32), (8, 2560, 8, 40), (4, 2560, 1, 512))  # batch, pixels, heads, width


def plain_convolution(kernel: Array, x: Array) -> Array:
    """Returns XLA's convolution with as many axes as the kernel has."""
    axes = "".join("DHW"[-(kernel.ndim - 2) :])
    padding = [(k // 2, k // 2) for k in kernel.shape[:-2]]
    names = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return jax.lax.conv_general_dilated(x, kernel, (1,) * len(padding), padding, dimension_numbers=names)


def attend(x: Array, scores: int) -> Array:
    """Returns the self-attention of x, in parts of the queries above so many bytes of scores."""
    with mock.patch.object(attention, "CPU_SCORES", scores):
        return attention.attention(x, x, x, kernel="xla")


def rows() -> dict[str, tuple[Callable[[], Array], Callable[[], Array]]]:
    """Returns {row: (the plain form, ours)}, compiled."""
    result = {}
    for kernel, shape in CONVOLUTIONS:
        x = jax.random.normal(jax.random.key(0), shape)
        module = layers.conv(shape[-1], kernel, name="conv", dtype=jnp.float32)
        variables = module.init(jax.random.key(1), x)
        plain = functools.partial(jax.jit(plain_convolution), variables["params"]["kernel"], x)
        result[f"{kernel}, {shape}"] = plain, functools.partial(jax.jit(module.apply), variables, x)
    for shape in ATTENTION:
        x = jax.random.normal(jax.random.key(0), shape)
        forms = (jax.jit(functools.partial(attend, scores=each)) for each in (2**62, attention.CPU_SCORES))
        result[f"attention, {shape}"] = tuple(functools.partial(form, x) for form in forms)
    return result


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="default: %(default)s")
    rounds, lines = parser.parse_args().rounds, []
    for name, forms in rows().items():
        times = [[], []]
        for _ in range(rounds + 1):  # the first compiles
            for form, seconds in zip(forms, times):
                start = time.perf_counter()
                form().block_until_ready()
                seconds.append(time.perf_counter() - start)
        plain, ours = (1000 * min(seconds[1:]) for seconds in times)
        lines.append([name, f"{plain:.1f}", f"{ours:.1f}", f"{ours / plain:.2f}"])
    print(f"{cores()} cores\n\n{results.markdown(['', 'plain, ms', 'ours, ms', 'ratio'], lines)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
