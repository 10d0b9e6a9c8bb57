"""LaVie's base stage at full size (arXiv 2309.15103, sections 3.1, 3.2): 16 frames of 320x512 with 4 images.

    python convert_torch.py inflate --stage base --pretrained stable-diffusion-v1-4/ --out weights/base-init
    python train.py --config configs/base.py --workdir runs/base \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/base.py:tiny --workdir runs/base-tiny    # a minute on a CPU

CLIPS is a folder of videos with captions (`clip.mp4` + `clip.txt`); docs/data.md has other sources, mixtures and
curricula. The paper trained on WebVid10M and Laion5B, then on Vimeo25M. It gives neither alpha, learning rate, batch
size nor steps: those here are choices. Hardware: a TPU pod; `fsdp` is the axis that splits parameters, EMA and
optimizer state. Never run at full size by this project, so time and result are not known; the program is built under
`eval_shape` in a test.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base as small_world


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "" and "tiny" (the same program on Moving Shapes, from random weights)."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return small_world.get_config("tiny")
    config = common.training()
    config.stage = "base"
    config.init_from = "weights/base-init"  # Stable Diffusion 1.4, inflated
    config.inflate = False  # `convert_torch.py inflate` did it; so a trained model can be given too
    config.vae_from = ""  # the one of init_from
    config.text_from = ""  # likewise
    config.train_text_encoder = False

    config.unet = ConfigDict(
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_levels": (True, True, True, False),
            "cross_attention_dim": 768,
            "attention_heads": (8, 8, 8, 8),
            "only_cross_attention": (False, False, False, False),
            "norm_num_groups": 32,
            "temporal_attention": "before_ff",
            "temporal_position": True,
        }
    )
    config.text_encoder = ConfigDict(  # CLIP ViT-L/14
        {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
        }
    )
    config.vae = ConfigDict(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "patch_size": 1,
        }
    )
    config.schedule = ConfigDict(
        {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps": 1000, "prediction": "epsilon"}
    )
    config.sampling = ConfigDict({"sampler": "ddpm", "steps": 50, "guidance": 7.5})

    config.data = common.clips()
    config.workers = 8
    config.batch = 64
    config.remat = "block"
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.loss = ConfigDict(
        {
            "alpha": 1.0,
            "min_snr_gamma": 0.0,
            "high_noise": 0.0,
            "logit_normal": (),  # timesteps are uniform
            "posterior_mean": False,
            "held_out_timesteps": (100, 300, 500, 700, 900),
        }
    )
    config.steps = 300_000
    config.prompts = ("a teddy bear walking on the street", "a panda playing the guitar, 2k, high quality")
    config.held_out_every = config.checkpoint_every = config.sample_every = 5000
    config.tensorboard = True
    return config
