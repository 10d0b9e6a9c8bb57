"""The base stage on Moving Shapes: joint image-video training (LaVie, section 3.2, Eq. 3) of the shipped model.

An image model is inflated and trained on clips of 16 frames with images, as in the paper with Stable Diffusion. Some
shapes and colours occur in images only. In this order:

    python train.py --config configs/moving_shapes/vae.py --workdir runs/vae
    python train.py --config configs/moving_shapes/image.py --workdir runs/image \\
        --config.vae_from=runs/vae/weights
    python train.py --config configs/moving_shapes/motion.py --workdir runs/motion \\
        --config.init_from=runs/image/weights
    python train.py --config configs/moving_shapes/base.py --workdir runs/base \\
        --config.init_from=runs/motion/weights

    python train.py --config configs/moving_shapes/base.py:tiny --workdir runs/base-tiny    # a minute on a CPU

Modes: "" for one GPU; "cpu" for 2 CPU cores and two hours (add `:cpu` to each file but the VAE's); "tiny". Hardware,
time and result: docs/training_moving_shapes.md. The mode "" has not been run.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import vae

PROMPTS = (
    "a small red circle moving left over a blue background",
    "a large yellow square moving right over a black background",
    "a large green triangle moving up over a white background",
    "a small purple star moving down over a gray background",
    "a large blue cross moving up left over a yellow background",
    "a small white ring moving down right over a green background",
    "a large orange circle standing still over a purple background",
    "a red circle moving left",
)


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = common.new_config("base")
    config.train_text_encoder = True  # from random weights: released text encoders are not specific to this data
    config.cpu_devices = 2

    config.vae = vae.get_config("tiny" if mode == "tiny" else "").vae
    common.set_fields(
        config.text_encoder,
        vocab_size=192,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    common.set_fields(
        config.unet,
        block_out_channels=(96, 128, 192),
        layers_per_block=1,
        attention_levels=(True, True, True),
        cross_attention_dim=128,
        attention_heads=(4, 4, 6),
        only_cross_attention=(False, False, False),
        norm_num_groups=16,
        temporal_attention="before_ff",
        temporal_position=True,
        motion_embedding=True,
        caption_modulation=True,
    )
    config.schedule.prediction = "v_prediction"  # better than noise prediction on this data
    common.set_fields(config.sampling, sampler="ddim", steps=20, guidance=4.0)

    config.data.images = 4
    config.batch = 32
    config.loss.logit_normal = (0.5, 1.3)  # outlines are decided at t = 300 to 600, directions at 700 to 900
    config.steps = 40_000
    config.optimizer.kind = "muon"  # needs half of Adam's steps; diverges at a learning rate of 3e-3
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 500
    config.optimizer.decay = "cosine"
    config.ema_decay = 0.999
    config.held_out_batches = 2
    config.checkpoint_every = config.sample_every = 2000
    config.prompts = PROMPTS

    if mode == "cpu":
        # The outermost level, 16x16, is the most expensive on a CPU: a third of the width, and no attention.
        config.unet.block_out_channels, config.unet.attention_heads = (32, 64, 96), (2, 4, 4)
        config.unet.attention_levels = (False, True, True)
        config.unet.norm_num_groups = 8
        config.text_encoder.num_hidden_layers = 2
        config.data.images, config.batch, config.steps = 3, 6, 1300
        config.optimizer.warmup = 100
        config.ema_decay = 0.995
        config.checkpoint_every = config.sample_every = config.held_out_every = 500
    if mode == "tiny":
        config.vae_from, config.cpu_devices = "random", 0
        # One level, with attention in the middle block: enough to run all the code, and less to compile.
        config.unet.block_out_channels, config.unet.attention_heads = (16,), (2,)
        config.unet.attention_levels, config.unet.only_cross_attention = (False,), (False,)
        config.unet.norm_num_groups = (
            4  # with one channel per group, biases before a norm would only learn rounding errors
        )
        config.unet.cross_attention_dim = config.text_encoder.hidden_size = 32
        config.text_encoder.intermediate_size, config.text_encoder.num_hidden_layers = 64, 1
        config.data.height = config.data.width = 32
        config.data.frames, config.data.images, config.batch = 4, 1, 2
        config.optimizer.kind = "adamw"  # also less to compile
        config.steps, config.optimizer.warmup, config.held_out_batches = 20, 5, 1
        config.log_every = config.held_out_every = config.checkpoint_every = config.sample_every = 10
        config.sampling.steps, config.prompts = 2, PROMPTS[:2]
    return config
