"""LaVie's base stage at full size (arXiv 2309.15103, sections 3.1 and 3.2): 16 frames of 320x512 with 4 images.

    python convert_torch.py inflate --stage base --pretrained stable-diffusion-v1-4/ --out weights/base-init
    python train.py --config configs/base.py --workdir runs/base \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/base.py:tiny --workdir runs/base-tiny    # a minute on a CPU

CLIPS is a folder of videos with captions (`clip.mp4` beside `clip.txt`); docs/data.md describes other sources, mixtures
and curricula. The paper trained on WebVid10M and Laion5B, then on Vimeo25M. It does not give alpha, the learning rate,
the batch size or the number of steps; the values here are our choices.

Hardware: a TPU pod. `mesh.fsdp` splits the parameters, their EMA and the optimizer state. Expected result: unknown, as
this project has not run it at full size; a test builds the program with `eval_shape`.

Modes: "" and "tiny" (Moving Shapes, from random weights).
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base as moving_shapes


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return moving_shapes.get_config("tiny")
    config = common.new_config("base")
    config.init_from = "weights/base-init"  # Stable Diffusion 1.4, inflated by convert_torch.py
    config.unet.temporal_attention = "before_ff"
    config.unet.temporal_position = True
    # CLIP ViT-L/14
    common.set_fields(config.text_encoder, hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    common.set_fields(config.vae, block_out_channels=(128, 256, 512, 512), layers_per_block=2)

    common.clip_folder(config.data)
    config.workers = 8
    config.batch = 64
    config.remat = "block"
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.steps = 300_000
    config.prompts = ("a teddy bear walking on the street", "a panda playing the guitar, 2k, high quality")
    config.held_out_every = config.checkpoint_every = config.sample_every = 5000
    config.metrics = ("tensorboard",)
    return config
