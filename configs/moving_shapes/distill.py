"""Distillation of the included base model on Moving Shapes: guidance in one pass, or a video in four steps.

    python train.py --config configs/moving_shapes/distill.py:cpu --workdir runs/distilled
    python train.py --config configs/moving_shapes/distill.py:cpu --workdir runs/lcm --config.distill.kind=consistency
    python -m lavie_jax.evaluation.moving_shapes --weights runs/distilled/weights
    python train.py --config configs/moving_shapes/distill.py:tiny --workdir runs/distill-tiny    # minutes on a CPU

The teacher is the included model, or `init_from`, of the same architecture.

Modes: "" for one GPU, with larger batches; "cpu"; "tiny". Hardware, time and result: docs/speed.md. The mode "" has not
been run.
"""

from pathlib import Path

from ml_collections import ConfigDict

import lavie_jax
from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = base.get_config("cpu")  # the network of the included model
    config.init_from = str(Path(lavie_jax.__file__).parent / "assets" / "base")
    common.set_student(config)
    config.loss.posterior_mean = True
    config.data.images, config.batch, config.steps = 0, 32, 5000  # sampling makes clips
    common.set_fields(config.optimizer, kind="adamw", learning_rate=3e-4, warmup=20, decay="cosine", weight_decay=0.0)
    if mode == "cpu":
        config.batch, config.steps = 4, 1440
        config.held_out_every = config.checkpoint_every = config.sample_every = 120
    if mode == "tiny":
        config.cpu_devices = 0
        config.data.frames, config.batch, config.steps, config.held_out_batches = 4, 2, 20, 1
        config.log_every = config.held_out_every = config.checkpoint_every = config.sample_every = 10
        config.prompts = config.prompts[:2]
    return config
