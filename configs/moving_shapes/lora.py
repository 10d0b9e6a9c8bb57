"""A LoRA of the included base model on Moving Shapes: a shape and colour that it never saw, from a few pictures.

    python train.py --config configs/moving_shapes/lora.py:cpu --workdir runs/lora --config.data.image_path=PICTURES \\
        --config.data.image_captions="['a brown heart']"
    python sample.py --lora runs/lora/weights --prompt "a brown heart moving left over a white background"
    python train.py --config configs/moving_shapes/lora.py:tiny --workdir runs/lora-tiny    # a minute on a CPU

The network is small, so that all kinds of spatial layers are changed, at a high learning rate.

Modes: "" for one GPU, with larger batches; "cpu"; "tiny", on random weights and Moving Shapes' own images. Hardware,
time and result: docs/personalise.md. The mode "" has not been run.
"""

from pathlib import Path

from ml_collections import ConfigDict

import lavie_jax
from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    config = base.get_config(mode or "cpu")  # the included model is that of the mode "cpu"
    if mode == "tiny":
        config.regime = "lora"
        config.data.frames, config.data.images, config.prompts = 0, 2, ()
        return config
    config.init_from = str(Path(lavie_jax.__file__).parent / "assets" / "base")
    common.set_subject(config, images=4)
    config.lora.rank, config.lora.targets = 8, ("attention", "feed_forward", "convolutions")
    config.batch, config.steps = {"": (16, 600), "cpu": (2, 300)}[mode]
    common.set_fields(config.optimizer, kind="adamw", learning_rate=2e-3, warmup=20, decay="cosine")
    config.ema_decay = 0.95
    config.prompts = ("a brown heart moving left over a white background", "a large red circle moving up")
    config.held_out_every = config.checkpoint_every = config.sample_every = 100
    return config
