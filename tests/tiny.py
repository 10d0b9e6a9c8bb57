"""Writes weights folders with tiny random models and a tokenizer of a few words, each within a second."""

import dataclasses
import zlib
from pathlib import Path

import jax
import numpy as np

from lavie_jax.data.tokens import save_small_tokenizer
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.registry import abstract_params
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.weights import save_folder

WORDS = ("a", "red", "blue", "circle", "square", "moving", "left", "right")
CONTEXT = 8  # tokens, including those of start and end
SAMPLING = {
    "height": 16, "width": 24, "frames": 4, "fps": 8, "sampler": "ddim", "steps": 3, "guidance": 4.0,
    "prompt_suffix": "", "negative_prompt": "",
}  # fmt: skip

UNET = UNetConfig(
    block_out_channels=(16,),
    layers_per_block=1,
    attention_levels=(False,),  # in the mid block only: half as much to compile
    attention_heads=(2,),
    only_cross_attention=(False,),
    cross_attention_dim=16,
    norm_num_groups=8,
    temporal_attention="before_ff",
    temporal_position=True,
)
UNETS = {
    "base": UNET,
    "prediction": dataclasses.replace(UNET, in_channels=9),
    "interpolation": dataclasses.replace(
        UNET, in_channels=8, temporal_attention="after_ff", temporal_position=False, spatial_attention="sparse_causal"
    ),
    "vsr": dataclasses.replace(
        UNET, in_channels=7, num_class_embeds=300, temporal_resblocks=True, down_temporal_idx=(0,), mid_temporal=True,
        temporal_norm_groups=8,
    ),
}  # fmt: skip
LATER_SAMPLING = {
    "prediction": {"sampler": "respaced_ddpm", "steps": 4, "known_frames": 2},
    "interpolation": {"sampler": "respaced_ddim", "fps": 24, "prompt_suffix": " right", "negative_prompt": "square"},
    "vsr": {"negative_prompt": "blue", "noise_level": 50},
}
VAE_CONFIG = VAEConfig(block_out_channels=(16,), norm_num_groups=8, patch_size=4)  # one level: less to compile
TEXT = CLIPTextConfig(
    vocab_size=256,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=CONTEXT,
)


def random_params(config) -> dict:
    """Returns float32 parameters of a config's network, seeded by their paths and scaled to keep activations near 1."""

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape).astype(np.float32)
        if name.endswith(("scale", "bias")):
            return values * 0.1 + name.endswith("scale")
        return values / np.float32(np.prod(leaf.shape[:-1]) ** 0.5)

    return jax.tree_util.tree_map_with_path(value, abstract_params(config))


def make_base(path: Path, **sampling) -> Path:
    """Writes the folder of the base stage; `sampling` overrides SAMPLING."""
    return make_stage(path, "base", **sampling)


def make_stage(path: Path, stage: str, **sampling) -> Path:
    """Writes the folder of a stage; `sampling` overrides SAMPLING and LATER_SAMPLING."""
    config = UNETS[stage]
    tokenizer = save_small_tokenizer(path.with_name(f"{path.name}-tokenizer"), WORDS, length=CONTEXT)
    save_folder(
        path,
        stage=stage,
        sampling={**SAMPLING, **LATER_SAMPLING.get(stage, {}), **sampling},
        unet=(config, random_params(config)),
        vae=(VAE_CONFIG, random_params(VAE_CONFIG)),
        text_encoder=(TEXT, random_params(TEXT)),
        tokenizer=tokenizer,
        schedule=STAGES[stage].schedule,
        low_res_schedule=STAGES[stage].low_res_schedule,
    )
    return path


def make_cascade(path: Path) -> Path:
    """Writes a folder with all three stages."""
    for stage in UNETS:
        make_stage(path / stage, stage)
    return path
