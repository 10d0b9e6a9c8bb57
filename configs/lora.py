"""A LoRA of LaVie's base stage at full size (arXiv 2309.15103, section 4.4): a subject or style from a few pictures.

    python train.py --config configs/lora.py --workdir runs/cat --config.data.image_path=PICTURES \\
        --config.data.image_captions="['a photo of sks cat']"
    python sample.py --weights weights/base --lora runs/cat/weights --prompt "a sks cat walking on a beach"
    python train.py --config configs/lora.py:tiny --workdir runs/lora-tiny    # a minute on a CPU

PICTURES is a folder with a `.txt` beside each picture, or without: then all have the caption of `image_captions`. Only
low-rank changes of the UNet's spatial attention are trained, on images; temporal layers, text encoder and VAE are
frozen, so that the motion stays the base's. `lora.targets` can add feed-forward layers and convolutions. To preserve
what the base knows of a class, mix in its own samples of "a photo of a cat":

    --config.data.source=mixture --config.data.image_parts="['video_folder:PICTURES', 'video_folder:CLASS']" \\
    --config.data.image_captions="['a photo of sks cat', 'a photo of a cat']" --config.data.image_path=None

docs/personalise.md explains each step. The paper names neither a method nor settings; these are usual values for Stable
Diffusion. For a base of another architecture add `--config.unet=None --config.text_encoder=None --config.vae=None`.

Hardware: one accelerator; a test builds the program with `eval_shape`. Expected result: unknown, not run at full size.

Modes: "" and "tiny" (Moving Shapes, from the included base).
"""

from ml_collections import ConfigDict

from configs import base, common
from configs.moving_shapes import lora as moving_shapes


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return moving_shapes.get_config("tiny")
    config = base.get_config()
    config.init_from = "weights/base"  # converted by convert_torch.py, or trained
    common.set_subject(config, images=1)
    config.workers = 0
    config.batch = 4
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.steps = 1000
    config.optimizer.learning_rate, config.optimizer.warmup = 1e-4, 0
    config.prompts = ("a sks cat walking on a beach", "a cat walking on a beach")
    config.held_out_every = config.checkpoint_every = config.sample_every = 250
    config.metrics = ()
    return config
