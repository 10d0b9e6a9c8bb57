"""Interpolation of real film: four times as many frames, by a network for CPUs.

    python tools/real_film.py --out data/film                       # the film, cut into clips of 512 rows
    python tools/metric_weights.py                                  # LPIPS, a part of the loss
    python train.py --config configs/film/interpolation.py --workdir runs/film-interpolation
    python train.py --config configs/film/interpolation.py:tiny --workdir runs/film-interpolation-tiny  # a minute

As in `vsr.py`, latents are folded pixels, sampling takes one step, and LPIPS is a part of the loss. The prediction
starts from the key frames on both sides, moved to the time of the frame by matching (`lavie_jax/models/motion.py`). The
network weighs them against each other and against the key frames as they are, in every pixel, and adds a correction.
Key frames are returned as they are.

Modes: "" for one CPU core; "tiny" (a minute on a CPU, generated data). Hardware, time and result: docs/film.md.
"""

from ml_collections import ConfigDict

from configs import common
from configs.film import vsr


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    config = vsr.film("interpolation", mode)
    common.set_fields(config.unet, in_channels=2 * 48, move_key_frames=True, block_out_channels=(32,))
    common.set_fields(config.unet, layers_per_block=1)
    # A third of the film's rate: objects move further than between the frames of most videos.
    common.set_fields(config.data, frames=5, fps=8.0, height=128, width=128)
    config.batch, config.steps = 4, 900
    config.optimizer.warmup = 40
    common.set_fields(config.sampling, key_latents="mode", window_keys=3)  # less memory
    if mode == "tiny":
        config.data.height = config.data.width = 32
        config.unet.block_out_channels = (8,)
        config.batch, config.steps = 2, 20
    return config
