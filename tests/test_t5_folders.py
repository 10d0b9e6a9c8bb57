"""T5 from transformers' folders: conversion there and back, tokenizers, weights folders, and what is refused."""

import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest
import tiny
from checkpoints import make_sd, refused, run, state_dict, torch

from lavie_jax.cascade.personal import Personal
from lavie_jax.data import tokens
from lavie_jax.errors import UserError
from lavie_jax.models.registry import network_name
from lavie_jax.models.t5_text import T5TextConfig
from lavie_jax.weights import load_folder, save_folder
from lavie_jax.weights.embeddings import Embedding
from lavie_jax.weights.names import to_torch
from lavie_jax.weights.safetensors_io import as_tensor, write_safetensors
from lavie_jax.weights.tokenizer_files import check_tokenizer

sd = pytest.fixture(make_sd, scope="module")

JSON = {
    "model_type": "t5", "vocab_size": 40, "d_model": 24, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu", "max_length": 20,
}  # fmt: skip
CONFIG = T5TextConfig(**{name: value for name, value in JSON.items() if name not in ("model_type", "max_length")})
WORDS = ("a", "blue", "circle", "red", "square")
TABLE, TIED = "shared.weight", "encoder.embed_tokens.weight"


def encoder_tensors():
    """Returns the tensors of an encoder under transformers' names."""
    tensors = state_dict("text_encoder", CONFIG)
    return {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}


def write_t5(folder, tensors, **fields):
    """Writes what transformers saves, with a tokenizer that has no limit of its own."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(JSON | fields))
    arrays = {name: as_tensor(tensor.numpy()) for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})
    tokens.save_small_t5_tokenizer(folder, WORDS, length=10**30)
    return folder


def inflate(sd, text, out, *more):
    return run("inflate", "--stage", "base", "--pretrained", sd, "--text-encoder", text, "--out", out, *more)


def test_an_encoder_alone_is_converted_there_and_back(sd, tmp_path, capsys):
    t5, out = write_t5(tmp_path / "t5", encoder_tensors()), tmp_path / "weights"
    assert inflate(sd, t5, out) == 0
    weights = load_folder(out)
    assert weights.text_encoder.config == CONFIG and network_name(weights.text_encoder.config) == "t5_text"
    assert json.loads((out / "text_encoder" / "config.json").read_text())["network"] == "t5_text"
    assert weights.unet.config.encoder_hid_dim == 24 and weights.unet.config.cross_attention_dim == 16
    assert weights.unet.params["encoder_hid_proj"]["kernel"].shape == (24, 16)
    tokenizer = tokens.load_tokenizer(weights.tokenizer_dir)
    assert tokens.context_length(tokenizer) == CONFIG.length == 128  # not unlimited, as the original
    export = ("export", "--weights", out, "--part", "text_encoder", "--out", tmp_path / "back.safetensors")
    assert run(*export, "--check", t5 / "model.safetensors") == 0
    assert "are equal in name, shape, dtype and bytes" in capsys.readouterr().out
    # The UNet with its new layer, to PyTorch's names and back.
    assert run("export", "--weights", out, "--out", tmp_path / "unet.safetensors") == 0
    again = ("import", "--stage", "base", "--unet", tmp_path / "unet.safetensors", "--pretrained", sd)
    assert run(*again, "--text-encoder", t5, "--out", tmp_path / "again") == 0
    unet = load_folder(tmp_path / "again").unet
    assert unet.config == weights.unet.config
    np.testing.assert_array_equal(
        unet.params["encoder_hid_proj"]["kernel"], weights.unet.params["encoder_hid_proj"]["kernel"]
    )
    capsys.readouterr()
    out = tmp_path / "clip"
    error = refused(capsys, out, run(*again, "--out", out))  # with the text encoder of Stable Diffusion
    assert "has the width 16, but the UNet is called with 24" in error


def test_the_encoder_of_a_full_t5_and_other_names_of_its_table(sd, tmp_path, capsys):
    encoder = encoder_tensors()
    full = encoder | {
        TIED: encoder[TABLE],
        "decoder.embed_tokens.weight": encoder[TABLE],
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(8, 24),
        "lm_head.weight": torch.zeros(40, 24),
    }
    renamed = {TIED if name == TABLE else name: tensor for name, tensor in encoder.items()}
    for name, tensors in (("full", full), ("renamed", renamed)):
        folder, out = write_t5(tmp_path / name, tensors), tmp_path / f"{name}-weights"
        capsys.readouterr()
        assert inflate(sd, folder, out) == 0
        printed = capsys.readouterr().out
        assert ("ignored 3 tensors" in printed) == (name == "full")
        table = load_folder(out).text_encoder.params["shared"]["embedding"]
        np.testing.assert_array_equal(table, encoder[TABLE].numpy())
        check = ("export", "--weights", out, "--part", "text_encoder", "--check", folder / "model.safetensors")
        assert run(*check) == 0, capsys.readouterr().out


def test_what_is_not_an_encoder_of_t5_is_refused(sd, tmp_path, capsys):
    encoder, out = encoder_tensors(), tmp_path / "out"
    decoder = {name.replace("encoder.", "decoder."): tensor for name, tensor in encoder.items()}
    assert "has no text encoder" in refused(capsys, out, inflate(sd, write_t5(tmp_path / "decoder", decoder), out))
    umt5 = write_t5(tmp_path / "umt5", encoder, model_type="umt5")
    assert "type 'umt5' is not supported" in refused(capsys, out, inflate(sd, umt5, out))
    assert "does not exist" in refused(capsys, out, inflate(sd, tmp_path / "nothing", out))
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(capsys, out, inflate(sd, tmp_path / "empty", out))
    t5 = write_t5(tmp_path / "t5", encoder)
    error = refused(capsys, out, inflate(sd, t5, out, "--tokenizer", sd / "tokenizer"))
    assert "is CLIP's, but" in error and "has a t5_text" in error
    shutil.rmtree(tmp_path / "empty")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (t5 / name).unlink()
    assert "is not a tokenizer folder" in refused(capsys, out, inflate(sd, t5, out))


def test_texts_are_padded_with_a_mask_and_long_ones_are_cut_with_a_warning(tmp_path):
    tokenizer = tokens.load_tokenizer(tokens.save_small_t5_tokenizer(tmp_path, WORDS, length=5))
    ids, mask = tokens.tokenize_with_mask(tokenizer, ["A Red, circle", "", "a red circle a blue square"])
    assert ids.tolist() == [[3, 6, 5, 1, 0], [1, 0, 0, 0, 0], [3, 6, 5, 3, 1]]
    assert mask.sum(1).tolist() == [4, 1, 5]  # an empty caption has its end token
    assert tokens.unknown_words(tokenizer, "a red dog") == ["dog"]
    (warning,) = tokens.text_warnings(tokenizer, ["a red circle a blue square"])
    assert "longer than the model's 5 tokens" in warning and "'blue square' is ignored" in warning


def test_a_sentencepiece_model_is_read_without_sentencepiece(tmp_path):
    def field(number, content):
        return bytes([number * 8 + 2, len(content)]) + content

    def piece(text, score):
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18\x01")

    names = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁", "r", "e", "d", "s", "▁cats"]
    model = b"".join(piece(name, -float(i)) for i, name in enumerate(names))
    (tmp_path / "spiece.model").write_bytes(model + field(3, b"\x0a\x04nmt_"))
    tokenizer = tokens.load_tokenizer(tmp_path)
    ids = tokenizer("a reds cats").input_ids
    assert ids == [3, 4, 9, 10, 1]  # the pieces with the largest sum of scores
    check_tokenizer(tmp_path, dataclasses.replace(CONFIG, vocab_size=11), owner="t5")
    with pytest.raises(UserError, match="has 11 tokens, but the text encoder of t5 has 10"):
        check_tokenizer(tmp_path, dataclasses.replace(CONFIG, vocab_size=10), owner="t5")
    (tmp_path / "spiece.model").write_bytes(model[:-3])
    with pytest.raises(UserError, match="is not a SentencePiece model, or is damaged"):
        tokens.load_tokenizer(tmp_path)


def make_t5_base(path):
    """Writes a weights folder of the base stage with a T5 of another width than its UNet's cross-attention."""
    tokenizer = tokens.save_small_t5_tokenizer(path.with_name("tokenizer"), tiny.WORDS, length=8)
    text = dataclasses.replace(CONFIG, length=8)
    unet = dataclasses.replace(tiny.UNET, encoder_hid_dim=24)
    folder = load_folder(tiny.make_base(path.with_name("clip")))
    save_folder(
        path, stage="base", sampling=folder.sampling, unet=(unet, tiny.random_params(unet)),
        vae=(folder.vae.config, folder.vae.params), text_encoder=(text, tiny.random_params(text)), tokenizer=tokenizer,
        schedule=folder.schedule,
    )  # fmt: skip
    return path


def test_folders_name_their_text_encoder_and_widths_must_fit(tmp_path):
    path = make_t5_base(tmp_path / "t5")
    weights = load_folder(path)
    assert network_name(weights.text_encoder.config) == "t5_text"
    clip = tmp_path / "clip"
    assert "network" not in json.loads((clip / "text_encoder" / "config.json").read_text())
    assert network_name(load_folder(clip).text_encoder.config) == "clip_text"  # as of older folders, without a name
    embedding = Embedding(path=tmp_path, sha256="", word="<cat>", vectors=np.zeros((1, 16), np.float32))
    with pytest.raises(UserError, match="new words of CLIP's text encoder, but .* has a t5_text"):
        Personal(embeddings=(embedding,)).apply({"base": weights})
    with pytest.raises(UserError, match="new words need a CLIP tokenizer"):
        tokens.load_tokenizer(weights.tokenizer_dir, {"<cat>": 1})
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(path / part)
        shutil.copytree(clip / part, path / part)
    with pytest.raises(UserError, match="its text encoder's width is 16, but its UNet's is 24"):
        load_folder(path)
    config = path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"network": "t5_txt"}))
    with pytest.raises(UserError, match="unknown network 't5_txt'; did you mean 't5_text'"):
        load_folder(path)


def test_names_of_transformers_are_kept():
    for path, name in (
        ("encoder/block_11/layer_1/DenseReluDense/wi_0/kernel", "encoder.block.11.layer.1.DenseReluDense.wi_0.weight"),
        ("encoder/block_0/layer_0/SelfAttention/relative_attention_bias/embedding",
         "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("shared/embedding", "shared.weight"),
    ):  # fmt: skip
        assert to_torch("text_encoder", path, np.zeros((2, 2)))[0] == name
