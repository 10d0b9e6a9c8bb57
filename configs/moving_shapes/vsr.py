"""Video super-resolution on Moving Shapes (LaVie section 3.4): 256x256 frames from 64x64 ones.

As in the paper: an image upscaler first, then the temporal layers alone, on clips and on stills under a moving camera.

    python train.py --config configs/moving_shapes/vsr_vae.py --workdir runs/vsr_vae \\
        --config.init_from=lavie_jax/assets/base
    python train.py --config configs/moving_shapes/upscaler.py --workdir runs/upscaler \\
        --config.vae_from=runs/vsr_vae/weights
    python train.py --config configs/moving_shapes/vsr.py --workdir runs/vsr \\
        --config.init_from=runs/upscaler/weights
    python train.py --config configs/moving_shapes/vsr.py:tiny --workdir runs/vsr-tiny    # a minute on a CPU

Patches of 128x128 from frames of 256x256, with their low-resolution frames of 32x32, noised at a level that the
network is told. The UNet is small, because all its levels see 16 times as many places as the base's; only the
deepest attends. It starts from a linear map of the low-resolution frame, neighbours too (`low_res_skip`); with one of
each place alone it was worse than bicubic enlargement after 2000 steps. The text encoder is the shipped base's.

Modes: "" for one GPU, "cpu" for 2 CPU cores, "tiny" (a minute on a CPU, from random weights).
Hardware, time and result of "cpu": docs/moving_shapes.md. "" was not run yet.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "", "cpu" and "tiny"."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = base.get_config(mode)
    config.stage = "vsr"
    config.inflate = True  # what init_from holds is the image upscaler: temporal layers change nothing at first
    config.regime = "joint" if mode == "tiny" else "temporal_only"
    config.train_text_encoder = mode == "tiny"  # from random weights, there is none to start from
    if not mode:
        config.text_encoder = base.get_config("cpu").text_encoder  # the shipped one, whatever else the mode enlarges
    config.unet = ConfigDict(
        {
            "in_channels": 7,
            "out_channels": 4,
            "block_out_channels": (24, 48, 96),
            "layers_per_block": 1,
            "attention_levels": (False, False, True),
            "cross_attention_dim": config.text_encoder.hidden_size,
            "attention_heads": (1, 1, 4),
            "only_cross_attention": (True, True, False),
            "norm_num_groups": 8,
            "num_class_embeds": 1000,
            "low_res_skip": True,
            "temporal_attention": "before_ff",
            "temporal_position": True,
            "temporal_resblocks": True,
            "down_temporal_idx": (0, 1, 2),
            "mid_temporal": True,
            "up_temporal_idx": (0, 1, 2),
            "temporal_norm_groups": 8,
        }
    )
    # The low-resolution frames say nearly all: few steps, and no guidance, which would take twice the time.
    config.sampling = ConfigDict(
        {"sampler": "ddim", "steps": 2, "guidance": 1.0, "noise_level": 0, "frames": 61, "fps": 32.0,
         "prompt_suffix": "", "negative_prompt": ""}
    )  # fmt: skip
    config.data.frames, config.data.fps, config.data.images = 8, 32.0, 0
    config.data.height = config.data.width = 128
    config.data.full_height = config.data.full_width = 256
    config.data.handheld = 0.25
    config.batch, config.steps = 16, 10_000
    config.loss.logit_normal = (1.0, 1.3)  # few steps are sampled, and the first of them decides
    config.loss.posterior_mean = True  # what is to be made is known to the last grey level
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
