"""Video super-resolution on Moving Shapes (LaVie, section 3.4): 256x256 frames from 64x64 ones.

As in the paper, an image upscaler is trained first, and then only the temporal layers, on clips and on images under a
moving camera.

    python train.py --config configs/moving_shapes/vsr_vae.py --workdir runs/vsr_vae \\
        --config.init_from=lavie_jax/assets/base
    python train.py --config configs/moving_shapes/upscaler.py --workdir runs/upscaler \\
        --config.vae_from=runs/vsr_vae/weights
    python train.py --config configs/moving_shapes/vsr.py --workdir runs/vsr \\
        --config.init_from=runs/upscaler/weights
    python train.py --config configs/moving_shapes/vsr.py:tiny --workdir runs/vsr-tiny    # a minute on a CPU

Clips are patches of 128x128 from frames of 256x256. The network is conditioned on their low-resolution frames of 32x32,
with noise added, and on the level of that noise. The UNet is small, because its levels have 16 times as many positions
as the base stage's, and only the deepest level has attention. The prediction starts from a linear map of the
low-resolution frame over neighbouring pixels (`low_res_skip`). With a map of single pixels, it was worse than bicubic
enlargement after 2000 steps. The text encoder comes from the shipped base model.

Modes: "" for one GPU; "cpu" for 2 CPU cores; "tiny" (a minute on a CPU, from random weights). Hardware, time and result
of "cpu": docs/training_moving_shapes.md. The mode "" has not been run.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = base.get_config(mode)
    common.set_stage(config, "vsr")
    config.inflate = True  # init_from contains the image upscaler: temporal layers start as the identity
    config.regime = "joint" if mode == "tiny" else "temporal_only"
    config.train_text_encoder = mode == "tiny"  # without init_from, the text encoder is untrained
    if not mode:
        config.text_encoder = base.get_config("cpu").text_encoder  # the shipped one, in every mode
    common.set_fields(
        config.unet,
        in_channels=7,
        block_out_channels=(24, 48, 96),
        attention_levels=(False, False, True),
        cross_attention_dim=config.text_encoder.hidden_size,
        attention_heads=(1, 1, 4),
        only_cross_attention=(True, True, False),
        norm_num_groups=8,
        num_class_embeds=1000,
        motion_embedding=False,
        caption_modulation=False,
        low_res_skip=True,
        temporal_resblocks=True,
        down_temporal_idx=(0, 1, 2),
        mid_temporal=True,
        up_temporal_idx=(0, 1, 2),
        temporal_norm_groups=8,
    )
    common.set_fields(
        config.sampling,
        sampler="ddim",
        steps=2,  # the low-resolution frames determine nearly everything
        guidance=1.0,  # none: it would take twice the time
        noise_level=0,
        frames=61,
        fps=32.0,
        prompt_suffix="",
        negative_prompt="",
    )
    config.data.frames, config.data.fps, config.data.images = 8, 32.0, 0
    config.data.height = config.data.width = 128
    config.data.full_height = config.data.full_width = 256
    config.data.handheld = 0.25
    config.batch, config.steps = 16, 10_000
    config.loss.logit_normal = (1.0, 1.3)  # sampling takes few steps, and the first one decides
    config.loss.posterior_mean = True  # the target is determined exactly
    config.optimizer.learning_rate = 1e-3
    config.prompts = ()
    if mode == "cpu":
        config.batch, config.steps = 2, 800
    if mode == "tiny":
        config.unet.block_out_channels, config.unet.attention_heads = (16,), (2,)
        config.unet.attention_levels, config.unet.only_cross_attention = (False,), (False,)
        config.unet.down_temporal_idx, config.unet.up_temporal_idx = (), (0,)
        config.data.height = config.data.width = 32
        config.data.full_height = config.data.full_width = 48
        config.data.frames, config.batch, config.steps = 3, 2, 20
        config.sampling.steps, config.sampling.frames = 2, 3
    return config
