"""The image upscaler that super-resolution on Moving Shapes starts from, as LaVie's starts from the x4-upscaler.

    python train.py --config configs/moving_shapes/upscaler.py --workdir runs/upscaler \\
        --config.vae_from=runs/vsr_vae/weights
    python train.py --config configs/moving_shapes/upscaler.py:tiny --workdir runs/upscaler-tiny  # a minute on a CPU

It is the UNet of `vsr.py`, trained on images only; its temporal layers exist but are not trained.

Modes as in `vsr.py`. Hardware, time and result of "cpu": docs/training_moving_shapes.md. The mode "" has not been run.
"""

from ml_collections import ConfigDict

from configs.moving_shapes import vsr


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    config = vsr.get_config(mode)
    config.regime = "joint"
    config.inflate = False
    if mode != "tiny":
        config.text_from = "lavie_jax/assets/base"
    config.data.frames, config.data.images, config.data.handheld = 0, 4, 0.0
    config.steps = {"": 20_000, "cpu": 3000, "tiny": 20}[mode]
    return config
