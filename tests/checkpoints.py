"""Writes tiny PyTorch checkpoints and diffusers folders, and runs the converter on them. Needs torch."""

import json
import zlib

import ml_dtypes
import numpy as np
import pytest

import convert_torch
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.stages import STAGES
from lavie_jax.weights.convert import missing_frequencies, video_config
from lavie_jax.weights.diffusers_configs import unet_config, vae_config
from lavie_jax.weights.expected import expected_shapes
from lavie_jax.weights.names import from_torch, to_torch
from lavie_jax.weights.safetensors_io import as_tensor

torch = pytest.importorskip("torch")

SD_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
X4_UNET = SD_UNET | {
    "in_channels": 7, "num_class_embeds": 20, "use_linear_projection": True, "only_cross_attention": [True, False],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32], "layers_per_block": 1, "latent_channels": 4,
       "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}  # fmt: skip
TEXT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 8, "hidden_act": "quick_gelu"}  # fmt: skip
SD_SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}  # fmt: skip
X4_SCHEDULER = SD_SCHEDULER | {"beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "v_prediction"}
LOW_RES_SCHEDULER = {"beta_start": 0.0001, "beta_end": 0.015, "beta_schedule": "scaled_linear"}

IMAGE = unet_config(SD_UNET)
X4_IMAGE = unet_config(X4_UNET)
STAGE_CONFIGS = {
    "base": video_config(IMAGE, STAGES["base"], 4),
    "prediction": video_config(IMAGE, STAGES["prediction"], 4),
    "interpolation": video_config(IMAGE, STAGES["interpolation"], 4),
    "vsr": video_config(X4_IMAGE, STAGES["vsr"], 4),
}


def state_dict(part, config, dialect="diffusers", dtype=np.float32):
    """Returns random torch tensors under PyTorch's names, including the buffers of the original checkpoints."""
    tensors = {}
    for path, shape in expected_shapes(config).items():
        values = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape) * 0.1
        name, array = to_torch(part, path, values.astype(dtype), dialect)
        array = np.ascontiguousarray(array)
        if dtype == ml_dtypes.bfloat16:
            tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensors[name] = torch.from_numpy(array)
    if part == "unet":
        for path, tensor in missing_frequencies(config, ours(tensors)).items():
            tensors[to_torch(part, path, tensor, dialect)[0]] = torch.from_numpy(tensor.read())
    if part == "text_encoder":
        prefix = "text_model." if dialect == "text_model" else ""
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(8)[None]
    return tensors


def ours(tensors):
    """Returns the tensors of a PyTorch UNet under our paths."""
    named = (from_torch("unet", name, tensor.float().numpy()) for name, tensor in tensors.items())
    return {path: as_tensor(array) for path, array in named}


def lavie(stage, dtype=np.float32):
    return state_dict("unet", STAGE_CONFIGS[stage], "diffusers" if stage == "vsr" else "lavie", dtype)


def write_model(folder, config, tensors, file):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / file)


def write_tokenizer(folder):
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TEXT["max_position_embeddings"]}))


def write_sd(folder, *, unet=SD_UNET, image=IMAGE, vae_dialect="old", text_dialect="text_model", suffix=""):
    """Writes a diffusers folder of .bin files; `suffix` is ".fp16" for the half-precision variant's names."""
    dtype = np.float16 if suffix else np.float32
    model, clip = f"diffusion_pytorch_model{suffix}.bin", f"pytorch_model{suffix}.bin"
    write_model(folder / "unet", unet, state_dict("unet", image, dtype=dtype), model)
    vae = state_dict("vae", vae_config(VAE), vae_dialect, dtype)
    write_model(folder / "vae", VAE, vae, model)
    text = state_dict("text_encoder", CLIPTextConfig(**TEXT), text_dialect, dtype)
    write_model(folder / "text_encoder", TEXT | {"model_type": "clip_text_model"}, text, clip)
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))
    return folder


def run(*args):
    """Runs convert_torch.py in this process. Returns its exit code."""
    try:
        return convert_torch.main([str(a) for a in args])
    except SystemExit as error:
        return error.code


def import_stage(stage, unet, pretrained, out, *more):
    return run("import", "--stage", stage, "--unet", unet, "--pretrained", pretrained, "--out", out, *more)


def import_base(unet, sd, out, *more):
    return import_stage("base", unet, sd, out, *more)


def refused(capsys, out, code, *, lines=1):
    """Checks a refusal (exit code 2, no traceback, nothing written) and returns its message."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and len(error.strip().splitlines()) == lines, error
    assert not out.exists() and not list(out.parent.glob(".*"))
    return error


def make_sd(tmp_path_factory):
    """Fixture: Stable Diffusion as a diffusers folder."""
    return write_sd(tmp_path_factory.mktemp("pretrained") / "sd")


def make_x4(tmp_path_factory):
    """Fixture: the x4-upscaler as a diffusers folder."""
    folder = write_sd(tmp_path_factory.mktemp("pretrained") / "x4", unet=X4_UNET, image=X4_IMAGE)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(X4_SCHEDULER))
    (folder / "low_res_scheduler").mkdir()
    (folder / "low_res_scheduler/scheduler_config.json").write_text(json.dumps(LOW_RES_SCHEDULER))
    return folder


def make_base(sd, tmp_path_factory):
    """Fixture: (a checkpoint of the base stage, the weights folder converted from it)."""
    folder = tmp_path_factory.mktemp("base")
    torch.save({"ema": lavie("base"), "step": 7}, folder / "lavie_base.pt")
    assert import_stage("base", folder / "lavie_base.pt", sd, folder / "base") == 0
    return folder / "lavie_base.pt", folder / "base"
