"""The VAE of Moving Shapes: 64x64 frames to 16x16x4 latents (arXiv 2112.10752, section 3.1).

    python train.py --config configs/moving_shapes/vae.py --workdir runs/vae
    python train.py --config configs/moving_shapes/vae.py:tiny --workdir runs/vae-tiny    # a minute on a CPU

Hardware, time, result: 4000 steps take about 5 minutes on one CPU core; 31.1 dB on held-out images, and every attribute
of 64 clips out of 64 is read right off their reconstruction. The folder `runs/vae/weights` is what
`--config.vae_from` of the other configs wants.
"""

from ml_collections import ConfigDict

from configs import common

ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "patch_size": 4,  # space-to-depth: every layer works on 16x16 places
}


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "" and "tiny"."""
    common.check_mode(mode, ("tiny",))
    config = common.training()
    config.stage = "vae"
    config.init_from = ""  # a folder with such a VAE, to go on from
    config.vae = ConfigDict(ARCHITECTURE)

    config.data = common.moving_shapes()
    config.data.frames, config.data.images = 0, 2  # still images show all shapes and colours there are
    config.batch = 8

    config.loss = ConfigDict({"kl": 1e-3, "detail": 10.0, "crop": 0})
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
        config.optimizer.warmup, config.optimizer.decay = 5, "constant"  # one program for any number of steps
    return config
