"""Fine-tunes an image model of Moving Shapes on clips, in one of the paper's three regimes (LaVie, appendix D).

    python benchmarks/joint_training.py --out runs/joint_training    # all regimes, three seeds each, measured
    python train.py --config configs/moving_shapes/fine_tuning.py --workdir runs/fine-tuning \\
        --config.init_from=lavie_jax/assets/base
    python train.py --config configs/moving_shapes/fine_tuning.py:tiny --workdir runs/fine-tuning-tiny

The regimes differ in `regime`, and in images beside the clips: `data.images=0` for "video_only" and "temporal_only".
Text encoder and VAE are frozen in all of them, as in the paper.

Modes: "" for one CPU core; "tiny". Hardware, time and result: docs/joint_training.md.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    config = base.get_config(mode or "cpu")
    config.inflate = True  # temporal attention and the motion embedding add nothing at first
    config.prompts = ()
    if mode == "tiny":
        return config
    config.train_text_encoder = False
    config.cpu_devices = 1
    # They span the time from the first to the last of the base stage's 16 frames.
    config.data.frames, config.data.fps = 4, 8.0 * 3 / 15
    config.data.images = 4
    config.batch, config.steps = 8, 100
    common.set_fields(config.optimizer, kind="adamw", learning_rate=1e-3, warmup=10, decay="constant")
    config.ema_decay = 0.9
    config.held_out_batches = 1
    config.sampling.steps = 10
    config.log_every = 5
    config.held_out_every = config.checkpoint_every = config.sample_every = 50
    return config
