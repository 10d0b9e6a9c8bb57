"""What compiling for a TPU spends its time on: gradients of parts of the base UNet, for one v5e chip that is not there.

    python benchmarks/tpu_compile.py [--json FILE]     # needs libtpu; some ten minutes of one core

Parts of the outermost level: 16 frames and 4 images of 40x64 latents, 320 channels, bfloat16. "plan" is how many
seconds it takes until memory is planned (`planner/memory_plan.py`), which is the work of one core; "all" includes
the machine code, in seconds of CPU time of all cores. "cycles" is the compiler's own estimate of the run time, in
millions, without Pallas kernels: a guess, but the same one on both sides. O1 is what JAX_OPTIMIZATION_LEVEL=O1 asks
for.
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

from lavie_jax import parallel
from lavie_jax.evaluation import results
from lavie_jax.models.layers import Frames, GroupNorm, ResnetBlock, conv
from lavie_jax.models.unet import Setting, TransformerBlock
from lavie_jax.planner import chips, memory_plan
from lavie_jax.planner.programs import placed
from lavie_jax.training import build, options

DTYPE, FRAMES, CHANNELS = jnp.bfloat16, Frames(16, 4), 320
LEVELS = {"default": {}, "O1": {"xla_optimization_level": "EFFORT_O1"}}


class Convolution(nn.Module):
    """3x3, after norm and SiLU (`normed`), and kept apart from them (`apart`)."""

    normed: bool = False
    apart: bool = False

    @nn.compact
    def __call__(self, x):
        if self.normed:
            x = nn.silu(GroupNorm(32, 1e-5, FRAMES, DTYPE, name="norm")(x))
        if self.apart:
            x = jax.lax.optimization_barrier(x)
        return conv(CHANNELS, (3, 3), name="conv", dtype=DTYPE)(x)


def parts() -> dict[str, tuple[nn.Module, tuple]]:
    """{name: (module, what it is called with beside x)}."""
    config = build.make_models(options.load("configs/base.py"), DTYPE, 1.0).unet.config
    items = 1 + FRAMES.images
    temb = jax.ShapeDtypeStruct((1, items, 4 * CHANNELS), DTYPE)
    text = jax.ShapeDtypeStruct((1, items, 77, config.cross_attention_dim), DTYPE)
    return {
        "convolution": (Convolution(), ()),
        "norm, SiLU, convolution": (Convolution(normed=True), ()),
        "the same, convolution apart": (Convolution(normed=True, apart=True), ()),
        "residual block": (ResnetBlock(CHANNELS, 32, 1e-5, FRAMES, dtype=DTYPE), (temb,)),
        "transformer block": (TransformerBlock(Setting(config, FRAMES, DTYPE, "auto"), 0, False), (text,)),
    }


def gradient(module: nn.Module, inputs: tuple, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Of parameters and x, lowered."""
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def loss(params, *inputs):
        return jnp.square(module.apply(params, *inputs)).mean()

    arguments = placed((params, *inputs), parallel.replicated(mesh))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments).lower()


def measure(lower: Callable[[], jax.stages.Lowered], level: dict[str, str]) -> dict[str, float]:
    """One cell of each column; `level` holds the compiler's options."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    mesh = parallel.make_mesh(devices=chips.devices("v5e:1x1"))
    x = jax.ShapeDtypeStruct((1, sum(FRAMES), 40, 64, CHANNELS), DTYPE)
    found = {}
    for name, (module, rest) in parts().items():
        for level, asked in LEVELS.items():
            row = found[f"{name}, {level}"] = measure(lambda: gradient(module, (x, *rest), mesh), asked)  # noqa: B023
            print(f"{name}, {level}:", ", ".join(f"{key} {value:.1f}" for key, value in row.items()), flush=True)
    columns = list(next(iter(found.values())))
    cells = [[name, *(f"{row[column]:.1f}" for column in columns)] for name, row in found.items()]
    print(results.markdown(["", *columns], cells))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
