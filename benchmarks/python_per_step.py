"""What Python costs a training step of the full-size base: everything in train.py's loop but the step itself.

    python benchmarks/python_per_step.py [--steps 400]

Runs train.py on the base UNet with as many layers and arrays as at full size, each of them narrow, and with an update
that hands its state on: what is left is the call with some thousand arrays, the batch's way to the device, metrics and
the bar. Time that the loop waits for data is taken off. A device computes beside this: it costs nothing as long as it
is shorter than the step.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # train.py and the configs

import train  # noqa: E402
from lavie_jax.planner.training import abstract_init  # noqa: E402
from lavie_jax.training import build, optimizer, options  # noqa: E402
from lavie_jax.training.state import abstract_params, make_state  # noqa: E402

LOSSES = ("loss", "video_loss", "image_loss", "gradient_norm")
NARROW = {  # configs/base.py's UNet: four levels of two layers, three of which attend; a small text encoder beside it
    "unet.block_out_channels": "(8,8,8,8)", "unet.layers_per_block": 2, "unet.attention_heads": "(2,2,2,2)",
    "unet.attention_levels": "(True,True,True,False)", "unet.only_cross_attention": "(False,False,False,False)",
    "unet.motion_embedding": False, "unet.caption_modulation": False,
}  # fmt: skip


def handed_on(*_, **__):
    """In the place of `make_update`: nothing is computed."""

    def update(state, frozen, batch):
        zeros = dict.fromkeys(LOSSES, jnp.zeros(())) | {"skipped": jnp.zeros((), jnp.int32)}
        return state | {"step": state["step"] + 1}, zeros

    return update


def arrays(config) -> int:
    """How many there are in a config's training state."""
    task = build.stage_task(config, jnp.float32, abstract_init(config))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    state = jax.eval_shape(lambda params: make_state(params, task, tx), abstract_params(task))
    return len(jax.tree.leaves(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    os.chdir(ROOT)
    fields = NARROW | {
        "steps": args.steps, "checkpoint_every": args.steps, "held_out_every": args.steps, "sample_every": args.steps,
        "log_every": args.steps // 4, "prompts": "()",
    }  # fmt: skip
    train.make_update = handed_on
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        words = ["--config=configs/moving_shapes/base.py:tiny", f"--workdir={folder}/run"]
        train.main([*words, *(f"--config.{name}={value}" for name, value in fields.items())], cleanup)
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    paces = [row for row in rows if "step_seconds_p50" in row][1:]  # the first has what is done once
    config = options.load("configs/moving_shapes/base.py:tiny")
    for name, value in NARROW.items():
        options.override(config, name, str(value))
    print(f"{arrays(config)} arrays in the state; at full size {arrays(options.load('configs/base.py'))}")
    for row in paces:
        step = 1e3 * row["step_seconds_p50"]
        print(f"{step * (1 - row['data_wait']):.1f} ms a step in Python (median; with waiting for data {step:.1f})")


if __name__ == "__main__":
    main()
