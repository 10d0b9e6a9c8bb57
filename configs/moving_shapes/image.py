"""The image model that the base stage on Moving Shapes starts from, as LaVie starts from Stable Diffusion.

    python train.py --config configs/moving_shapes/image.py --workdir runs/image \\
        --config.vae_from=runs/vae/weights
    python train.py --config configs/moving_shapes/image.py:tiny --workdir runs/image-tiny    # a minute on a CPU

The UNet of `base.py` on still images alone; its temporal layers exist and are not trained. Trained from
scratch on videos, the same network learned the backgrounds and stalled. Modes as in `base.py`.
Hardware, time and result: not yet measured.
"""

from ml_collections import ConfigDict

from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "", "cpu" and "tiny"."""
    config = base.get_config(mode)
    config.data.frames, config.data.images = 0, 8
    # An untrained "moving left" in a caption would upset all that the image model says of it.
    config.data.clip_stills = 0.5
    config.steps = {"": 20_000, "cpu": 1600, "tiny": 20}[mode]
    config.optimizer.learning_rate = 2e-3  # from nothing; a trained model unlearns at that
    # Above t = 700, where only its place is open, a still is soon predicted as well as it can be.
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
