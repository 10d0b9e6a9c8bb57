"""LaVie's temporal interpolation at full size (arXiv 2309.15103, section 3.3): 61 frames from 16 key frames.

    python convert_torch.py inflate --stage interpolation --from weights/base --out weights/interpolation-init
    python train.py --config configs/interpolation.py --workdir runs/interpolation \\
        --config.data.path=CLIPS --config.distributed=True
    python train.py --config configs/interpolation.py:tiny --workdir runs/interpolation-tiny    # a minute on a CPU

Spatial weights come from a base model, temporal attention starts anew, and the first convolution takes the latents
of the key frames, duplicated to the target frame rate, as four more channels. As in the paper: patches of 256x256,
WebVid10M first and Vimeo25M later (`--config.data.path`), dropped captions become the word "None". The paper
gives neither learning rate, batch size nor steps: those here are choices; so is the frame rate of 24, which
the original writes, and that no images are trained beside the clips (`data.images` may be set: an image is then a
clip of one frame, its own key frame).
Hardware: a TPU pod. Never run at full size by this project, so time and result are not yet measured; the
program is built under `eval_shape` in a test.
"""

from ml_collections import ConfigDict

from configs import base, common
from configs.moving_shapes import interpolation as small_world


def get_config(mode: str = "") -> ConfigDict:
    """Modes: "" and "tiny" (the same program on Moving Shapes, from random weights)."""
    common.check_mode(mode, ("tiny",))
    if mode == "tiny":
        return small_world.get_config("tiny")
    config = base.get_config()
    config.stage = "interpolation"
    config.init_from = "weights/interpolation-init"  # a base model, inflated
    config.unet.in_channels = 8
    config.unet.spatial_attention = "sparse_causal"
    config.unet.temporal_attention = "after_ff"
    config.unet.temporal_position = False
    config.sampling = ConfigDict({"sampler": "respaced_ddim", "steps": 50, "guidance": 4.0, "frames": 61, "fps": 24.0})
    config.data.frames, config.data.fps, config.data.images, config.data.image_path = 61, 24.0, 0, None
    config.data.height = config.data.width = 256
    config.data.full_height, config.data.full_width = 320, 512
    config.batch = 32
    config.steps = 100_000
    config.prompts = ()
    return config
