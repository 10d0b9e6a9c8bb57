"""An inflated model starts as the image model, which may also be a CompVis checkpoint."""

import functools
import json
import shutil
import zlib
from argparse import Namespace

import jax
import numpy as np
import pytest
from checkpoints import (
    IMAGE,
    SD_UNET,
    STAGE_CONFIGS,
    TEXT,
    VAE,
    X4_IMAGE,
    import_stage,
    lavie,
    make_base,
    make_sd,
    make_x4,
    ours,
    refused,
    run,
    state_dict,
    write_model,
    write_sd,
)
from flax.traverse_util import flatten_dict, unflatten_dict

from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.unet import UNet
from lavie_jax.stages import STAGES
from lavie_jax.weights import load_folder
from lavie_jax.weights.compvis import Sizes, rename
from lavie_jax.weights.diffusers_configs import unet_config, vae_config

torch = pytest.importorskip("torch")
sd = pytest.fixture(make_sd, scope="module")
x4 = pytest.fixture(make_x4, scope="module")
base = pytest.fixture(make_base, scope="module")


def random_array(name, *shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def apply(config, params, x, level=None):
    """Returns the UNet's output. Compiles without optimization, which would take most of the test's time."""
    text = random_array("text", 2, 3, 16)
    compiled = jax.jit(UNet(config).apply, compiler_options={"xla_backend_optimization_level": 0})
    return np.asarray(compiled({"params": params}, x, np.array([501, 37]), text, noise_level=level))


@functools.cache
def image_case(name):
    """Returns an input (B, 1, H, W, C), a noise level, and the image model's output for them."""
    image = {"sd": IMAGE, "x4": X4_IMAGE}[name]
    x, level = random_array("x", 2, 1, 4, 6, image.in_channels), np.array([3, 7]) if name == "x4" else None
    tensors = ours(state_dict("unet", image))
    params = unflatten_dict({path: tensor.read() for path, tensor in tensors.items()}, sep="/")
    return x, level, apply(image, params, x, level)


@pytest.mark.parametrize(
    "stage, frames",
    [
        ("base", 3),
        pytest.param("base", 1, marks=pytest.mark.heavy),
        pytest.param("vsr", 3, marks=pytest.mark.heavy),  # test_unet.py tests its new layers
    ],
)
def test_an_inflated_model_has_the_image_models_output(stage, frames, sd, x4, tmp_path):
    pretrained, name = (sd, "sd") if stage == "base" else (x4, "x4")
    assert run("inflate", "--stage", stage, "--pretrained", pretrained, "--out", tmp_path / "init") == 0
    unet = load_folder(tmp_path / "init", stage=stage).unet
    assert unet.config == STAGE_CONFIGS[stage]
    x, level, expected = image_case(name)
    video = apply(unet.config, unet.params, np.repeat(x, frames, axis=1), level)
    np.testing.assert_allclose(video, np.repeat(expected, frames, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.heavy  # prediction is likewise
def test_inflated_interpolation_initially_ignores_the_key_frames(base, tmp_path):
    """The tiny base has the spatial weights of the image model, so the output is the same image."""
    assert run("inflate", "--stage", "interpolation", "--from", base[1], "--out", tmp_path / "init") == 0
    inflated_weights = load_folder(tmp_path / "init", stage="interpolation")
    assert inflated_weights.sampling == STAGES["interpolation"].sampling
    unet = inflated_weights.unet
    assert unet.config == STAGE_CONFIGS["interpolation"]
    x, _, expected = image_case("sd")
    keys = random_array("keys", 2, 4, 4, 6, 4)  # different for each frame: they must not matter
    video = apply(unet.config, unet.params, np.concatenate([np.repeat(x, 4, axis=1), keys], axis=-1))
    np.testing.assert_allclose(video, np.repeat(expected, 4, axis=1), rtol=1e-4, atol=1e-5)


def test_inflated_prediction_outputs_what_the_base_outputs(base, tmp_path):
    """Temporal layers are copied too, and the mask and the masked latents have no effect until trained."""
    assert run("inflate", "--stage", "prediction", "--from", base[1], "--out", tmp_path / "init") == 0
    weights, source = load_folder(tmp_path / "init", stage="prediction"), load_folder(base[1])
    assert weights.sampling == STAGES["prediction"].sampling
    assert weights.unet.config == STAGE_CONFIGS["prediction"]
    x = random_array("x", 2, 3, 4, 6, 4)
    masked = STAGES["prediction"].condition(
        {"mask": np.array([[0, 1, 1]] * 2), "masked_latents": random_array("known", *x.shape)}
    )
    video = apply(weights.unet.config, weights.unet.params, np.concatenate([x, masked.concat], axis=-1))
    np.testing.assert_array_equal(video, apply(source.unet.config, source.unet.params, x))


def test_a_checkpoint_of_seine_is_told_from_one_of_the_base(base, sd, tmp_path, capsys):
    torch.save({"ema": lavie("prediction")}, tmp_path / "seine.pt")
    for stage, file, other in (("base", tmp_path / "seine.pt", "prediction"), ("prediction", base[0], "base")):
        code = import_stage(stage, file, sd, tmp_path / "out")
        assert f"is a checkpoint of the stage {other}" in refused(capsys, tmp_path / "out", code)


def test_interpolation_of_a_small_base_samples_at_its_size(base, tmp_path):
    shutil.copytree(base[1], tmp_path / "base")
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    config["sampling"] |= {"height": 64, "width": 96, "frames": 8, "fps": 4}
    path.write_text(json.dumps(config))
    assert run("inflate", "--stage", "interpolation", "--from", tmp_path / "base", "--out", tmp_path / "init") == 0
    size = {"height": 64, "width": 96, "frames": 29, "fps": 12}
    assert load_folder(tmp_path / "init").sampling == {**STAGES["interpolation"].sampling, **size}


def test_new_parameters_have_pytorchs_distributions(x4, tmp_path):
    for seed, name in ((0, "one"), (0, "two"), (1, "three")):
        args = ("--pretrained", x4, "--out", tmp_path / name, "--seed", seed)
        assert run("inflate", "--stage", "vsr", *args) == 0
    one, two, three = (load_folder(tmp_path / name).unet.params for name in ("one", "two", "three"))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    flat, other = flatten_dict(one, sep="/"), flatten_dict(three, sep="/")
    new = {path: a for path, a in flat.items() if "temporal" in path}
    zero = {path for path, a in new.items() if not a.any()}
    into_the_residual = ("attn_temporal/to_out_0/kernel", "shift_conv/kernel", "resblock_temporal/conv2/kernel")
    assert {p for p in zero if not p.endswith("bias")} == {p for p in new if p.endswith(into_the_residual)}
    block = "mid_temporal_block/resblocks_3d_t"
    for path in (f"{block}/time_emb_proj/kernel", f"{block}/conv1/kernel"):
        bound = 1 / np.sqrt(np.prod(new[path].shape[:-1]))
        assert 0.9 * bound < np.abs(new[path]).max() <= bound
        assert 0 < np.abs(new[path.replace("kernel", "bias")]).max() <= bound
        assert not np.array_equal(new[path], other[path])
    biases = np.concatenate([a.ravel() for p, a in new.items() if "relative_attention_bias" in p])
    assert abs(biases.std() - 1) < 0.1
    assert all((a == 1).all() for p, a in new.items() if p.endswith("scale"))


@pytest.mark.parametrize(
    ("stage", "other", "needed"), [("base", "x4", "Stable Diffusion"), ("vsr", "sd", "x4-upscaler")]
)
def test_a_model_of_another_kind_is_not_inflated(stage, other, needed, sd, x4, tmp_path, capsys):
    code = run("inflate", "--stage", stage, "--pretrained", {"x4": x4, "sd": sd}[other], "--out", tmp_path / "out")
    assert needed in refused(capsys, tmp_path / "out", code)


def test_inflation_is_strict(sd, tmp_path, capsys):
    broken = write_sd(tmp_path / "sd")
    tensors = state_dict("unet", IMAGE)
    tensors["more.weight"] = tensors.pop("conv_out.weight")
    write_model(broken / "unet", SD_UNET, tensors, "diffusion_pytorch_model.bin")
    code = run("inflate", "--stage", "base", "--pretrained", broken, "--out", tmp_path / "out")
    message = refused(capsys, tmp_path / "out", code, lines=3)
    assert "missing conv_out.weight" in message and "unexpected more.weight" in message


def to_compvis(part, name):
    """Converts a diffusers name to CompVis', for UNets with two levels of one layer and VAEs with two levels."""
    head, *rest = name.split(".", 3)
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    if part == "text_encoder":
        return f"cond_stage_model.transformer.{name}"
    if part == "unet":
        whole = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
        if head in whole:
            return f"model.diffusion_model.{whole[head]}.{rest[0]}"
        if head == "time_embedding":
            layer, leaf = rest[0].removeprefix("linear_"), rest[1]
            return f"model.diffusion_model.time_embed.{2 * (int(layer) - 1)}.{leaf}"
        if head == "mid_block":
            kind, number, leaf = name.split(".", 3)[1:]
            prefix = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        else:
            kind, leaf = rest[1], rest[2]
            number, leaf = leaf.split(".", 1)
            level = int(rest[0])
            if kind == "downsamplers":
                return f"model.diffusion_model.input_blocks.{2 * level + 2}.0.op.{leaf.removeprefix('conv.')}"
            if kind == "upsamplers":  # after the attention, if there is one
                return f"model.diffusion_model.output_blocks.{2 * level + 1}.{2 if level else 1}.{leaf}"
            side = "input" if head == "down_blocks" else "output"
            block = 2 * level + int(number) + (1 if side == "input" else 0)
            prefix = f"{side}_blocks.{block}.{0 if kind == 'resnets' else 1}"
        if kind == "resnets":
            module, leaf = leaf.split(".", 1)
            leaf = f"{inner[module]}.{leaf}"
        return f"model.diffusion_model.{prefix}.{leaf}"
    for diffusers, original in (
        ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
        ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
        ("mid_block.attentions.0.to_", "mid.attn_1."), ("encoder.down_blocks.", "encoder.down."),
        ("decoder.up_blocks.0.", "decoder.up.1."), ("decoder.up_blocks.1.", "decoder.up.0."),
        (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."), (".resnets.", ".block."),
        ("conv_norm_out.", "norm_out."), ("conv_shortcut.", "nin_shortcut."),
    ):  # fmt: skip
        name = name.replace(diffusers, original)
    return f"first_stage_model.{name}"


def write_compvis(file):
    """Writes a CompVis checkpoint of the tiny SD, with the unused tensors that such files contain."""
    image = unet_config(SD_UNET | {"attention_head_dim": 8})
    parts = {
        "unet": state_dict("unet", image),
        "vae": state_dict("vae", vae_config(VAE)),
        "text_encoder": state_dict("text_encoder", CLIPTextConfig(**TEXT), "text_model"),
    }
    tensors = {to_compvis(part, name): t for part, named in parts.items() for name, t in named.items()}
    for name, tensor in tensors.items():
        if ".mid.attn_1." in name and name.endswith("weight") and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    tensors |= {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.99), "model_ema.out2": torch.zeros(4)}
    torch.save({"state_dict": tensors, "callbacks": {"best": Namespace(score=0.5)}, "global_step": 1}, file)
    return tensors


def test_a_compvis_checkpoint_gives_the_same_weights_as_a_diffusers_folder(sd, tmp_path, capsys):
    write_compvis(tmp_path / "sd.ckpt")
    start = ("inflate", "--stage", "base", "--pretrained", tmp_path / "sd.ckpt")
    assert "--tokenizer" in refused(capsys, tmp_path / "out", run(*start, "--out", tmp_path / "out"))
    assert run(*start, "--tokenizer", sd / "tokenizer", "--out", tmp_path / "out") == 0
    assert run("inflate", "--stage", "base", "--pretrained", sd, "--out", tmp_path / "same") == 0
    one, two = load_folder(tmp_path / "out"), load_folder(tmp_path / "same")
    assert one.vae.config == two.vae.config
    assert one.unet.config.attention_heads == (8, 8)
    for part in ("vae", "text_encoder"):
        assert jax.tree.all(jax.tree.map(np.array_equal, getattr(one, part).params, getattr(two, part).params))
    params = (flatten_dict(w.unet.params, sep="/") for w in (one, two))
    spatial = [{p: a for p, a in flat.items() if "temporal" not in p} for flat in params]
    assert spatial[0].keys() == spatial[1].keys()
    assert all(np.array_equal(array, spatial[1][path]) for path, array in spatial[0].items())


def test_names_of_the_real_compvis_file_are_converted():
    """Names of sd-v1-4.ckpt, with block numbers that the tiny checkpoint does not have."""
    sizes = Sizes(unet_layers=2, vae_levels=4)
    for part, original, diffusers in (
        ("unet", "input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("unet", "input_blocks.11.0.out_layers.3.bias", "down_blocks.3.resnets.1.conv2.bias"),
        ("unet", "output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("unet", "output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        ("unet", "output_blocks.11.1.proj_in.weight", "up_blocks.3.attentions.2.proj_in.weight"),
        ("vae", "decoder.up.3.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
        ("vae", "decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("vae", "encoder.down.2.downsample.conv.bias", "encoder.down_blocks.2.downsamplers.0.conv.bias"),
    ):
        assert rename(part, original, sizes) == diffusers


def test_unexpected_tensors_of_a_compvis_checkpoint_are_reported(sd, tmp_path, capsys):
    tensors = write_compvis(tmp_path / "sd.ckpt")
    tensors["somebody.else"] = torch.zeros(3)
    torch.save({"state_dict": tensors}, tmp_path / "sd.ckpt")
    args = ("--pretrained", tmp_path / "sd.ckpt", "--tokenizer", sd / "tokenizer", "--out", tmp_path / "out")
    message = refused(capsys, tmp_path / "out", run("inflate", "--stage", "base", *args), lines=2)
    assert "unexpected somebody.else [3]" in message
