"""LaVie's video super-resolution at full size (arXiv 2309.15103, section 3.4): frames of four times the size.

    python convert_torch.py inflate --stage vsr --pretrained stable-diffusion-x4-upscaler/ --out weights/vsr-init
    python train.py --config configs/vsr.py --workdir runs/vsr \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/vsr.py:tiny --workdir runs/vsr-tiny    # a minute on a CPU

The x4-upscaler with new temporal layers, which alone are trained: what has `temporal` in its name, 217.6 M of 691.0 M
parameters. Clips are patches of 320x320 with their 80x80 low-resolution frames, noised at a level that the network is
told; it predicts v. CLIPS and IMAGES have sides of 1024 and more (the paper: WebVid10M, Laion5B); images become
clips by smooth random translations, a hand-held camera. The paper gives neither the share of images, the range of
noise levels (uniform from 0 to 350 here), the length of a clip (8, as the original samples), learning rate, batch size
nor steps: choices.
Hardware: a TPU pod. Never run at full size by this project, so time and result are not yet measured; the
program is built under `eval_shape` in a test.
"""

from ml_collections import ConfigDict

from configs import base, common
from configs.moving_shapes import vsr as small_world


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "" and "tiny" (the same program on Moving Shapes, from random weights)."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return small_world.get_config("tiny")
    config = base.get_config()
    config.stage = "vsr"
    config.init_from = "weights/vsr-init"  # the x4-upscaler, inflated
    config.regime = "temporal_only"

    config.unet = ConfigDict(
        {
            "in_channels": 7,
            "out_channels": 4,
            "block_out_channels": (256, 512, 512, 1024),
            "layers_per_block": 2,
            "attention_levels": (False, True, True, True),
            "cross_attention_dim": 1024,
            "attention_heads": (8, 8, 8, 8),
            "only_cross_attention": (True, True, True, False),
            "use_linear_projection": True,
            "num_class_embeds": 1000,
            "norm_num_groups": 32,
            "temporal_attention": "before_ff",
            "temporal_position": True,
            "temporal_resblocks": True,
            "down_temporal_idx": (0, 1, 2, 3),
            "mid_temporal": True,
            "up_temporal_idx": (0, 1, 2, 3),
        }
    )
    config.text_encoder = ConfigDict(  # OpenCLIP ViT-H
        {
            "vocab_size": 49408,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "max_position_embeddings": 77,
            "hidden_act": "gelu",
        }
    )
    config.vae.block_out_channels = (128, 256, 512)
    config.schedule.prediction = "v_prediction"
    config.sampling = ConfigDict(
        {"sampler": "ddim", "steps": 50, "guidance": 5.0, "noise_level": 50, "frames": 61, "fps": 24.0}
    )

    config.data.frames, config.data.fps, config.data.images = 8, 24.0, 0
    config.data.height = config.data.width = 320
    config.data.full_height, config.data.full_width = 1280, 2048
    config.data.handheld = 0.25
    config.batch = 32
    config.steps = 100_000
    config.prompts = ()
    return config
