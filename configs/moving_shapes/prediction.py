"""Prediction on Moving Shapes (LaVie, section 4.4; SEINE, arXiv 2310.20700): clips of which some frames are known.

    python train.py --config configs/moving_shapes/prediction.py --workdir runs/prediction \\
        --config.init_from=runs/base/weights
    python train.py --config configs/moving_shapes/prediction.py:tiny --workdir runs/prediction-tiny

Everything comes from a Moving Shapes base model, whose text encoder is now frozen. The input channels of the mask and
of the masked latents are new. Which frames of a clip are known is drawn for each clip (`config.known`). Each frame also
sees the nearest known frames on both sides, moved in the caption's direction, and its prediction starts from them
(`known_frames_around`), as in interpolation. Targets and known frames are the mode of the VAE's posterior, so that a
known frame determines its target exactly.

Modes: "" for one GPU; "cpu" for 2 CPU cores (from `base.py:cpu`); "tiny" (a minute on a CPU, from random weights).
Hardware, time and result of "cpu": docs/training_moving_shapes.md. The mode "" has not been run.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import base


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("cpu", "tiny"))
    config = base.get_config(mode)
    common.set_stage(config, "prediction")
    config.init_from = "lavie_jax/assets/base" if mode == "cpu" else ""  # the shipped model has this size
    config.inflate = True  # init_from contains a base model
    config.train_text_encoder = mode == "tiny"  # without init_from, the text encoder is untrained
    config.unet.in_channels = 9
    config.unet.known_frames_around = True
    common.set_fields(
        config.sampling,
        sampler="ddim",
        steps=20,
        guidance=2.0,  # the first frame is nearer to the picture than with 4, and follows the caption as well
        known_frames=1,  # clips end where the object has to turn, and the motion of more known frames would continue
        known_latents="mode",
        known_prediction="exact",  # the mode of a known frame determines its target
    )
    config.data.images = 1
    config.steps = 20_000
    config.loss.logit_normal = (0.9, 1.4)  # mostly noise levels at which positions are decided
    config.loss.posterior_mean = True
    if mode == "cpu":
        config.data.images, config.batch, config.steps = 0, 4, 500
        config.optimizer.kind = "adamw"  # compiles in half the time of Muon
        config.optimizer.learning_rate, config.optimizer.warmup = 5e-4, 10
        config.ema_decay = 0.97
        config.held_out_every = config.checkpoint_every = config.sample_every = 100
        config.prompts = ()
    if mode == "tiny":
        config.steps, config.sampling.steps = 20, 2
    return config
