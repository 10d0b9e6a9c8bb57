"""What motion words mean, before the rest: the motion embedding alone, between the image model and the base stage.

    python train.py --config configs/moving_shapes/motion.py --workdir runs/motion \\
        --config.init_from=runs/image/weights
    python train.py --config configs/moving_shapes/motion.py:tiny --workdir runs/motion-tiny    # a minute on a CPU

"Left" says where the shape is only together with the time: for long no gradient shows it, and then all at once. Six
frames of a clip are enough, and so is the embedding (`models.additions.MotionEmbedding`); the rest of the network stays
as it is, so that the rate can be high. Modes as in `base.py`. Hardware, time and result: docs/moving_shapes.md.
"""

from ml_collections import ConfigDict

from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "", "cpu" and "tiny"."""
    config = base.get_config(mode)
    config.regime = "motion_only"
    config.inflate = True  # what init_from holds is an image model: temporal attention starts at zero
    config.train_text_encoder = mode == "tiny"  # without init_from there is none to keep
    config.data.images = 0
    if mode != "tiny":
        # From the first to the last of the base's 16 frames.
        config.data.frames, config.data.fps = 6, 8.0 * 5 / 15
        config.batch = {"": 64, "cpu": 16}[mode]
        config.steps = {"": 600, "cpu": 300}[mode]
        config.optimizer.kind = "adamw"  # the embedding was found with it
        # At twice this rate it may drown all else for good: one run of two did (docs/moving_shapes.md).
        config.optimizer.learning_rate, config.optimizer.warmup = 5e-3, 20
        config.optimizer.weight_decay = 0.0
        # High noise, where motion is decided, and enough of the rest that the embedding leaves it alone.
        config.loss.logit_normal = (0.5, 1.5)
        config.ema_decay = 0.95
        config.held_out_every = config.checkpoint_every = config.sample_every = 100
    return config
