"""Checkpoints of a known other kind are read, or named in one line. Mostly without importing whole models."""

import bz2
import gzip
import json
import lzma
import pickle
import shutil
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    SD_UNET,
    VAE,
    import_base,
    lavie,
    make_base,
    make_sd,
    refused,
    run,
    state_dict,
)
from test_inflate import write_compvis

from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.weights import compvis, folder_hash, load_folder
from lavie_jax.weights.diffusers_configs import vae_config
from lavie_jax.weights.expected import refuse
from lavie_jax.weights.folder import hash_dir
from lavie_jax.weights.model_kinds import refuse_other_kind
from lavie_jax.weights.originals import wanted
from lavie_jax.weights.pretrained import read_vae, resolve_hub_cache
from lavie_jax.weights.reading import find_weights, read_weights, read_weights_file
from lavie_jax.weights.safetensors_io import as_tensor, write_safetensors
from lavie_jax.weights.tokenizer_files import FILES, check_tokenizer, copy_tokenizer, tokenizer_folder
from lavie_jax.weights.unwrap import unwrap

torch = pytest.importorskip("torch")
sd = pytest.fixture(make_sd, scope="module")
base = pytest.fixture(make_base, scope="module")
ARRAYS = {"conv_in.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "conv_in.bias": np.ones(2, np.float32)}


def tensors(*names, shape=(2, 2), dtype=np.float32):
    return {name: as_tensor(np.zeros(shape, dtype)) for name in names}


def values(read):
    return {name: tensor.read() for name, tensor in read.items()}


def same(read, arrays=ARRAYS):
    return read.keys() == arrays.keys() and all(np.array_equal(t.read(), arrays[n]) for n, t in read.items())


def torch_arrays():
    return {name: torch.from_numpy(array) for name, array in ARRAYS.items()}


# ---- files that are not what their ending says


def write_safetensors_as(path):
    write_safetensors(path, ARRAYS, {})


def write_zip_as(path):
    torch.save(torch_arrays(), path)


def write_legacy_as(path):
    torch.save(torch_arrays(), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "name", ["model.pt", "model.safetensors", "model.bin", "model.ckpt", "model", "model.SAFETENSORS"]
)
@pytest.mark.parametrize("write", [write_safetensors_as, write_zip_as, write_legacy_as])
def test_the_content_decides_on_the_format(write, name, tmp_path):
    write(tmp_path / name)
    assert same(read_weights_file(tmp_path / name))


def tar(path, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):  # the members of PyTorch's format of before 2017
            (path.parent / name).write_bytes(pickle.dumps({}))
            archive.add(path.parent / name, name)


def zip_of(path, name, content=b"x"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


def script(path):
    """The members that torch.jit.save writes beside the weights; it is deprecated itself."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("net/data.pkl", "net/code/__torch__/net.py", "net/constants.pkl", "net/version"):
            archive.writestr(name, b"x")


def text(content):
    return lambda path: path.write_text(content)


def raw(content):
    return lambda path: path.write_bytes(content)


OTHER_FILES = {
    "HTML page": text("<!DOCTYPE html><html><body>404</body></html>"),
    "an HTML page": text("\ufeff\n  <html><head><title>Sign in</title></head>" + " " * 2000),
    "XML file": text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "JSON file": text('{"error": "Entry not found"}'),
    "text file": text("Invalid username or password.\n"),
    "Git LFS pointer": text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "is empty": raw(b""),
    "zeros": raw(bytes(5000)),
    "gzip": raw(gzip.compress(b"weights")),
    "bzip2": raw(bz2.compress(b"weights")),
    "xz": raw(lzma.compress(b"weights")),
    "zstd": raw(b"\x28\xb5\x2f\xfd" + bytes(30)),
    "7z archive": raw(b"7z\xbc\xaf\x27\x1c" + bytes(30)),
    "RAR archive": raw(b"Rar!\x1a\x07" + bytes(30)),
    "tar archive": tar,
    "TorchScript": script,
    "numpy archive": lambda path: zip_of(path, "a.npy"),
    "a numpy array": raw(b"\x93NUMPY\x01\x00" + bytes(100)),
    "a Keras file": lambda path: zip_of(path, "model.weights.h5"),
    "zip archive of 1 files, such as lavie/lavie_base.pt": lambda path: zip_of(path, "lavie/lavie_base.pt"),
    "HDF5": raw(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "GGUF": raw(b"GGUF\x03\x00\x00\x00" + bytes(100)),
    "ONNX": raw(b"\x08\x07\x12\x07pytorch\x1a\x05" + b"2.1.0" + bytes(100)),
    "msgpack": raw(b"\x82\xa7encoder\x81\xa4conv\xc7" + bytes(100)),
    "(msgpack)": raw(b"\xde\x00\x20\xd9\x30" + b"k" * 48 + bytes(100)),
    "an empty zip archive": raw(b"PK\x05\x06" + bytes(18)),
    "not a PyTorch|not a safetensors": raw(b"\x08"),
    "PNG picture": raw(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "not a PyTorch file": raw(pickle.dumps({"a": 1}, protocol=4)),
    "truncated": lambda path: path.write_bytes(ZIPPED[: len(ZIPPED) // 2]),
}
ZIPPED = b"PK\x03\x04" + bytes(600)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_files_of_another_format_are_named(kind, suffix, tmp_path):
    file = tmp_path / f"lavie_base{suffix}"
    OTHER_FILES[kind](file)
    with pytest.raises(UserError) as error:
        read_weights_file(file)
    message = str(error.value)
    assert any(part in message for part in kind.split("|")) and "lavie_base" in message and "\n" not in message


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_tar_is_refused_before_torch_sees_it(mode, tmp_path, monkeypatch):
    """Some versions of torch.load run code in a legacy tar, in spite of weights_only."""
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    tar(tmp_path / "old.pt", mode)
    with pytest.raises(UserError, match="tar archive|compressed"):
        read_weights_file(tmp_path / "old.pt")


def test_the_pickle_that_torch_would_load_is_the_one_that_is_scanned(tmp_path):
    """A zip archive after a pickle: zipfile reads the archive, torch.load the pickle."""

    class Call:
        def __reduce__(self):
            return eval, ("1",)

    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    torch.save({"w": Call()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=False)
    both = tmp_path / "both.pt"
    both.write_bytes((tmp_path / "bad.pt").read_bytes() + (tmp_path / "good.pt").read_bytes())
    assert zipfile.is_zipfile(both)
    with pytest.raises(UserError, match="refused: it would run"):
        read_weights_file(both)


def test_an_old_torch_is_refused(tmp_path, monkeypatch):
    write_zip_as(tmp_path / "model.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UserError, match="too old.*torch>=2.6"):
        read_weights_file(tmp_path / "model.pt")


# ---- sharded models


def write_shards(folder, stem="diffusion_pytorch_model", suffix=".safetensors", index=None):
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for file, (name, array) in zip(files, ARRAYS.items()):
        if suffix.endswith(".safetensors"):
            write_safetensors(folder / file, {name: array}, {})
        else:
            torch.save({name: torch.from_numpy(array)}, folder / file)
    index = folder / (index or f"{stem}{suffix}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(ARRAYS, files))}))
    return index


@pytest.mark.parametrize(
    "stem, suffix, index",
    [
        ("diffusion_pytorch_model", ".safetensors", None),
        ("pytorch_model", ".bin", None),
        ("model", ".safetensors", None),
        ("model", ".fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("model", ".fp16.safetensors", None),
    ],
)
def test_sharded_models_are_read(stem, suffix, index, tmp_path):
    index = write_shards(tmp_path / "unet", stem, suffix, index)
    assert find_weights(index.parent, "unet" if stem.startswith("diffusion") else "text_encoder") == index
    shard = sorted(index.parent.glob(f"{stem}-*"))[1]
    for given in (index, index.parent, shard):
        read, notes = read_weights(given)
        assert same(read) and notes == ["read 2 shards"]
    index.unlink()
    assert same(read_weights_file(shard)) and same(read_weights_file(shard.parent))


def test_broken_shards_are_named(tmp_path):
    index = write_shards(tmp_path)
    content = json.loads(index.read_text())
    for weight_map, message in (
        (
            content["weight_map"] | {"more.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"},
            "lists more.weight",
        ),
        ({"conv_in.weight": "../other.safetensors"}, "must be files beside it"),
        ({"conv_in.weight": "gone.safetensors"}, "lacks 1 of 1 shards: gone"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            read_weights_file(index)
    index.unlink()
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 shards: diffusion_pytorch_model-00002"):
        read_weights_file(tmp_path)


def test_broken_links_and_other_variants(tmp_path):
    (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(tmp_path / "blobs/gone")
    with pytest.raises(UserError, match="is a broken link: its file is missing"):
        find_weights(tmp_path, "unet")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("diffusion_pytorch_model.non_ema.bin", "diffusion_pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"x")
    assert find_weights(tmp_path, "unet").name == "diffusion_pytorch_model.bin"
    assert find_weights(tmp_path, "unet", ema=False).name == "diffusion_pytorch_model.non_ema.bin"
    for value, variant in enumerate((".non_ema", "")):
        torch.save({"w": torch.full((2,), value)}, tmp_path / f"diffusion_pytorch_model{variant}.bin")
    assert [read_weights(tmp_path, ema=ema)[0]["w"].read()[0] for ema in (False, True)] == [0, 1]


def test_only_the_shards_of_the_best_file_are_downloaded():
    shards = [f"text_encoder/model{v}-0000{i}-of-00002.safetensors" for v in ("", ".fp16") for i in (1, 2)]
    index = "text_encoder/model.safetensors.index.json"
    assert wanted([*shards, index, "vae/other.bin"]) == [*shards[:2], index]


# ---- names


def test_one_common_prefix_is_removed():
    names = ("time_embedding.linear_1.weight", "conv_in.bias", "mid_block.resnets.0.norm1.weight")
    for prefix in (
        "module.",
        "model.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.diffusion_model.",
        "net.unet.",
        "any.",
    ):
        read, notes = unwrap("unet", tensors(*(prefix + name for name in names)))
        assert set(read) == set(names) and len(notes) >= 1 and "3 names" in notes[0], prefix
    read, notes = unwrap("unet", tensors(*names))
    assert set(read) == set(names) and notes == []
    inner = tensors(
        "time_embedding.linear_1.weight", "mid_block._orig_mod.resnets.0._checkpoint_wrapped_module.norm1.weight"
    )
    assert "mid_block.resnets.0.norm1.weight" in unwrap("unet", inner)[0]


@pytest.mark.parametrize(
    "part, name", [("vae", "encoder.conv_in.weight"), ("text_encoder", "text_model.embeddings.token_embedding.weight"),
                   ("text_encoder", "embeddings.token_embedding.weight")]
)  # fmt: skip
def test_prefixes_of_the_other_parts(part, name):
    assert set(unwrap(part, tensors(f"first.{name}"))[0]) == {name}
    assert set(unwrap(part, tensors(name))[0]) == {name}


def test_the_rest_of_a_trainers_state_is_ignored():
    names = ("betas", "ddim_sigmas", "ddim_alphas_prev", "sqrt_one_minus_alphas_cumprod", "alphas_cumprod_next",
             "posterior_mean_coef1", "global_step", "lvlb_weights", "snr")  # fmt: skip
    others = ("vae.encoder.conv_in.weight", "first_stage_model.decoder.conv_out.bias")
    read, notes = unwrap("unet", tensors(*names, *others, "unet.time_embedding.linear_1.weight", "unet.other.weight"))
    assert set(read) == {"time_embedding.linear_1.weight", "other.weight"}
    assert any("ignored 2 tensors of other models in it: first_stage_model, vae" in note for note in notes)
    read, _ = unwrap("unet", tensors("time_embedding.linear_1.weight", "strange.weight"))
    assert "strange.weight" in read  # what is not known is reported, not dropped
    clip = ("vision_model.a.weight", "logit_scale", "visual_projection.weight", "text_projection.weight")
    assert set(unwrap("text_encoder", tensors(*clip, "text_model.embeddings.token_embedding.weight"))[0]) == {
        "text_model.embeddings.token_embedding.weight"
    }


@pytest.mark.parametrize(
    "raw, average",
    [
        (
            "model.diffusion_model.time_embedding.linear_1.weight",
            "model_ema.diffusion_modeltime_embeddinglinear_1weight",
        ),  # the original LDM
        ("time_embedding.linear_1.weight", "ema.time_embedding.linear_1.weight"),
        ("model.time_embedding.linear_1.weight", "ema.time_embedding.linear_1.weight"),
        ("model.time_embedding.linear_1.weight", "ema.module.time_embedding.linear_1.weight"),
        ("online_model.time_embedding.linear_1.weight", "ema_model.time_embedding.linear_1.weight"),
    ],
)
def test_averages_beside_weights(raw, average):
    given = {
        raw: as_tensor(np.zeros((2, 2))),
        average: as_tensor(np.ones((2, 2))),
        "model_ema.decay": as_tensor(np.float32(1)),
    }
    for ema in (True, False):
        read, notes = unwrap("unet", given, ema=ema)
        assert {name: tensor.read().mean() for name, tensor in read.items()} == {
            "time_embedding.linear_1.weight": float(ema)
        }
        assert any("moving averages" in note for note in notes)


def test_averages_under_keys_of_a_checkpoint(tmp_path):
    one, two = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for content in ({"ema": one, "model": two}, {"model_ema": {"module": one}, "state_dict": two, "epoch": 1}):
        torch.save(content, tmp_path / "both.pt")
        for ema in (True, False):
            read, notes = read_weights(tmp_path / "both.pt", ema=ema)
            assert read["w"].read().mean() == ema and "not those under" in notes[0]
    for content in ({"module": one}, {"model": {"state_dict": one}}, {"model_state_dict": one}):
        torch.save(content, tmp_path / "one.pt")
        read, notes = read_weights(tmp_path / "one.pt")
        assert set(read) == {"w"} and notes == []
    for unnamed in ({"decay": 0.9, "shadow_params": [torch.ones(2)]}, torch.ones(2)):
        torch.save({"ema": unnamed, "model": two}, tmp_path / "list.pt")
        assert "have no names" in read_weights(tmp_path / "list.pt")[1][0]
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match="an optimizer's state"):
        read_weights(tmp_path / "optimizer.pt")
    loop = {"a": 1}
    loop["model"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(UserError, match="no tensors"):
        read_weights(tmp_path / "loop.pt")


OTHER_MODELS = {
    "a LoRA": (
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",  # kohya
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",  # diffusers
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "unet.mid_block.attn1.to_q.lora.up.weight",
        "base_model.model.down_blocks.0.attn1.to_q.lora_B.weight",  # PEFT
        "base_model.model.down_blocks.0.attn1.to_q.lora_A.default.weight",
        "text_encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "lora_unet_mid_block.hada_w1_a",
        "lycoris_mid_block.lokr_w1",
    ),
    "quantized": (
        "mid.weight.absmax", "mid.weight.quant_state.bitsandbytes__nf4", "mid.SCB", "mid.qweight", "scaled_fp8",
        "mid.weight_scale",
    ),
    "textual inversion": ("emb_params", "<my-cat>", "string_to_param.*"),
    "a ControlNet": ("controlnet_cond_embedding.conv_in.weight", "control_model.input_blocks.0.0.weight"),
    "Stable Diffusion 2.x": ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",),
    "OpenCLIP": ("transformer.resblocks.0.attn.in_proj_weight", "visual.transformer.resblocks.0.ln_1.weight"),
    "Stable Diffusion XL": ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",),
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.3.norm.linear.weight"),
    "diffusion transformer": ("blocks.0.adaLN_modulation.1.weight", "adaln_single.linear.weight", "scale_shift_table"),
    "Stable Video Diffusion": ("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight",),
    "ModelScope": ("down_blocks.0.temp_convs.0.conv1.0.weight",),
    "weights folder": ("conv_in.kernel", "params.text_model.embeddings.token_embedding.embedding"),
    "AnimateDiff": ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_other_kinds_of_models_are_named(kind):
    for name in OTHER_MODELS[kind]:
        with pytest.raises(UserError) as error:
            refuse_other_kind("file.safetensors", tensors("conv_in.weight", name))
        assert kind in str(error.value) and "\n" not in str(error.value), name


def test_whole_numbers_and_float8_are_quantized(tmp_path):
    with pytest.raises(UserError, match="quantized .a.weight is int8."):
        refuse_other_kind("file", tensors("a.weight", dtype=np.int8))
    torch.save({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="quantized .a.weight is torch.float8"):
        read_weights_file(tmp_path / "a.pt")
    pytest.importorskip("safetensors.torch").save_file(
        {"a.weight": torch.zeros(2, 2).to(torch.float8_e5m2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match="quantized .F8_E5M2"):
        read_weights_file(tmp_path / "a.safetensors")


def test_the_released_models_are_not_mistaken_for_others():
    from test_weights_folder import MANIFESTS, RELEASED

    for name in RELEASED:
        manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
        part = next(p for p in ("vae", "text", "unet") if p in name or p == "unet")
        given = {n: as_tensor(np.broadcast_to(np.float32(0), shape)) for n, shape in manifest.items()}
        refuse_other_kind(name, given)
        read, notes = unwrap({"text": "text_encoder"}.get(part, part), given)
        assert read.keys() == given.keys() and notes == [], name


def test_at_most_twenty_misfits_are_listed_with_counts():
    lines = [f"f: missing a{i} [2]" for i in range(600)] + [f"f: unexpected b{i} [2]" for i in range(80)]
    lines += ["f: c has shape [1], not [2]"]
    with pytest.raises(UserError) as error:
        refuse(lines)
    message = str(error.value)
    assert "681 tensors do not fit (600 missing, 80 unexpected, 1 of another shape)" in message
    assert "unexpected b0 " in message and "c has shape" in message and message.endswith("and 661 more")
    assert len(message.splitlines()) == 22


# ---- folders


def test_the_root_of_a_hub_cache_entry(tmp_path):
    root = tmp_path / "models--CompVis--stable-diffusion-v1-4"
    for revision in ("aaa", "bbb"):
        (root / "snapshots" / revision).mkdir(parents=True)
    with pytest.raises(UserError, match="no snapshot of the branch main.*aaa, bbb"):
        resolve_hub_cache(root)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("bbb\n")
    assert resolve_hub_cache(root) == resolve_hub_cache(root / "snapshots") == root / "snapshots/bbb"
    assert resolve_hub_cache(root / "snapshots/aaa") == root / "snapshots/aaa"
    assert resolve_hub_cache(tmp_path) == tmp_path


def write_tokenizer_files(folder, words, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8} | config))
    return folder


WORDS = ["a", "b", "<|startoftext|>", "<|endoftext|>"]


def test_a_tokenizer_must_fit_the_text_encoder(tmp_path):
    fits = {"text": CLIPTextConfig(vocab_size=4, max_position_embeddings=8), "owner": "sd"}
    check_tokenizer(write_tokenizer_files(tmp_path / "fits", WORDS), **fits)
    more = write_tokenizer_files(tmp_path / "more", [*WORDS, "c"])
    added = write_tokenizer_files(tmp_path / "added", WORDS)
    (added / "added_tokens.json").write_text('{"<my-cat>": 4}')
    decoder = write_tokenizer_files(tmp_path / "decoder", WORDS, added_tokens_decoder={"4": {"content": "<my-cat>"}})
    special = write_tokenizer_files(tmp_path / "special", WORDS, additional_special_tokens=["<x>"])
    whole = write_tokenizer_files(tmp_path / "whole", WORDS)
    (whole / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 4, "content": "<my-cat>"}]})
    )
    for folder in (more, added, decoder, special, whole):
        with pytest.raises(UserError, match="5 tokens, but the text encoder of sd has 4"):
            check_tokenizer(folder, **fits)
    long = write_tokenizer_files(tmp_path / "long", WORDS, model_max_length=77)
    none = write_tokenizer_files(tmp_path / "none", WORDS, model_max_length=int(1e30))
    for folder in (long, none):
        with pytest.raises(UserError, match="77 tokens, but the text encoder of sd has 8 positions"):
            check_tokenizer(folder, **fits)
    (long / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        check_tokenizer(long, **fits)


def test_only_a_tokenizers_files_are_copied(tmp_path):
    repository = write_tokenizer_files(tmp_path / "clip", WORDS)
    for name in (".git/objects/pack/a.pack", "model.safetensors", "README.md", ".DS_Store", "onnx/model.onnx"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(bytes(1000))
    copy = copy_tokenizer(repository, tmp_path / "copy")
    assert {p.name for p in copy.rglob("*")} == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert tokenizer_folder(repository) == repository
    (tmp_path / "model").mkdir()
    repository.rename(tmp_path / "model/tokenizer")
    assert tokenizer_folder(tmp_path / "model") == tmp_path / "model/tokenizer"


def test_hidden_files_do_not_change_a_hash(tmp_path):
    folder = write_tokenizer_files(tmp_path / "tokenizer", WORDS)
    before = hash_dir(folder)
    for name in (
        ".DS_Store",
        "._vocab.json",
        ".git/config",
        "sub/.nfs0001",
        ".ipynb_checkpoints/vocab-checkpoint.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert hash_dir(folder) == before
    (folder / "more.json").write_text("{}")
    assert hash_dir(folder) != before
    assert hash_dir(folder, only=FILES) == before  # the identity of a tokenizer, whatever else is in its folder


# ---- the whole conversion


def test_an_unusual_checkpoint_is_imported_as_the_usual_one(base, sd, tmp_path, capsys):
    """Sharded, with a prefix, buffers and a wrong ending; the image model is in the hub's cache, with more files."""
    root = tmp_path / "models--CompVis--stable-diffusion-v1-4"
    shutil.copytree(sd, root / "snapshots/abc")
    (root / "snapshots/abc/tokenizer/.git").mkdir()
    (root / "snapshots/abc/tokenizer/.git/config").write_text("x")
    (root / "snapshots/abc/tokenizer/model.onnx").write_text("x")
    named = {f"module.{name}": tensor for name, tensor in lavie("base").items()} | {"betas": torch.zeros(4)}
    where = {name: f"lavie-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(named)}
    for file in set(where.values()):
        torch.save({name: tensor for name, tensor in named.items() if where[name] == file}, tmp_path / file)
    (tmp_path / "lavie.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert import_base(tmp_path / "lavie.safetensors.index.json", root, tmp_path / "out") == 0
    assert folder_hash(tmp_path / "out") == folder_hash(base[1])
    printed = capsys.readouterr().out
    assert "took the prefix 'module.' off" in printed and "read 2 shards" in printed
    assert run("export", "--weights", tmp_path / "out", "--check", tmp_path / "lavie.safetensors.index.json") == 0


def test_other_models_are_refused_by_the_converter(base, sd, tmp_path, capsys):
    out = tmp_path / "out"
    lora = tmp_path / "lora.safetensors"
    write_safetensors(lora, {OTHER_MODELS["a LoRA"][0]: np.zeros((4, 4), np.float32)}, {})
    image, vae, text = (
        next(f for f in (sd / part).iterdir() if f.suffix == ".bin") for part in ("unet", "vae", "text_encoder")
    )
    torch.save(lavie("interpolation"), tmp_path / "interpolation.pt")
    for unet, message in (
        (lora, "is a LoRA adapter (1 tensors"),
        (image, "is the UNet of an image model, without temporal layers"),
        (vae, "is a VAE, not a LaVie checkpoint"),
        (text, "is a CLIP text encoder, not a LaVie checkpoint"),
        (tmp_path / "interpolation.pt", "a checkpoint of the stage interpolation"),
    ):
        assert message in refused(capsys, out, import_base(unet, sd, out))
    inpainting = tmp_path / "inpainting"
    shutil.copytree(sd, inpainting)
    (inpainting / "unet/config.json").write_text(json.dumps(SD_UNET | {"in_channels": 9}))
    assert "9 input channels (a model for inpainting)" in refused(capsys, out, import_base(base[0], inpainting, out))
    assert "is a weights folder already" in refused(capsys, out, import_base(base[0], base[1], out))
    xl = tmp_path / "xl"
    (xl / "text_encoder_2").mkdir(parents=True)
    (xl / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert "is a StableDiffusionXLPipeline" in refused(capsys, out, import_base(base[0], xl, out))
    words = shutil.copytree(sd, tmp_path / "words")
    write_tokenizer_files(words / "tokenizer", [f"w{i}" for i in range(51)])
    assert "tokens, but the text encoder" in refused(capsys, out, import_base(base[0], words, out))
    original = tmp_path / "original"
    original.mkdir()
    (original / "sd-v1-4.ckpt").write_bytes(b"x")
    assert "contains sd-v1-4.ckpt: give the path" in refused(capsys, out, import_base(base[0], original, out))


def test_a_vae_of_its_own(base, sd, tmp_path, capsys):
    """A checkpoint without one, and VAEs as a diffusers folder or as a single file in either layout."""
    write_compvis(tmp_path / "full.ckpt")
    everything = torch.load(tmp_path / "full.ckpt", weights_only=False)["state_dict"]
    first = "first_stage_model."
    torch.save({n: t for n, t in everything.items() if not n.startswith(first)}, tmp_path / "pruned.ckpt")
    vae = {n.removeprefix(first): t for n, t in everything.items() if n.startswith(first)}
    torch.save({"state_dict": vae | {"loss.discriminator.weight": torch.ones(2)}}, tmp_path / "vae.ckpt")
    start = ("inflate", "--stage", "base", "--tokenizer", sd / "tokenizer", "--pretrained")
    assert "has no VAE" in refused(
        capsys, tmp_path / "out", run(*start, tmp_path / "pruned.ckpt", "--out", tmp_path / "out")
    )
    assert run(*start, tmp_path / "pruned.ckpt", "--vae", tmp_path / "vae.ckpt", "--out", tmp_path / "one") == 0
    assert run(*start, tmp_path / "full.ckpt", "--out", tmp_path / "two") == 0
    assert folder_hash(tmp_path / "one") == folder_hash(tmp_path / "two")
    torch.save(state_dict("vae", vae_config(VAE)), tmp_path / "diffusers.pt")
    expected = values(read_vae(tmp_path / "diffusers.pt", {}, True).tensors)
    assert expected["quant_conv.bias"].shape == (8,)
    assert read_vae(tmp_path / "diffusers.pt", {"scaling_factor": 0.5}, True).config["scaling_factor"] == 0.5
    assert read_vae(sd, {}, True).config == VAE and read_vae(sd / "vae", {}, True).config == VAE
    without = shutil.copytree(sd, tmp_path / "without")
    shutil.rmtree(without / "vae")
    assert "--vae FILE" in refused(capsys, tmp_path / "out", import_base(base[0], without, tmp_path / "out"))
    assert import_base(base[0], without, tmp_path / "own", "--vae", sd / "vae") == 0
    assert folder_hash(tmp_path / "own") == folder_hash(base[1])
    with pytest.raises(UserError, match="is not a VAE of Stable Diffusion: it is a UNet"):
        read_vae(next(f for f in (sd / "unet").iterdir() if f.suffix == ".bin"), {}, True)


def test_the_averages_of_an_original_checkpoint(sd, tmp_path, capsys):
    everything = write_compvis(tmp_path / "sd.ckpt")
    unet = {n: t for n, t in everything.items() if n.startswith("model.diffusion_model.")}
    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in unet.items()}
    torch.save({"state_dict": everything | averages | {"scale_factor": torch.tensor(0.5)}}, tmp_path / "ema.ckpt")
    start = (
        "inflate",
        "--stage",
        "base",
        "--tokenizer",
        sd / "tokenizer",
        "--pretrained",
        tmp_path / "ema.ckpt",
        "--out",
    )
    assert run(*start, tmp_path / "ema") == 0 and "moving averages" in capsys.readouterr().out
    assert run(*start, tmp_path / "raw", "--no-ema") == 0 and "not the" in capsys.readouterr().out
    one, two = (load_folder(tmp_path / name) for name in ("ema", "raw"))
    np.testing.assert_array_equal(one.unet.params["conv_in"]["bias"], two.unet.params["conv_in"]["bias"] + 1)
    assert one.vae.config.scaling_factor == 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_the_scaling_factor_in_half_precision_is_the_one_that_was_rounded(dtype):
    for factor in (0.18215, 0.13025, 0.08333):
        stored = {"first_stage_model.scale_factor": as_tensor(np.array(factor, dtype))}
        assert compvis.scale_factor(stored) == {"scaling_factor": factor}
    assert compvis.scale_factor({"scale_factor": as_tensor(np.float32(0.3))}) == {"scaling_factor": 0.3}
