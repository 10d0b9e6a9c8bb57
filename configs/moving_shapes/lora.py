"""A LoRA of the included base model on Moving Shapes: a shape and colour that it never saw, from a few pictures.

    python train.py --config configs/moving_shapes/lora.py:cpu --workdir runs/lora --config.data.image_path=PICTURES \\
        --config.data.image_captions="['a brown heart']"
    python sample.py --lora runs/lora/weights --prompt "a brown heart moving left over a white background"
    python train.py --config configs/moving_shapes/lora.py:tiny --workdir runs/lora-tiny    # a minute on a CPU

The network is small, so that all kinds of spatial layers are changed, at a high learning rate.

Modes: "" for one GPU, with larger batches; "cpu"; "tiny", a few steps on Moving Shapes' own images. Hardware,
time and result: docs/personalise.md. The mode "" has not been run.
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
    if mode == "tiny":
        # A base from random weights has output layers of zero, through which an adapter gets no gradient.
        config.regime = "lora"
        config.data.frames, config.data.images, config.prompts = 0, 2, ()
        config.batch, config.steps, config.held_out_batches = 2, 20, 1
        common.set_fields(config.optimizer, kind="adamw", warmup=0)
        config.log_every = config.held_out_every = config.checkpoint_every = config.sample_every = 10
        return config
    common.set_subject(config, images=4)
    config.lora.rank, config.lora.targets = 8, ("attention", "feed_forward", "convolutions")
    config.batch, config.steps = {"": (16, 600), "cpu": (2, 300)}[mode]
    common.set_fields(config.optimizer, kind="adamw", learning_rate=2e-3, warmup=20, decay="cosine")
    config.ema_decay = 0.95
    config.prompts = ("a brown heart moving left over a white background", "a large red circle moving up")
    config.held_out_every = config.checkpoint_every = config.sample_every = 100
    return config
