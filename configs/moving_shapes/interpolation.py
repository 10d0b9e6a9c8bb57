"""Temporal interpolation on Moving Shapes (LaVie section 3.3): 61 frames at 32 fps from the base's 16 at 8.

    python train.py --config configs/moving_shapes/interpolation.py --workdir runs/interpolation \\
        --config.init_from=runs/base/weights
    python train.py --config configs/moving_shapes/interpolation.py:tiny --workdir runs/interpolation-tiny

From a base model of the same world: VAE, text encoder (no longer trained) and spatial weights are its own, temporal
attention is new. Clips are 33 of the 61 frames: all that the relative positions can tell apart; half of them have less
than half the frame rate, because at 8 key frames a second an object moves by less than two pixels between them, and
cross-fading would nearly do. Unlike the released model, temporal attention knows positions (`temporal_position`): the
four frames that share a key frame differ by nothing else. And each frame sees the key frames on both sides and starts
from them (`key_frames_around`): the network alone had not even learnt the cross-fade after 500 steps.

Modes: "" for one GPU, "cpu" for 2 CPU cores (from `base.py:cpu`), "tiny" (a minute on a CPU, from random weights).
"cpu" learns motion from 8 clips of 9 frames a step, which teach more than 2 of 33, and must see longer ones afterwards:

    python train.py --config configs/moving_shapes/interpolation.py:cpu --workdir runs/interpolation-short
    python train.py --config configs/moving_shapes/interpolation.py:cpu --workdir runs/interpolation \\
        --config.init_from=runs/interpolation-short/weights --config.inflate=false --config.data.frames=33 \\
        --config.batch=2 --config.steps=800 --config.optimizer.learning_rate=5e-4

Hardware, time and result of "cpu": docs/moving_shapes.md. "" was not run yet.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "", "cpu" and "tiny"."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = base.get_config(mode)
    config.stage = "interpolation"
    config.init_from = "lavie_jax/assets/base" if mode == "cpu" else ""  # the shipped one is of that size
    config.inflate = True  # what init_from holds is a base model: its spatial weights are taken over
    config.train_text_encoder = mode == "tiny"  # from random weights, there is none to start from
    config.unet.in_channels = 8
    config.unet.spatial_attention = "sparse_causal"
    config.unet.temporal_attention = "after_ff"
    config.unet.motion_embedding = False
    config.unet.key_frames_around = True
    # The key frames say all: no guidance, which would take twice the time.
    config.sampling = ConfigDict(
        {"sampler": "respaced_ddim", "steps": 4, "guidance": 1.0, "frames": 61, "fps": 32.0,
         "key_latents": "mean", "prompt_suffix": "", "negative_prompt": ""}
    )  # fmt: skip
    config.data.frames, config.data.fps, config.data.slowest_fps, config.data.images = 33, 32.0, 8.0, 0
    config.batch, config.steps = 16, 10_000
    config.loss.logit_normal = (1.0, 1.3)  # few steps are sampled, and the first of them decides
    config.loss.posterior_mean = True  # what is to be made is known to the last grey level
    config.optimizer.learning_rate = 3e-4
    config.prompts = ()
    if mode == "cpu":
        config.data.frames, config.batch, config.steps = 9, 8, 1500
        config.optimizer.learning_rate = 1e-3
    if mode == "tiny":
        config.data.frames, config.batch, config.steps = 5, 2, 20
        config.sampling.steps, config.sampling.frames = 2, 5
    return config
