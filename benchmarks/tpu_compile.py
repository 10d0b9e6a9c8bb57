"""Measures how long parts of the base UNet take to compile for a TPU v5e, ahead of time and without a TPU.

    python benchmarks/tpu_compile.py [--json FILE]

Compiles gradients of parts of the outermost level: 16 frames and 4 images of 40x64 latents, 320 channels, bfloat16.
Needs libtpu and about ten minutes of one core. Columns:

plan      seconds until memory is planned (`lavie_jax/planner/memory_plan.py`), on one core
all       CPU seconds of all cores for the whole compilation, including machine code
code      size of the machine code in MiB
cycles    the compiler's estimate of the run time in millions of cycles, without Pallas kernels; for comparison only

O1 is the optimization level of JAX_OPTIMIZATION_LEVEL=O1.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavie_jax import parallel, results
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.models.layers import Frames, GroupNorm, ResnetBlock, conv
from lavie_jax.models.transformer import Setting, TransformerBlock
from lavie_jax.planner import chips, memory_plan
from lavie_jax.planner.programs import placed
from lavie_jax.training import build, options

DTYPE, FRAMES, CHANNELS = jnp.bfloat16, Frames(16, 4), 320
LEVELS = {"default": {}, "O1": {"xla_optimization_level": "EFFORT_O1"}}


class Convolution(nn.Module):
    """A 3x3 convolution, optionally after norm and SiLU (`normed`), optionally not fused with them (`barrier`)."""

    normed: bool = False
    barrier: bool = False

    @nn.compact
    def __call__(self, x):
        if self.normed:
            x = nn.silu(GroupNorm(32, 1e-5, FRAMES, DTYPE, name="norm")(x))
        if self.barrier:
            x = jax.lax.optimization_barrier(x)
        return conv(CHANNELS, (3, 3), name="conv", dtype=DTYPE)(x)


def parts() -> dict[str, tuple[nn.Module, tuple]]:
    """Returns {name: (module, its arguments after x)}."""
    config = build.make_models(options.load("configs/base.py"), DTYPE, 1.0).unet.config
    items = 1 + FRAMES.images
    temb = jax.ShapeDtypeStruct((1, items, 4 * CHANNELS), DTYPE)
    text = jax.ShapeDtypeStruct((1, items, 77, config.cross_attention_dim), DTYPE)
    return {
        "convolution": (Convolution(), ()),
        "norm, SiLU, convolution": (Convolution(normed=True), ()),
        "the same, convolution apart": (Convolution(normed=True, barrier=True), ()),
        "residual block": (ResnetBlock(CHANNELS, 32, 1e-5, FRAMES, dtype=DTYPE), (temb,)),
        "transformer block": (TransformerBlock(Setting(config, FRAMES, DTYPE, "auto"), 0, False), (text,)),
    }


def gradient(module: nn.Module, inputs: tuple, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Returns the lowered gradient with respect to parameters and x."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def loss(params, *inputs):
        return jnp.square(module.apply(params, *inputs)).mean()

    arguments = placed((params, *inputs), parallel.replicated(mesh))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments).lower()


def measure(lower: Callable[[], jax.stages.Lowered], level: dict[str, str]) -> dict[str, float]:
    """Returns one value per column; `level` holds compiler options."""
    lowered = lower()
    with tempfile.TemporaryDirectory() as folder:
        begin, clock = time.process_time(), time.time()
        compiled = lowered.compile(compiler_options={memory_plan.DUMP: folder, **level})
        seconds, wall = time.process_time() - begin, time.time() - clock
        planned = next(Path(folder).glob(f"*{memory_plan.NEXT}")).stat().st_mtime - clock
    cycles = sum(int(n) for n in re.findall(r'estimated_cycles":"(\d+)"', compiled.as_text()))
    code = compiled.memory_analysis().generated_code_size_in_bytes
    return {"plan": min(planned, wall), "all": seconds, "code, MiB": code / 2**20, "cycles": cycles / 1e6}


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    mesh = parallel.make_mesh(devices=chips.devices("v5e:1x1"))
    x = jax.ShapeDtypeStruct((1, sum(FRAMES), 40, 64, CHANNELS), DTYPE)
    measurements = {}
    for name, (module, rest) in parts().items():
        for level, options_of_level in LEVELS.items():
            row = measure(lambda: gradient(module, (x, *rest), mesh), options_of_level)  # noqa: B023
            measurements[f"{name}, {level}"] = row
            print(f"{name}, {level}:", ", ".join(f"{key} {value:.1f}" for key, value in row.items()), flush=True)
    columns = list(next(iter(measurements.values())))
    cells = [[name, *(f"{row[column]:.1f}" for column in columns)] for name, row in measurements.items()]
    print(results.markdown(["", *columns], cells))
    if args.json:
        args.json.write_text(json.dumps(measurements, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
