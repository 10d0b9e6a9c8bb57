"""The image model that the base stage on Moving Shapes starts from, as LaVie's starts from Stable Diffusion.

    python train.py --config configs/moving_shapes/image.py --workdir runs/image \\
        --config.vae_from=runs/vae/weights
    python train.py --config configs/moving_shapes/image.py:tiny --workdir runs/image-tiny    # a minute on a CPU

It is the UNet of `base.py`, trained on images only; its temporal layers exist but are not trained. Trained from
scratch on videos, the same network learned the backgrounds and then stalled.

Modes as in `base.py`. Hardware, time and result: docs/training_moving_shapes.md.
"""

from ml_collections import ConfigDict

from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    config = base.get_config(mode)
    config.data.frames, config.data.images = 0, 8
    # So the text encoder learns motion words before the image model is inflated: untrained ones would spoil its output.
    config.data.images_from_clips = 0.5
    config.steps = {"": 20_000, "cpu": 1600, "tiny": 20}[mode]
    config.optimizer.learning_rate = 2e-3  # from random weights; a trained model diverges at this rate
    # Above t = 700 only the position is undecided, and images are soon predicted as well as possible.
    config.loss.logit_normal = (-0.3, 1.2)
    config.prompts = (
        "a small red circle over a blue background",
        "a large yellow square over a black background",
        "a large green triangle over a white background",
        "a small purple star over a gray background",
        "a large pink heart over a green background",
        "a large brown crescent over a yellow background",
    )
    return config
