"""Textual inversions: forms of files, the tokens and rows of a word, and LoRA files and embeddings in `sample.py`."""

import json

import numpy as np
import pytest
import tiny

import sample
from lavie_jax.cascade.personal import Personal
from lavie_jax.data import tokens
from lavie_jax.errors import UserError
from lavie_jax.weights import load_folder
from lavie_jax.weights.embeddings import read_embedding
from lavie_jax.weights.safetensors_io import write_safetensors

WIDTH = tiny.TEXT.hidden_size
ROW = np.arange(WIDTH, dtype=np.float32)
TWO = np.stack([ROW, -ROW])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_folder(tiny.make_base(tmp_path_factory.mktemp("embeddings") / "base"))


def save(path, tensors):
    write_safetensors(path, tensors, {})
    return path


def test_forms_of_safetensors(tmp_path):
    for tensors, word in (({"<cat>": ROW}, "<cat>"), ({"<cat>": TWO}, "<cat>"), ({"emb_params": TWO}, "my-cat")):
        read = read_embedding(save(tmp_path / "my-cat.safetensors", tensors))
        assert read.word == word
        np.testing.assert_array_equal(read.vectors, next(iter(tensors.values())).reshape(-1, WIDTH))
    assert read_embedding(tmp_path / "my-cat.safetensors", "<dog>").word == "<dog>"


def test_forms_of_torch_files(tmp_path):
    """A1111's tensor may be a Parameter, in a ParameterDict of today's or of torch 1.11."""
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(TWO)
    facts = {"string_to_token": {"*": 265}, "name": "other", "step": 100, "sd_checkpoint": None}
    parameter = torch.nn.Parameter(tensor)
    old = torch.nn.ParameterDict({"*": parameter})
    old.__dict__.pop("_keys")  # which torch 1.11 did not have
    forms = {
        "plain": {"string_to_param": {"*": tensor}, **facts},
        "parameter": {"string_to_param": {"*": parameter}, **facts},
        "dict": {"string_to_param": torch.nn.ParameterDict({"*": parameter}), **facts},
        "old": {"string_to_param": old, **facts},
        "emb_params": {"emb_params": tensor.half()},
        "<cat>": {"<cat>": tensor.bfloat16()},
    }
    for name, content in forms.items():
        for zipped in (True, False) if name not in ("dict", "old") else (True,):
            torch.save(content, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
            read = read_embedding(tmp_path / f"{name}.pt")
            assert read.word == name
            np.testing.assert_array_equal(read.vectors, TWO)
    torch.save(tensor[0], tmp_path / "bare.bin")
    assert read_embedding(tmp_path / "bare.bin", "<x>").vectors.shape == (1, WIDTH)
    with pytest.raises(UserError, match="without a word"):
        read_embedding(tmp_path / "bare.bin")


def test_a_word_becomes_its_rows(base, tmp_path):
    """n vectors are n tokens in a row, wherever the word stands and whatever its case; other texts are as before."""
    personal = Personal.read([], [(save(tmp_path / "a.safetensors", {"<cat>": TWO}), None),
                                  (save(tmp_path / "Easy.safetensors", {"emb_params": 3 * ROW}), None)])  # fmt: skip
    after = personal.apply({"base": base})[0]["base"]
    before = tokens.load_tokenizer(base.tokenizer_dir)
    tokenizer = tokens.load_tokenizer(after.tokenizer_dir, after.new_words)
    first = len(before)
    table = after.text_encoder.params["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[first : first + 3], [ROW, -ROW, 3 * ROW])
    np.testing.assert_array_equal(
        table[:first], base.text_encoder.params["embeddings"]["token_embedding"]["embedding"][:first]
    )
    (red, end), (cat, easy) = tokens.tokenize(before, ["red"])[0, 1:3], ([first, first + 1], [first + 2])
    texts = {"red <cat> red": [red, *cat, red], "red<CAT>red": [red, *cat, red], "red easy": [red, *easy],
             "<cat> <cat>": cat + cat, "easyred": []}  # fmt: skip
    for text, wanted in texts.items():
        ids = tokens.tokenize(tokenizer, [text])[0]
        assert [i for i in ids[1:] if i != end] == wanted, text
    assert tokens.unknown_words(tokenizer, "a dog <cat> Easy") == ["dog"]
    assert tokens.lost_text(tokenizer, "red red <cat> <cat> blue") == "blue"
    plain = ["a red circle moving left", ""]
    np.testing.assert_array_equal(tokens.tokenize(tokenizer, plain), tokens.tokenize(before, plain))


def test_rows_beyond_the_vocabulary_are_added(base, tmp_path):
    many = np.repeat(ROW[None], 70, axis=0)
    embeddings = [save(tmp_path / f"{i}.safetensors", {f"<w{i}>": many}) for i in range(3)]
    encoder = Personal.read([], embeddings).apply({"base": base})[0]["base"].text_encoder
    first = len(tokens.load_tokenizer(base.tokenizer_dir))
    assert encoder.config.vocab_size == first + 210 > tiny.TEXT.vocab_size
    assert encoder.params["embeddings"]["token_embedding"]["embedding"].shape == (first + 210, WIDTH)


REFUSED = {
    "another width": ({"<cat>": np.ones((1, 1024), np.float32)}, None, "width 1024, Stable Diffusion 2's"),
    "XL": ({"clip_l": ROW, "clip_g": ROW}, None, "Stable Diffusion XL"),
    "a word of the vocabulary": ({"circle": ROW}, None, "'circle' is in the vocabulary"),
    "no embedding": ({"<a>": ROW, "<b>": ROW}, None, "not a textual inversion"),
    "spaces": ({"<cat>": ROW}, "my cat", "contains spaces"),
    "three axes": ({"<cat>": np.ones((1, 2, WIDTH), np.float32)}, None, "not a textual inversion"),
    "too many": ({"<cat>": np.ones((100, WIDTH), np.float32)}, None, "allowed are 1 to 75"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused(case, base, tmp_path):
    tensors, word, words = REFUSED[case]
    file = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=words):
        Personal.read([], [(file, word)]).apply({"base": base})
    twice = save(tmp_path / "y.safetensors", {"<cat>": ROW})
    with pytest.raises(UserError, match="two embeddings"):
        Personal.read([], [twice, twice]).apply({"base": base})


def test_sampling_with_a_lora_and_an_embedding(base, tmp_path, capsys):
    """They change the sample, are recorded, and make it another sample; a wrong one leaves nothing behind."""
    key, rng = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v.lora_", np.random.default_rng(0)
    factors = {"A.weight": rng.standard_normal((2, 16)), "B.weight": rng.standard_normal((16, 2))}
    lora = save(tmp_path / "lora.safetensors", {key + role: x.astype(np.float32) for role, x in factors.items()})
    cat = save(tmp_path / "cat.safetensors", {"<cat>": 3 * TWO})

    def run(out, *more):
        arguments = ["--prompt", "red <cat> left", "--weights", str(base.path), "--out", str(tmp_path / out),
                     "--format", "npz", "--no-contact-sheet", "--steps", "2", "--frames", "2"]  # fmt: skip
        return sample.main([*arguments, *map(str, more)])

    wrong = save(tmp_path / "wrong.safetensors", {f"{key}A.weight": np.ones((2, 320), np.float32),
                                                  f"{key}B.weight": np.ones((320, 2), np.float32)})  # fmt: skip
    assert run("none", "--lora", wrong) == 2
    assert "wrong.safetensors" in capsys.readouterr().err and not (tmp_path / "none").exists()

    assert run("plain") == run("lora", "--lora", f"{lora}:0.5", "--embedding", f"{cat}:<cat>") == 0
    videos = [np.load(tmp_path / out / "0000-red-cat-left-0.npz")["video"] for out in ("plain", "lora")]
    assert (videos[0] != videos[1]).any()
    record = json.loads((tmp_path / "lora/0000-red-cat-left-0.json").read_text())
    personal = Personal.read([(lora, 0.5)], [cat])
    assert record["request"]["loras"] == [{"scale": 0.5, "sha256": personal.loras[0][0].sha256}]
    assert record["request"]["embeddings"] == [{"word": "<cat>", "sha256": personal.embeddings[0].sha256}]
    assert record["made_with"]["loras"] == [str(lora)] and record["made_with"]["embeddings"] == [str(cat)]
    assert "loras" not in json.loads((tmp_path / "plain/0000-red-cat-left-0.json").read_text())["request"]
    assert run("lora", "--lora", f"{lora}:0.6", "--embedding", cat) == 2
    assert "loras" in capsys.readouterr().err
