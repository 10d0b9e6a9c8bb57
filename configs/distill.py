"""Distillation of a stage at full size: a student that is sampled without guidance, or in a few steps.

    python train.py --config configs/distill.py --workdir runs/base-distilled \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/distill.py:vsr --workdir runs/vsr-lcm --config.distill.kind=consistency \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python sample.py --weights runs/base-distilled/weights --prompt "a panda playing the guitar"
    python train.py --config configs/distill.py:tiny --workdir runs/distill-tiny    # minutes on a CPU

The teacher is `init_from`, a weights folder of the stage, and the student starts from its weights. With
`distill.kind=guidance` (arXiv 2210.03142, section 3.1), one pass of the student predicts what the teacher predicts in
two. With `consistency` (LCM, arXiv 2310.04378), the student makes a video in 1 to 8 steps, also without guidance. The
student's weights folder records how it is sampled. The teacher's guidance scale is that of its folder, or
`distill.guidance`. The paper does not distil; the values here are our choices, after those of the LCM paper.

Hardware: a TPU pod, as for the stage; the teacher adds its parameters in bfloat16, split by `mesh.fsdp`. Expected
result: unknown, as this project has not run it at full size; a test builds the program with `eval_shape`.
docs/speed.md describes both kinds.

Modes: "" for the base stage, "prediction", "interpolation", "vsr", and "tiny" (Moving Shapes, from the included base).
"""

from ml_collections import ConfigDict

from configs import base, common, interpolation, prediction, vsr
from configs.moving_shapes import distill as moving_shapes

STAGES = {"": base, "prediction": prediction, "interpolation": interpolation, "vsr": vsr}


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, (*STAGES, "tiny"))
    if mode == "tiny":
        return moving_shapes.get_config("tiny")
    config = STAGES[mode].get_config()
    config.init_from = f"weights/{config.stage}"  # converted by convert_torch.py, or trained
    common.set_student(config)
    config.optimizer.learning_rate = 1e-5
    config.steps = 10_000
    config.held_out_every = config.checkpoint_every = config.sample_every = 1000
    return config
