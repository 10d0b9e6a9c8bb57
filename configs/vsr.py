"""LaVie's video super-resolution at full size (arXiv 2309.15103, section 3.4): frames of four times the size.

    python convert_torch.py inflate --stage vsr --pretrained stable-diffusion-x4-upscaler/ --out weights/vsr-init
    python train.py --config configs/vsr.py --workdir runs/vsr \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/vsr.py:tiny --workdir runs/vsr-tiny    # a minute on a CPU

The x4-upscaler gets new temporal layers, and only those are trained: every parameter with `temporal` in its name, 217.6
M of 691.0 M. Clips are patches of 320x320. The network is conditioned on their low-resolution frames of 80x80, with
noise added, and on the level of that noise, and it predicts v. CLIPS and IMAGES have sides of 1024 and more (the paper
uses WebVid10M and Laion5B). Images become clips under a hand-held camera, by smooth random translations.

The paper does not give the fraction of images, the distribution of noise levels (here 351 u^3, rounded down, with u
uniform in [0, 1): levels 0 to 350, mostly low ones), the length of a clip (here 8, as in the original's sampling), the
learning rate, the batch size or the number of steps. Those are our choices.

Hardware: a TPU pod. Expected result: unknown, as this project has not run it at full size; a test builds the program
with `eval_shape`.

Modes: "" and "tiny" (Moving Shapes, from random weights).
"""

from ml_collections import ConfigDict

from configs import base, common
from configs.moving_shapes import vsr as moving_shapes


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return moving_shapes.get_config("tiny")
    config = base.get_config()
    common.set_stage(config, "vsr")
    config.init_from = "weights/vsr-init"  # the x4-upscaler, inflated by convert_torch.py
    config.regime = "temporal_only"

    common.set_fields(
        config.unet,
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        attention_levels=(False, True, True, True),
        cross_attention_dim=1024,
        only_cross_attention=(True, True, True, False),
        use_linear_projection=True,
        num_class_embeds=1000,
        temporal_resblocks=True,
        down_temporal_idx=(0, 1, 2, 3),
        mid_temporal=True,
        up_temporal_idx=(0, 1, 2, 3),
    )
    common.set_fields(  # OpenCLIP ViT-H
        config.text_encoder,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    )
    config.vae.block_out_channels = (128, 256, 512)
    config.schedule.prediction = "v_prediction"
    config.sampling.frames, config.sampling.fps = 61, 24.0  # not those of the training clips

    config.data.frames, config.data.fps, config.data.images = 8, 24.0, 0
    config.data.height = config.data.width = 320
    config.data.full_height, config.data.full_width = 1280, 2048
    config.data.handheld = 0.25
    config.batch = 32
    config.steps = 100_000
    config.prompts = ()
    return config
