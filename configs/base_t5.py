r"""The base stage with T5 as its text encoder, at full size: LaVie's proposal for prompts with several subjects.

LaVie mixes up the subjects of prompts that name two of them (arXiv 2309.15103, appendix E). The authors suggest a
stronger text encoder, such as T5, instead of CLIP's.

    python convert_torch.py inflate --stage base --pretrained stable-diffusion-v1-4/ \\
        --text-encoder flan-t5-xl/ --out weights/base-t5-init
    python train.py --config configs/base_t5.py --workdir runs/base-t5 \\
        --config.data.path=CLIPS --config.data.image_path=IMAGES --config.distributed=True
    python train.py --config configs/base_t5.py:tiny --workdir runs/base-t5-tiny    # a minute on a CPU
    python sample.py --weights runs/base-t5-tiny/weights --prompt "a red circle moving left" --out samples

The encoder of FLAN-T5 XL (1.2 billion parameters, 2048 wide) is frozen. A linear layer maps its output to the 768
channels that Stable Diffusion's cross-attention reads (`encoder_hid_proj`, as diffusers names it): a part of the UNet,
which is trained as a whole. Cross-attention was trained on CLIP's output and has to learn T5's, so the run is longer
than `base.py`'s. The paper describes no training with T5; all values are our choices.

Hardware: a TPU pod, as for `base.py`; the frozen encoder adds 2.4 GB in bfloat16, split by `mesh.fsdp`. Expected
result: unknown, as this project has not run it at full size; a test builds the program with `eval_shape`.
docs/multi_subject.md is about prompts with two subjects.

Modes: "" and "tiny" (Moving Shapes, from random weights).
"""

from ml_collections import ConfigDict

from configs import base, common


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("tiny",))
    config = base.get_config(mode)
    if mode == "tiny":
        common.set_t5(
            config, vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, length=16,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        config.unet.encoder_hid_dim = config.text_encoder.d_model
        return config
    common.set_t5(
        config, d_model=2048, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu"
    )  # FLAN-T5 XL, as T5 v1.1 XL
    config.unet.encoder_hid_dim = config.text_encoder.d_model
    config.init_from = "weights/base-t5-init"
    config.steps = 500_000
    return config
