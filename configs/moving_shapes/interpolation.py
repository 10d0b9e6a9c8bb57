"""Temporal interpolation on Moving Shapes (LaVie, section 3.3): 61 frames at 32 fps from the base stage's 16 at 8 fps.

    python train.py --config configs/moving_shapes/interpolation.py --workdir runs/interpolation \\
        --config.init_from=runs/base/weights
    python train.py --config configs/moving_shapes/interpolation.py:tiny --workdir runs/interpolation-tiny

The VAE, the text encoder (now frozen) and the spatial weights come from a Moving Shapes base model; temporal attention
is new. Clips are 33 of the 61 frames, as many as the relative positions distinguish. Half of the clips have less than
half the frame rate: at 8 key frames per second an object moves less than two pixels between them, and a cross-fade
would almost suffice. Unlike in the released model, temporal attention has positions (`temporal_position`), because the
four frames that share a key frame differ in nothing else. Each frame also sees the key frames on both sides and starts
from them (`key_frames_around`): without that, the network had not learned even the cross-fade after 500 steps.

Modes: "" for one GPU; "cpu" for 2 CPU cores (from `base.py:cpu`); "tiny" (a minute on a CPU, from random weights).
"cpu" learns motion from 8 clips of 9 frames per step, which is more effective than 2 clips of 33, and then needs
training on longer clips:

    python train.py --config configs/moving_shapes/interpolation.py:cpu --workdir runs/interpolation-short
    python train.py --config configs/moving_shapes/interpolation.py:cpu --workdir runs/interpolation \\
        --config.init_from=runs/interpolation-short/weights --config.inflate=false --config.data.frames=33 \\
        --config.batch=2 --config.steps=800 --config.optimizer.learning_rate=5e-4

Hardware, time and result of "cpu": docs/training_moving_shapes.md. The mode "" has not been run.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = base.get_config(mode)
    common.set_stage(config, "interpolation")
    config.init_from = "lavie_jax/assets/base" if mode == "cpu" else ""  # the shipped model has this size
    config.inflate = True  # init_from contains a base model, whose spatial weights are kept
    config.train_text_encoder = mode == "tiny"  # without init_from, the text encoder is untrained
    config.unet.in_channels = 8
    config.unet.spatial_attention = "sparse_causal"
    config.unet.temporal_attention = "after_ff"
    config.unet.motion_embedding = False
    config.unet.key_frames_around = True
    common.set_fields(
        config.sampling,
        sampler="respaced_ddim",
        steps=4,
        guidance=1.0,  # none: it would take twice the time, and the key frames determine the result
        frames=61,
        fps=32.0,
        key_latents="mode",
        prompt_suffix="",
        negative_prompt="",
    )
    config.data.frames, config.data.fps, config.data.slowest_fps, config.data.images = 33, 32.0, 8.0, 0
    config.batch, config.steps = 16, 10_000
    config.loss.logit_normal = (1.0, 1.3)  # sampling takes few steps, and the first one decides
    config.loss.posterior_mean = True  # the target is determined exactly
    config.optimizer.learning_rate = 3e-4
    config.prompts = ()
    if mode == "cpu":
        config.data.frames, config.batch, config.steps = 9, 8, 1500
        config.optimizer.learning_rate = 1e-3
    if mode == "tiny":
        config.data.frames, config.batch, config.steps = 5, 2, 20
        config.sampling.steps, config.sampling.frames = 2, 5
    return config
