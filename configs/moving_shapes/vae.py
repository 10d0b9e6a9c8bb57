"""The VAE of Moving Shapes: 64x64 frames to 16x16x4 latents (arXiv 2112.10752, section 3.1).

    python train.py --config configs/moving_shapes/vae.py --workdir runs/vae
    python train.py --config configs/moving_shapes/vae.py:tiny --workdir runs/vae-tiny    # a minute on a CPU

Hardware: a CPU; time: docs/training_moving_shapes.md. Result: 31.1 dB on held-out images, and all attributes of 64
clips out of 64 are detected correctly in their reconstructions. The other configs take the folder `runs/vae/weights` as
`--config.vae_from`.

Modes: "" and "tiny".
"""

from ml_collections import ConfigDict

from configs import common


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    config = common.new_config("vae")
    config.vae.block_out_channels, config.vae.norm_num_groups = (32,), 8
    config.vae.patch_size = 4  # space-to-depth: every layer works on 16x16 positions

    config.data.frames, config.data.images = 0, 2  # images have all shapes and colours, clips do not
    config.batch = 8

    config.loss.kl = 1e-3
    config.steps = 4000
    config.cpu_devices = 2
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup = 100
    config.optimizer.decay = "cosine"
    config.ema_decay = 0.998

    if mode == "tiny":
        config.vae.block_out_channels = (16,)
        config.cpu_devices = 0
        config.data.height = config.data.width = 32
        config.data.images = 1
        config.steps, config.held_out_batches = 30, 1
        config.log_every = config.checkpoint_every = config.held_out_every = 10
        config.optimizer.warmup, config.optimizer.decay = 5, "constant"  # compiles one program for any number of steps
    return config
