"""convert_torch.py import and export, through the command line, on tiny checkpoints."""

import collections
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    STAGE_CONFIGS,
    VAE,
    import_base,
    import_stage,
    lavie,
    make_base,
    make_sd,
    make_x4,
    refused,
    run,
    write_model,
    write_sd,
)
from flax.traverse_util import flatten_dict

from lavie_jax.weights import folder_hash, load_folder
from lavie_jax.weights.safetensors_io import read_safetensors, write_safetensors

torch = pytest.importorskip("torch")
sd = pytest.fixture(make_sd, scope="module")
x4 = pytest.fixture(make_x4, scope="module")
base = pytest.fixture(make_base, scope="module")


def test_an_imported_folder_is_complete(base, sd):
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


@pytest.mark.parametrize(
    "stage, dtype",
    [
        ("base", ml_dtypes.bfloat16),
        ("prediction", np.float16),
        ("interpolation", np.float16),
        ("vsr", np.float32),
    ],
)
def test_export_gives_back_every_byte(stage, dtype, sd, x4, tmp_path, capsys):
    original, folder = tmp_path / "original.pt", tmp_path / "weights"
    tensors = lavie(stage, dtype)
    torch.save({"ema": tensors}, original)
    pretrained = x4 if stage == "vsr" else sd
    assert import_stage(stage, original, pretrained, folder) == 0
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
    output = capsys.readouterr().out
    assert "conv_in.bias has different values" in output and "conv_out.bias is float32" in output
    assert "missing extra" in output and "added conv_out.weight" in output
    assert "4 differ" in output
    tensors = {n: t for n, t in torch.load(original, weights_only=True)["ema"].items() if "freqs" not in n}
    torch.save(tensors, tmp_path / "without.pt")  # added constants are not a difference
    assert run("export", "--weights", folder, "--check", tmp_path / "without.pt") == 0
    averages = {n: t + 1 for n, t in tensors.items()}
    for weights in ({"model": tensors}, tensors):  # beside the averages, or at the top level of the file
        torch.save({**weights, "ema": averages}, tmp_path / "both.pt")
        assert run("export", "--weights", folder, "--check", tmp_path / "both.pt") == 1
        assert run("export", "--weights", folder, "--check", tmp_path / "both.pt", "--no-ema") == 0
    torch.save(
        {"ema": tensors, "betas": torch.ones(5)}, tmp_path / "both.pt"
    )  # which are not weights beside the averages
    assert run("export", "--weights", folder, "--check", tmp_path / "both.pt", "--no-ema") == 0


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_parts_are_exported_too(part, base, sd):
    file = next(p for p in (sd / part).iterdir() if p.suffix == ".bin")
    assert run("export", "--weights", base[1], "--part", part, "--check", file) == 0


def test_file_formats_do_not_matter(base, sd, tmp_path):
    tensors = torch.load(base[0], weights_only=True)["ema"]
    torch.save(tensors, tmp_path / "top.pt")
    torch.save({"ema": tensors}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save({"ema": collections.OrderedDict(parameters)}, tmp_path / "parameters.pt")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "flat.safetensors", arrays, {})
    for file in sorted(tmp_path.iterdir()):
        out = tmp_path / "out" / file.stem
        assert import_base(file, sd, out) == 0
        assert folder_hash(out) == folder_hash(base[1]), file.name


def test_old_and_new_parameter_names_are_equivalent(base, sd, tmp_path):
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


def test_shared_parts_are_referred_to(base, sd, tmp_path):
    assert import_base(base[0], sd, tmp_path / "out", "--share", base[1]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "scheduler", "unet"]
    assert folder_hash(tmp_path / "out") == folder_hash(base[1])
    assert load_folder(tmp_path / "out").vae.config == load_folder(base[1]).vae.config


def test_super_resolution_keeps_the_schedules_of_x4(x4, tmp_path):
    torch.save(lavie("vsr"), tmp_path / "vsr.pt")
    assert import_stage("vsr", tmp_path / "vsr.pt", x4, tmp_path / "out") == 0
    weights = load_folder(tmp_path / "out", stage="vsr")
    assert (weights.schedule.kind, weights.schedule.beta_end) == ("linear", 0.02)  # what LaVie was trained with
    assert weights.schedule.prediction == "v_prediction"
    assert (weights.low_res_schedule.kind, weights.low_res_schedule.beta_end) == ("scaled_linear", 0.015)
    assert weights.vae.config.scaling_factor == 0.08333


def test_models_trained_here_are_exported_with_frequencies(base, tmp_path):
    """The export adds PyTorch's buffers, which the official scripts require."""
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


def test_every_misfit_is_in_one_report(base, sd, tmp_path, capsys):
    tensors = torch.load(base[0], weights_only=True)["ema"]
    del tensors["conv_out.bias"], tensors["mid_block.attentions.0.transformer_blocks.0.norm_temp.weight"]
    tensors["mid_block.extra.weight"] = torch.zeros(3, 5)
    tensors["odd.weight"] = torch.zeros(1, 1, 1)
    tensors["conv_in.weight"] = torch.zeros(32, 5, 3, 3)
    torch.save(tensors, tmp_path / "broken.pt")
    vae = torch.load(sd / "vae/diffusion_pytorch_model.bin", weights_only=True)
    broken = write_sd(tmp_path / "sd")
    del vae["quant_conv.bias"]
    write_model(broken / "vae", VAE, vae, "diffusion_pytorch_model.bin")
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
    (tmp_path / "half").mkdir()
    (tmp_path / "half/vocab.json").write_text("{}")
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n")
    odd = write_sd(tmp_path / "odd")
    (odd / "scheduler/scheduler_config.json").write_text('{"num_train_timesteps": "many"}')
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    unet = ("import", "--stage", "base", "--pretrained", sd, "--out", out, "--unet")
    start = ("import", "--stage", "base", "--unet", original, "--pretrained")
    for args, hint in (
        ((*start, tmp_path / "nowhere", "--out", out), "does not exist"),
        ((*start, tmp_path / "empty", "--out", out), "tokenizer"),
        ((*start, sd, "--out", out, "--tokenizer", tmp_path / "empty"), "tokenizer"),
        ((*start, sd, "--out", out, "--tokenizer", tmp_path / "half"), "merges.txt"),
        ((*start, original, "--out", out), "neither a diffusers folder nor a CompVis"),
        ((*start, sd, "--out", tmp_path / "file/out"), "is a file"),
        ((*start, sd, "--out", out, "--share", tmp_path / "empty"), "not a weights folder"),
        ((*start, sd, "--out", tmp_path / "file"), "already exists"),
        (("import", "--stage", "bass", "--unet", original, "--pretrained", sd, "--out", out), "invalid choice"),
        ((*unet, tmp_path / "no.pt"), "does not exist"),
        ((*unet, tmp_path / "none.pt"), "no tensors"),
        ((*unet, tmp_path / "pointer.bin"), "git lfs pull"),
        ((*start, odd, "--out", out), "num_train_timesteps must be a whole number"),
        (("inflate", "--stage", "base", "--out", out), "--pretrained"),
        (("inflate", "--stage", "base", "--pretrained", sd, "--out", out, "--seed", "-1"), "must be a whole number"),
        (("inflate", "--stage", "interpolation", "--pretrained", sd, "--out", out), "--from"),
        (("inflate", "--stage", "interpolation", "--from", sd, "--out", out), "not a weights folder"),
        (("inflate", "--stage", "interpolation", "--from", folder, "--out", out, "--no-ema"), "remove --no-ema"),
        (("export", "--weights", folder), "--check"),
        (("export", "--weights", folder, "--out", tmp_path / "x.pt", "--no-ema"), "is about the file of --check"),
        (("export", "--weights", folder, "--out", tmp_path / "x.zip"), ".pt or .safetensors"),
        (("export", "--weights", tmp_path / "empty", "--out", tmp_path / "x.pt"), "not a weights folder"),
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
    torch.save({"ema": {}}, tmp_path / "out/original.pt")  # the only copy
    assert import_base(tmp_path / "out/original.pt", sd, tmp_path / "out", "--overwrite") == 2
    assert "is inside of --out" in capsys.readouterr().err
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("mine")
    for taken in ("home", "back.pt"):  # even with --overwrite: these are not weights folders
        assert import_base(original, sd, tmp_path / taken, "--overwrite") == 2
    assert (tmp_path / "home/thesis.txt").exists() and (tmp_path / "back.pt").is_file()
