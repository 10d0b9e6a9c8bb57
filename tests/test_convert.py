"""convert_torch.py, driven as a person drives it, on tiny checkpoints made here."""

import argparse
import collections
import json
import os
import pickle
import shelve
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import convert_torch
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.unet import UNet, UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.weights import folder_hash, load_folder
from lavie_jax.weights.convert import missing_frequencies, video_config
from lavie_jax.weights.expected import expected_shapes
from lavie_jax.weights.names import to_torch
from lavie_jax.weights.safetensors_io import read_safetensors, write_safetensors

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

IMAGE = UNetConfig.from_diffusers(SD_UNET, "image")
X4_IMAGE = UNetConfig.from_diffusers(X4_UNET, "image")
STAGE_CONFIGS = {
    "base": video_config(IMAGE, "base", 4),
    "interpolation": video_config(IMAGE, "interpolation", 4),
    "vsr": video_config(X4_IMAGE, "vsr", 4),
}


def state_dict(part, config, dialect="diffusers", dtype=np.float32):
    """Random torch tensors under PyTorch's names, the buffers included that the originals have."""
    tensors = {}
    for path, shape in expected_shapes(config).items():
        draw = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape) * 0.1
        name, array = to_torch(part, path, draw.astype(dtype), dialect)
        array = np.ascontiguousarray(array)
        bfloat16 = dtype == ml_dtypes.bfloat16
        tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(array)
    if part == "unet":
        for path, tensor in missing_frequencies(config, ours(tensors)).items():
            tensors[to_torch(part, path, tensor, dialect)[0]] = torch.from_numpy(tensor.read())
    if part == "text_encoder":
        prefix = "text_model." if dialect == "text_model" else ""
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(8)[None]
    return tensors


def ours(tensors):
    """A torch UNet's tensors under our paths."""
    from lavie_jax.weights.names import from_torch
    from lavie_jax.weights.safetensors_io import as_tensor

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


def write_sd(folder, *, unet=SD_UNET, image=IMAGE, vae_dialect="old", text_dialect="text_model", suffix=""):
    """A diffusers folder of .bin files; `suffix` ".fp16" for the half-precision variant's names."""
    dtype = np.float16 if suffix else np.float32
    model, clip = f"diffusion_pytorch_model{suffix}.bin", f"pytorch_model{suffix}.bin"
    write_model(folder / "unet", unet, state_dict("unet", image, dtype=dtype), model)
    vae = state_dict("vae", VAEConfig.from_diffusers(VAE), vae_dialect, dtype)
    write_model(folder / "vae", VAE, vae, model)
    text = state_dict("text_encoder", CLIPTextConfig(**TEXT), text_dialect, dtype)
    write_model(folder / "text_encoder", TEXT | {"model_type": "clip_text_model"}, text, clip)
    write_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SD_SCHEDULER))
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_sd(tmp_path_factory.mktemp("pretrained") / "sd")


@pytest.fixture(scope="module")
def x4(tmp_path_factory):
    folder = write_sd(tmp_path_factory.mktemp("pretrained") / "x4", unet=X4_UNET, image=X4_IMAGE)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(X4_SCHEDULER))
    (folder / "low_res_scheduler").mkdir()
    (folder / "low_res_scheduler/scheduler_config.json").write_text(json.dumps(LOW_RES_SCHEDULER))
    return folder


@pytest.fixture(scope="module")
def base(sd, tmp_path_factory):
    """(the original checkpoint, the weights folder made of it)."""
    folder = tmp_path_factory.mktemp("base")
    torch.save({"ema": lavie("base"), "step": 7}, folder / "lavie_base.pt")
    assert run("import", "--stage", "base", "--unet", folder / "lavie_base.pt", "--pretrained", sd, "--out", folder / "base") == 0
    return folder / "lavie_base.pt", folder / "base"


def run(*args):
    """The exit code of convert_torch.py."""
    try:
        return convert_torch.main([str(a) for a in args])
    except SystemExit as error:
        return error.code


def import_base(unet, sd, out, *more):
    return run("import", "--stage", "base", "--unet", unet, "--pretrained", sd, "--out", out, *more)


def refused(capsys, out, code, *, lines=1):
    """The message of a refusal: exit code 2, no traceback, nothing written."""
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and len(error.strip().splitlines()) == lines, error
    assert not out.exists() and not list(out.parent.glob(".*"))
    return error


# ---- import and export


def test_import_has_what_sampling_needs(base, sd):
    original, folder = base
    weights = load_folder(folder, stage="base")
    assert weights.sampling["frames"] == 16 and weights.sampling["sampler"] == "ddpm"
    assert (weights.schedule.kind, weights.schedule.beta_start, weights.schedule.beta_end) == ("linear", 1e-4, 0.02)
    assert weights.schedule.prediction == "epsilon"
    assert weights.unet.config == STAGE_CONFIGS["base"]
    assert weights.vae.config.scaling_factor == 0.18215
    assert {p.name for p in weights.tokenizer_dir.iterdir()} == {p.name for p in (sd / "tokenizer").iterdir()}
    ema = torch.load(original, weights_only=True)["ema"]
    params = flatten_dict(weights.unet.params, sep="/")
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    path = block.replace(".0", "_0").replace(".", "/")
    np.testing.assert_array_equal(params["conv_in/kernel"], ema["conv_in.weight"].permute(2, 3, 1, 0))
    np.testing.assert_array_equal(params[f"{path}/attn_temporal/to_q/kernel"], ema[f"{block}.attn_temp.to_q.weight"].T)
    np.testing.assert_array_equal(params[f"{path}/norm_temporal/scale"], ema[f"{block}.norm_temp.weight"])
    assert not [p for p in params if "freqs" in p]


@pytest.mark.parametrize("stage", ["base", "interpolation", "vsr"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_export_gives_back_every_byte(stage, dtype, sd, x4, tmp_path, capsys):
    original, folder = tmp_path / "original.pt", tmp_path / "weights"
    tensors = lavie(stage, dtype)
    torch.save({"ema": tensors}, original)
    pretrained = x4 if stage == "vsr" else sd
    assert run("import", "--stage", stage, "--unet", original, "--pretrained", pretrained, "--out", folder) == 0
    assert run("export", "--weights", folder, "--out", tmp_path / "back.pt", "--check", original) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) and back[name].is_contiguous(), name
    assert run("export", "--weights", folder, "--out", tmp_path / "back.safetensors") == 0
    safetensors = pytest.importorskip("safetensors.torch").load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(safetensors[name], tensor) for name, tensor in tensors.items())
    load_folder(folder, stage=stage)


def test_check_names_what_differs(base, tmp_path, capsys):
    original, folder = base
    tensors = torch.load(original, weights_only=True)["ema"]
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    tensors["conv_out.bias"] = tensors["conv_out.bias"].half()
    tensors["extra"] = tensors.pop("conv_out.weight")
    torch.save(tensors, tmp_path / "other.pt")
    assert run("export", "--weights", folder, "--check", tmp_path / "other.pt") == 1
    said = capsys.readouterr().out
    for expected in ("conv_in.bias has other values", "conv_out.bias is float32", "missing extra", "added conv_out.weight"):
        assert expected in said
    assert "4 differ" in said


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_parts_go_back_too(part, base, sd):
    file = next(p for p in (sd / part).iterdir() if p.suffix == ".bin")
    assert run("export", "--weights", base[1], "--part", part, "--check", file) == 0


def test_containers_are_the_same_model(base, sd, tmp_path):
    tensors = torch.load(base[0], weights_only=True)["ema"]
    torch.save(tensors, tmp_path / "top.pt")
    torch.save({"ema": tensors}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"ema": collections.OrderedDict((k, torch.nn.Parameter(v, v.is_floating_point())) for k, v in tensors.items())}, tmp_path / "parameters.pt")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "flat.safetensors", arrays, {})
    for file in sorted(tmp_path.iterdir()):
        out = tmp_path / "out" / file.stem
        assert import_base(file, sd, out) == 0
        assert folder_hash(out) == folder_hash(base[1]), file.name


def test_names_of_old_and_new_files_mean_the_same(base, sd, tmp_path):
    new = write_sd(tmp_path / "new", vae_dialect="diffusers", text_dialect="diffusers")
    assert import_base(base[0], new, tmp_path / "out") == 0
    for part in ("vae", "text_encoder"):
        one, two = (getattr(load_folder(f), part).params for f in (base[1], tmp_path / "out"))
        assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
        file = next(p for p in (new / part).iterdir() if p.suffix == ".bin")
        assert run("export", "--weights", tmp_path / "out", "--part", part, "--check", file) == 0


def test_half_precision_variant(base, tmp_path):
    half = write_sd(tmp_path / "half", suffix=".fp16")
    assert import_base(base[0], half, tmp_path / "out") == 0
    weights = load_folder(tmp_path / "out")
    assert {a.dtype for a in jax.tree.leaves(weights.vae.params)} == {np.dtype(np.float16)}
    assert {a.dtype for a in jax.tree.leaves(weights.unet.params)} == {np.dtype(np.float32)}
    cast = load_folder(tmp_path / "out", dtype=np.float32)
    assert {a.dtype for a in jax.tree.leaves(cast.vae.params)} == {np.dtype(np.float32)}


def test_shared_parts_are_named(base, sd, tmp_path):
    assert import_base(base[0], sd, tmp_path / "out", "--share", base[1]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "scheduler", "unet"]
    assert folder_hash(tmp_path / "out") == folder_hash(base[1])
    assert load_folder(tmp_path / "out").vae.config == load_folder(base[1]).vae.config


def test_super_resolution_keeps_the_schedules_of_x4(x4, tmp_path):
    torch.save(lavie("vsr"), tmp_path / "vsr.pt")
    assert run("import", "--stage", "vsr", "--unet", tmp_path / "vsr.pt", "--pretrained", x4, "--out", tmp_path / "out") == 0
    weights = load_folder(tmp_path / "out", stage="vsr")
    assert (weights.schedule.kind, weights.schedule.beta_end) == ("linear", 0.02)  # what LaVie was trained with
    assert weights.schedule.prediction == "v_prediction"
    assert (weights.low_res_schedule.kind, weights.low_res_schedule.beta_end) == ("scaled_linear", 0.015)
    assert weights.vae.config.scaling_factor == 0.08333


def test_trained_here_exports_the_frequencies(base, tmp_path):
    """A model without PyTorch's buffers goes back to what the official scripts load strictly."""
    original, folder = base
    path = tmp_path / "trained/unet/model.safetensors"
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        copy = tmp_path / "trained" / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    tensors, metadata = read_safetensors(path)
    write_safetensors(path.with_suffix(".new"), {k: v for k, v in tensors.items() if "freqs" not in k}, metadata)
    path.with_suffix(".new").replace(path)
    assert run("export", "--weights", tmp_path / "trained", "--out", tmp_path / "back.pt", "--check", original) == 0
    width = 16  # channels of a head of the tiny model
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn_temp.rotary_emb.freqs"
    freqs = 1.0 / (10000 ** (torch.arange(0, width, 2)[: width // 2].float() / width))
    assert torch.equal(torch.load(tmp_path / "back.pt", weights_only=True)["ema"][block], freqs)


# ---- what a pickle may hold


class Callback:
    def __init__(self):
        self.best = torch.ones(2)


class Settings(dict):
    """Like the AttributeDict that trainers save: a dict of a class of its own."""


def test_foreign_objects_are_inert(base, sd, tmp_path):
    checkpoint = {
        "ema": torch.load(base[0], weights_only=True)["ema"],
        "args": argparse.Namespace(lr=1e-4, path=Path("x")),
        "loss": np.float64(0.5),
        "rng": np.arange(3),
        "callbacks": {Callback: Callback()},
        "settings": Settings(a=Settings(b=1)),
        "default": collections.defaultdict(list, {"a": [1]}),
        "queue": collections.deque([1, 2]),
        "set": {1, 2},
    }
    for name, zipped in (("new.pt", True), ("legacy.pt", False)):
        torch.save(checkpoint, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert import_base(tmp_path / name, sd, tmp_path / f"out-{name}") == 0
        assert folder_hash(tmp_path / f"out-{name}") == folder_hash(base[1])


class Calls:
    """Unpickles by calling a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, exec, eval, open])
def test_hostile_pickles_are_refused(function, zipped, base, sd, tmp_path, capsys):
    marker = tmp_path / "ran"
    argument = {os.system: f"touch {marker}", open: str(marker)}.get(function, f"open({str(marker)!r}, 'w')")
    tensors = torch.load(base[0], weights_only=True)["ema"]
    call = Calls(function, argument, "w") if function is open else Calls(function, argument)
    torch.save({"ema": tensors, "x": call}, tmp_path / "hostile.pt", _use_new_zipfile_serialization=zipped)
    message = refused(capsys, tmp_path / "out", import_base(tmp_path / "hostile.pt", sd, tmp_path / "out"))
    assert function.__name__ in message and "refused" in message
    assert not marker.exists()


def test_unknown_functions_are_never_called(base, sd, tmp_path):
    """Also not when no list of ours knows that they are harmful."""
    tensors = torch.load(base[0], weights_only=True)["ema"]
    torch.save({"ema": tensors, "x": Calls(shelve.open, str(tmp_path / "ran"))}, tmp_path / "odd.pt")
    assert import_base(tmp_path / "odd.pt", sd, tmp_path / "out") == 0
    assert not list(tmp_path.glob("ran*"))


# ---- refusals


def test_every_misfit_is_in_one_report(base, sd, tmp_path, capsys):
    tensors = torch.load(base[0], weights_only=True)["ema"]
    del tensors["conv_out.bias"], tensors["mid_block.attentions.0.transformer_blocks.0.norm_temp.weight"]
    tensors["mid_block.extra.weight"] = torch.zeros(3, 5)
    tensors["odd.weight"] = torch.zeros(1, 1, 1)
    tensors["conv_in.weight"] = torch.zeros(32, 5, 3, 3)
    torch.save(tensors, tmp_path / "broken.pt")
    vae = torch.load(sd / "vae/diffusion_pytorch_model.bin", weights_only=True)
    broken = write_sd(tmp_path / "sd")
    write_model(broken / "vae", VAE, {k: v for k, v in vae.items() if k != "quant_conv.bias"}, "diffusion_pytorch_model.bin")
    message = refused(capsys, tmp_path / "out", import_base(tmp_path / "broken.pt", broken, tmp_path / "out"), lines=7)
    for expected in (
        "missing conv_out.bias [4]",
        "missing mid_block.attentions.0.transformer_blocks.0.norm_temp.weight [64]",
        "unexpected mid_block.extra.weight [3, 5]",
        "odd.weight has 3 axes",
        "conv_in.weight has shape [32, 5, 3, 3], not [32, 4, 3, 3]",
        "missing quant_conv.bias [8]",
    ):
        assert expected in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused(part, value, base, sd, tmp_path, capsys):
    unet, pretrained = base[0], sd
    if part == "unet":
        tensors = torch.load(base[0], weights_only=True)["ema"]
        tensors["conv_out.weight"][0, 0, 0, 0] = value
        unet = tmp_path / "nan.pt"
        torch.save(tensors, unet)
    else:
        pretrained = write_sd(tmp_path / "sd")
        file = next(p for p in (pretrained / part).iterdir() if p.suffix == ".bin")
        tensors = torch.load(file, weights_only=True)
        next(iter(tensors.values())).view(-1)[0] = value
        torch.save(tensors, file)
    assert "NaN or Inf" in refused(capsys, tmp_path / "out", import_base(unet, pretrained, tmp_path / "out"))


def damaged(kind, base, tmp_path):
    content = base[0].read_bytes()
    bad = {
        "cut.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "text.pt": b"<html>not found</html>",
        "cut.safetensors": (base[1] / "unet/model.safetensors").read_bytes()[:-4],
        "header.safetensors": (base[1] / "unet/model.safetensors").read_bytes()[:100],
        "huge.safetensors": b"\xff" * 64,
        "list.pt": pickle.dumps([1, 2], protocol=2),
    }
    (tmp_path / kind).write_bytes(bad[kind])
    return tmp_path / kind


@pytest.mark.parametrize(
    "kind", ["cut.pt", "empty.pt", "text.pt", "list.pt", "cut.safetensors", "header.safetensors", "huge.safetensors"]
)
def test_damaged_files_are_refused(kind, base, sd, tmp_path, capsys):
    file = damaged(kind, base, tmp_path)
    assert file.name in refused(capsys, tmp_path / "out", import_base(file, sd, tmp_path / "out"))


def test_wrong_arguments_are_refused(base, sd, tmp_path, capsys):
    original, folder = base
    out = tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    start = ("import", "--stage", "base", "--unet", original, "--pretrained")
    for args, hint in (
        ((*start, tmp_path / "nowhere", "--out", out), "does not exist"),
        ((*start, tmp_path / "empty", "--out", out), "tokenizer"),
        ((*start, sd, "--out", out, "--tokenizer", tmp_path / "empty"), "tokenizer"),
        ((*start, original, "--out", out), "neither a diffusers folder nor a CompVis"),
        ((*start, sd, "--out", tmp_path / "file/out"), "is a file"),
        ((*start, sd, "--out", tmp_path / "file"), "exists already"),
        (("import", "--stage", "bass", "--unet", original, "--pretrained", sd, "--out", out), "invalid choice"),
        (("import", "--stage", "base", "--unet", tmp_path / "no.pt", "--pretrained", sd, "--out", out), "does not exist"),
        (("import", "--stage", "base", "--unet", tmp_path / "none.pt", "--pretrained", sd, "--out", out), "no tensors"),
        (("inflate", "--stage", "base", "--out", out), "--pretrained"),
        (("inflate", "--stage", "interpolation", "--pretrained", sd, "--out", out), "--from"),
        (("inflate", "--stage", "interpolation", "--from", sd, "--out", out), "no weights folder"),
        (("export", "--weights", folder), "--check"),
        (("export", "--weights", folder, "--out", tmp_path / "x.zip"), ".pt or .safetensors"),
        (("export", "--weights", tmp_path / "empty", "--out", tmp_path / "x.pt"), "no weights folder"),
    ):
        assert hint in refused(capsys, out, run(*args)), args
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_overwritten_unasked(base, sd, tmp_path, capsys):
    original, folder = base
    (tmp_path / "back.pt").write_text("mine")
    assert run("export", "--weights", folder, "--out", tmp_path / "back.pt") == 2
    assert (tmp_path / "back.pt").read_text() == "mine"
    assert run("export", "--weights", folder, "--out", tmp_path / "back.pt", "--overwrite") == 0
    assert import_base(original, sd, tmp_path / "out") == 0
    (tmp_path / "out/notes.txt").write_text("mine")
    assert import_base(original, sd, tmp_path / "out") == 2
    assert (tmp_path / "out/notes.txt").exists()
    assert import_base(original, sd, tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out/notes.txt").exists() and load_folder(tmp_path / "out")


# ---- the CompVis layout


def to_compvis(part, name):
    """A diffusers name in the original layout; for UNets of two levels of one layer and VAEs of two levels."""
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
            return "model.diffusion_model." + name.replace("time_embedding.linear_1", "time_embed.0").replace("time_embedding.linear_2", "time_embed.2")
        if head == "mid_block":
            kind, number, leaf = name.split(".", 3)[1:]
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        else:
            kind, leaf = rest[1], rest[2]
            number, leaf = leaf.split(".", 1)
            level = int(rest[0])
            if kind == "downsamplers":
                return f"model.diffusion_model.input_blocks.{2 * level + 2}.0.op.{leaf.removeprefix('conv.')}"
            if kind == "upsamplers":  # behind an attention, where there is one
                return f"model.diffusion_model.output_blocks.{2 * level + 1}.{2 if level else 1}.{leaf}"
            way = "input" if head == "down_blocks" else "output"
            block = 2 * level + int(number) + (1 if way == "input" else 0)
            place = f"{way}_blocks.{block}.{0 if kind == 'resnets' else 1}"
        if kind == "resnets":
            module, leaf = leaf.split(".", 1)
            leaf = f"{inner[module]}.{leaf}"
        return f"model.diffusion_model.{place}.{leaf}"
    for ours, theirs in (
        ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."), ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
        ("mid_block.attentions.0.to_", "mid.attn_1."), ("encoder.down_blocks.", "encoder.down."),
        ("decoder.up_blocks.0.", "decoder.up.1."), ("decoder.up_blocks.1.", "decoder.up.0."),
        (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."), (".resnets.", ".block."),
        ("conv_norm_out.", "norm_out."), ("conv_shortcut.", "nin_shortcut."),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def write_compvis(file):
    """A CompVis checkpoint of the tiny SD, with what such files drag along."""
    image = UNetConfig.from_diffusers(SD_UNET | {"attention_head_dim": 8}, "image")
    parts = {
        "unet": state_dict("unet", image),
        "vae": state_dict("vae", VAEConfig.from_diffusers(VAE)),
        "text_encoder": state_dict("text_encoder", CLIPTextConfig(**TEXT), "text_model"),
    }
    tensors = {to_compvis(part, name): t for part, named in parts.items() for name, t in named.items()}
    for name, tensor in tensors.items():
        if ".mid.attn_1." in name and name.endswith("weight") and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    tensors |= {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.99), "model_ema.diffusion_modelxout2bias": torch.zeros(4)}
    torch.save({"state_dict": tensors, "callbacks": {Callback: Callback()}, "global_step": 1}, file)
    return tensors


def test_compvis_checkpoint(sd, tmp_path, capsys):
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


def test_compvis_names_of_the_real_file():
    """Places of the numbering that the tiny checkpoint does not have; names as in sd-v1-4.ckpt."""
    from lavie_jax.weights.compvis import Sizes, _rename

    sizes = Sizes(unet_layers=2, vae_levels=4)
    for part, theirs, ours in (
        ("unet", "input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("unet", "input_blocks.11.0.out_layers.3.bias", "down_blocks.3.resnets.1.conv2.bias"),
        ("unet", "output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("unet", "output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        ("unet", "output_blocks.11.1.proj_in.weight", "up_blocks.3.attentions.2.proj_in.weight"),
        ("vae", "decoder.up.3.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
        ("vae", "decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("vae", "encoder.down.2.downsample.conv.bias", "encoder.down_blocks.2.downsamplers.0.conv.bias"),
    ):
        assert _rename(part, theirs, sizes) == ours


def test_compvis_strangers_are_reported(sd, tmp_path, capsys):
    tensors = write_compvis(tmp_path / "sd.ckpt")
    tensors["somebody.else"] = torch.zeros(3)
    torch.save({"state_dict": tensors}, tmp_path / "sd.ckpt")
    args = ("--pretrained", tmp_path / "sd.ckpt", "--tokenizer", sd / "tokenizer", "--out", tmp_path / "out")
    assert "unexpected somebody.else [3]" in refused(capsys, tmp_path / "out", run("inflate", "--stage", "base", *args), lines=2)


# ---- inflation


def draw(name, *shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def image_output(config, tensors, x, text, level):
    """What the image model makes of each image of x (B, 1, H, W, C)."""
    params = load_params(config, tensors)
    return jax.jit(UNet(config).apply)({"params": params}, x, np.array([501, 37]), text, noise_level=level)


def load_params(config, tensors):
    from flax.traverse_util import unflatten_dict

    return unflatten_dict({p: t.read() for p, t in ours(tensors).items() if p in expected_shapes(config)}, sep="/")


@pytest.mark.parametrize("stage", ["base", "vsr"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_inflated_gives_what_the_image_model_gives(stage, frames, sd, x4, tmp_path):
    pretrained, image = (sd, IMAGE) if stage == "base" else (x4, X4_IMAGE)
    assert run("inflate", "--stage", stage, "--pretrained", pretrained, "--out", tmp_path / "init") == 0
    unet = load_folder(tmp_path / "init", stage=stage).unet
    assert unet.config == STAGE_CONFIGS[stage]
    x, text = draw("x", 2, 1, 4, 6, image.in_channels), draw("text", 2, 3, 16)
    level = np.array([3, 7]) if stage == "vsr" else None
    expected = image_output(image, state_dict("unet", image), x, text, level)
    copies = np.repeat(x, frames, axis=1)
    video = jax.jit(UNet(unet.config).apply)({"params": unet.params}, copies, np.array([501, 37]), text, noise_level=level)
    np.testing.assert_allclose(video, np.repeat(expected, frames, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 4])
def test_inflated_interpolation_ignores_the_key_frames_at_first(frames, base, tmp_path):
    assert run("inflate", "--stage", "interpolation", "--from", base[1], "--out", tmp_path / "init") == 0
    unet = load_folder(tmp_path / "init", stage="interpolation").unet
    assert unet.config == STAGE_CONFIGS["interpolation"]
    spatial = {n: t for n, t in torch.load(base[0], weights_only=True)["ema"].items() if "_temp." not in n}
    x, text = draw("x", 2, 1, 4, 6, 4), draw("text", 2, 3, 16)
    expected = image_output(IMAGE, spatial, x, text, None)
    keys = draw("keys", 2, frames, 4, 6, 4)  # different frames: they must not matter
    given = np.concatenate([np.repeat(x, frames, axis=1), keys], axis=-1)
    video = jax.jit(UNet(unet.config).apply)({"params": unet.params}, given, np.array([501, 37]), text)
    np.testing.assert_allclose(video, np.repeat(expected, frames, axis=1), rtol=1e-4, atol=1e-5)


def test_new_parameters_are_drawn_as_pytorch_draws_them(x4, tmp_path):
    for seed, name in ((0, "one"), (0, "two"), (1, "three")):
        args = ("--pretrained", x4, "--out", tmp_path / name, "--seed", seed)
        assert run("inflate", "--stage", "vsr", *args) == 0
    one, two, three = (load_folder(tmp_path / name).unet.params for name in ("one", "two", "three"))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    flat, other = flatten_dict(one, sep="/"), flatten_dict(three, sep="/")
    new = {path: a for path, a in flat.items() if "temporal" in path}
    zero = {path for path, a in new.items() if not a.any()}
    assert {p for p in zero if not p.endswith("bias")} == {
        p for p in new if p.endswith(("attn_temporal/to_out_0/kernel", "shift_conv/kernel", "resblock_temporal/conv2/kernel"))
    }
    linear, conv = "mid_temporal_block/resblocks_3d_t/time_emb_proj/kernel", "mid_temporal_block/resblocks_3d_t/conv1/kernel"
    for path in (linear, conv):
        bound = 1 / np.sqrt(np.prod(new[path].shape[:-1]))
        assert 0.9 * bound < np.abs(new[path]).max() <= bound
        assert 0 < np.abs(new[path.replace("kernel", "bias")]).max() <= bound
        assert not np.array_equal(new[path], other[path])
    biases = np.concatenate([a.ravel() for p, a in new.items() if "relative_attention_bias" in p])
    assert abs(biases.std() - 1) < 0.1
    assert all((a == 1).all() for p, a in new.items() if p.endswith("scale"))


def test_inflation_is_strict(sd, tmp_path, capsys):
    broken = write_sd(tmp_path / "sd")
    tensors = state_dict("unet", IMAGE)
    tensors["more.weight"] = tensors.pop("conv_out.weight")
    write_model(broken / "unet", SD_UNET, tensors, "diffusion_pytorch_model.bin")
    code = run("inflate", "--stage", "base", "--pretrained", broken, "--out", tmp_path / "out")
    message = refused(capsys, tmp_path / "out", code, lines=3)
    assert "missing conv_out.weight" in message and "unexpected more.weight" in message
