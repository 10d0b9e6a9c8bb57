"""Prediction at full size (LaVie, section 4.4; SEINE, arXiv 2310.20700): 16 frames of 320x512, some of them known.

    python convert_torch.py inflate --stage prediction --from weights/base --out weights/prediction-init
    python train.py --config configs/prediction.py --workdir runs/prediction \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/prediction.py:tiny --workdir runs/prediction-tiny    # a minute on a CPU

All weights come from a base model. The first convolution takes five more channels: the mask and the latents of the
masked clip. Which frames of a clip are known is drawn for each clip by the weights in the group `known`: the first
frames, the first and the last, random ones, or none. Images have no known frames. As in SEINE, noise is added to the
latents only, and the loss is that of all frames. SEINE's data, masks, learning rate, batch size and number of steps are
not published. Those are our choices. To continue from its released weights, convert them and set `init_from`.

Hardware: a TPU pod, such as a v5e:4x4. Expected result: unknown, as this project has not run it at full size; a test
builds the program with `eval_shape`.

Modes: "" and "tiny" (Moving Shapes, from random weights).
"""

from ml_collections import ConfigDict

from configs import base, common
from configs.moving_shapes import prediction as moving_shapes


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return moving_shapes.get_config("tiny")
    config = base.get_config()
    common.set_stage(config, "prediction")
    config.init_from = "weights/prediction-init"  # a base model, inflated by convert_torch.py
    config.unet.in_channels = 9
    config.steps = 100_000
    config.prompts = ()
    return config
