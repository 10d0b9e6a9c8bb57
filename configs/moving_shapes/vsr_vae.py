"""The VAE of super-resolution on Moving Shapes: 256x256 frames to 64x64x4 latents (arXiv 2112.10752, section 3.1).

    python train.py --config configs/moving_shapes/vsr_vae.py --workdir runs/vsr_vae \\
        --config.init_from=lavie_jax/assets/base
    python train.py --config configs/moving_shapes/vsr_vae.py:tiny --workdir runs/vsr_vae-tiny    # a minute on a CPU

The base stage's VAE was trained on frames of 64x64 only. At 256x256 it is not better than bicubic enlargement (32.7
against 32.6 dB). This one is trained on squares around the shapes of large frames, with a smaller weight of the KL
divergence. Starting from the base stage's VAE, it needs fewer steps.

Hardware: one CPU core; time: docs/training_moving_shapes.md. Result: 36.9 dB on squares of held-out images.
docs/moving_shapes.md compares it with the quality of the upscaled clips, for which it is the upper bound.

Modes: "" and "tiny".
"""

from ml_collections import ConfigDict

from configs.moving_shapes import vae


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    config = vae.get_config(mode)
    config.loss.kl = 1e-4
    config.steps = 2000
    config.optimizer.learning_rate = 5e-4
    config.ema_decay = 0.995
    config.batch, config.held_out_every = 4, 250
    if mode == "tiny":
        config.steps, config.held_out_every = 30, 10
        return config
    config.data.height = config.data.width = 256
    config.loss.crop = 128
    return config
