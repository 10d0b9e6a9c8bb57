"""Trains only the motion embedding on Moving Shapes, between the image model and the base stage.

    python train.py --config configs/moving_shapes/motion.py --workdir runs/motion \\
        --config.init_from=runs/image/weights
    python train.py --config configs/moving_shapes/motion.py:tiny --workdir runs/motion-tiny    # a minute on a CPU

A word such as "left" determines a position only together with the time: its gradient is negligible for a long time, and
then it is learned suddenly. Six frames of a clip and the embedding (`models.additions.MotionEmbedding`) are enough. The
rest of the network is frozen, so that the learning rate can be high.

Modes as in `base.py`. Hardware, time and result: docs/training_moving_shapes.md.
"""

from ml_collections import ConfigDict

from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    config = base.get_config(mode)
    config.regime = "motion_only"
    config.inflate = True  # init_from contains an image model: temporal attention starts at zero
    config.train_text_encoder = mode == "tiny"  # without init_from, the text encoder is untrained
    config.data.images = 0
    if mode != "tiny":
        # They span the time from the first to the last of the base stage's 16 frames.
        config.data.frames, config.data.fps = 6, 8.0 * 5 / 15
        config.batch = {"": 64, "cpu": 16}[mode]
        config.steps = {"": 600, "cpu": 300}[mode]
        config.optimizer.kind = "adamw"  # the embedding was designed with it
        # At twice this rate, the embedding ruined the model in one run of two (docs/training_moving_shapes.md).
        config.optimizer.learning_rate, config.optimizer.warmup = 5e-3, 20
        config.optimizer.weight_decay = 0.0
        # Mostly high noise, where motion is decided, with enough low noise that the embedding has no effect there.
        config.loss.logit_normal = (0.5, 1.5)
        config.ema_decay = 0.95
        config.held_out_every = config.checkpoint_every = config.sample_every = 100
    return config
