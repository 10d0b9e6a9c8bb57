"""LaVie's temporal interpolation at full size (arXiv 2309.15103, section 3.3): 61 frames from 16 key frames.

    python convert_torch.py inflate --stage interpolation --from weights/base --out weights/interpolation-init
    python train.py --config configs/interpolation.py --workdir runs/interpolation \\
        --config.data.path=CLIPS --config.distributed=True
    python train.py --config configs/interpolation.py:tiny --workdir runs/interpolation-tiny    # a minute on a CPU

The spatial weights come from a base model, and temporal attention is new. The first convolution takes four more
channels: the latents of the key frames, repeated to the target frame rate. As in the paper, patches have 256x256
pixels, the data are WebVid10M and later Vimeo25M (`--config.data.path`), and dropped captions become the word "None".
The paper does not give the learning rate, the batch size or the number of steps. Those are our choices, and so are the
24 frames per second, the rate of the original's output, and training without images (with `data.images`, an image is a
clip of one frame and its own key frame).

Hardware: a TPU pod. Expected result: unknown, as this project has not run it at full size; a test builds the program
with `eval_shape`.

Modes: "" and "tiny" (Moving Shapes, from random weights).
"""

from ml_collections import ConfigDict

from configs import base, common
from configs.moving_shapes import interpolation as moving_shapes


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return moving_shapes.get_config("tiny")
    config = base.get_config()
    common.set_stage(config, "interpolation")
    config.init_from = "weights/interpolation-init"  # a base model, inflated by convert_torch.py
    config.unet.in_channels = 8
    config.unet.spatial_attention = "sparse_causal"
    config.unet.temporal_attention = "after_ff"
    config.unet.temporal_position = False
    config.data.frames, config.data.fps, config.data.images, config.data.image_path = 61, 24.0, 0, None
    config.data.height = config.data.width = 256
    config.data.full_height, config.data.full_width = 320, 512
    config.batch = 32
    config.steps = 100_000
    config.prompts = ()
    return config
