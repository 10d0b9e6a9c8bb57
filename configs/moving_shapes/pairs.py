"""An image model of two objects, to compare how often a CLIP-like and a T5-like text encoder mix them up (appendix E).

    python train.py --config configs/moving_shapes/pairs.py --workdir runs/pairs-clip
    python train.py --config configs/moving_shapes/pairs.py:t5 --workdir runs/pairs-t5
    python -m lavie_jax.evaluation.pairs --images --weights runs/pairs-clip/weights
    python -m lavie_jax.evaluation.pairs --images --weights runs/pairs-t5/weights
    python train.py --config configs/moving_shapes/pairs.py:tiny --workdir runs/pairs-tiny    # a minute on a CPU

The UNet starts from the included base model, which has seen one object at a time. The text encoder starts from random
weights and is trained with it. Both encoders have the same depth and width and nearly as many parameters, and see the
same images in the same order. Images only: shapes and colours are mixed up in single frames too.

Modes: "" (CLIP-like), "t5" (T5-like), "tiny" (CLIP-like, from random weights). Hardware: CPU, one core. Time and
result: docs/multi_subject.md.
"""

from ml_collections import ConfigDict

from configs import common
from configs.moving_shapes import image


def get_config(mode: str = "") -> ConfigDict:
    """Returns the config of a mode."""
    common.check_mode(mode, ("t5", "tiny"))
    config = image.get_config("tiny" if mode == "tiny" else "cpu")
    config.data.objects = 2
    config.data.images_from_clips = 0.0  # motion words are not used
    config.text_encoder.max_position_embeddings = 24
    config.prompts = (
        "a red circle and a blue square over a black background",
        "a green star and a yellow triangle over a white background",
        "a purple cross and an orange ring over a gray background",
        "a white heart and a pink circle over a blue background",
    )
    if mode == "tiny":
        return config
    config.init_from, config.text_from = "lavie_jax/assets/base", "random"
    if mode == "t5":
        # A gated layer has three matrices instead of two: 2/3 of the width, so that it has as many parameters.
        common.set_t5(
            config, vocab_size=64, d_model=128, d_kv=32, d_ff=336, num_layers=2, num_heads=4, length=24,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    config.cpu_devices = 1
    config.data.images, config.batch, config.steps = 1, 16, 1500
    config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.decay = 1e-3, 50, "constant"
    config.ema_decay = 0.99
    config.log_every = config.held_out_every = 100
    config.checkpoint_every = config.sample_every = 500
    return config
