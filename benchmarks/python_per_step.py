"""Measures the Python overhead of a training step of the full-size base: train.py's loop without the step itself.

    python benchmarks/python_per_step.py [--steps 400]

Runs train.py on a base UNet with as many layers and arrays as at full size, but narrow ones, and with an update that
returns its state unchanged. What remains is the call with thousands of arrays, the transfer of the batch, metrics and
the progress bar. Time spent waiting for data is subtracted. On an accelerator this overhead is hidden as long as it is
shorter than the step. Needs a minute on a CPU.
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
NARROW = {  # the layers of configs/base.py's UNet, with few channels
    "unet.block_out_channels": "(8,8,8,8)", "unet.layers_per_block": 2, "unet.attention_heads": "(2,2,2,2)",
    "unet.attention_levels": "(True,True,True,False)", "unet.only_cross_attention": "(False,False,False,False)",
    "unet.motion_embedding": False, "unet.caption_modulation": False,
}  # fmt: skip


def make_identity_update(*_, **__):
    """Replaces `make_update` by one whose update computes nothing."""

    def update(state, frozen, batch, rng):
        zeros = dict.fromkeys(LOSSES, jnp.zeros(())) | {"skipped": jnp.zeros((), jnp.int32)}
        return state | {"step": state["step"] + 1}, zeros

    return update


def arrays(config) -> int:
    """Returns the number of arrays in the training state of a config."""
    task = build.stage_task(config, jnp.float32, abstract_init(config))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    state = jax.eval_shape(lambda params: make_state(params, task, tx), abstract_params(task))
    return len(jax.tree.leaves(state))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    args = parser.parse_args()
    os.chdir(ROOT)
    fields = NARROW | {
        "steps": args.steps, "checkpoint_every": args.steps, "held_out_every": args.steps, "sample_every": args.steps,
        "log_every": args.steps // 4, "prompts": "()",
    }  # fmt: skip
    train.make_update = make_identity_update
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        words = ["--config=configs/moving_shapes/base.py:tiny", f"--workdir={folder}/run"]
        train.main([*words, *(f"--config.{name}={value}" for name, value in fields.items())], cleanup)
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    timings = [row for row in rows if "step_seconds_p50" in row][1:]  # the first includes one-time work
    config = options.load("configs/moving_shapes/base.py:tiny")
    for name, value in NARROW.items():
        options.override(config, name, str(value))
    print(f"arrays in the state: {arrays(config)}; at full size: {arrays(options.load('configs/base.py'))}")
    for row in timings:
        step = 1e3 * row["step_seconds_p50"]
        print(f"{step * (1 - row['data_wait']):.1f} ms of Python per step (median; {step:.1f} with waiting for data)")


if __name__ == "__main__":
    main()
