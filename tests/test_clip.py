"""CLIP's image and text encoders: parity with transformers, imports from both formats, refusal of hostile archives."""

import json
import pickle
import re
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.data.tokens import save_small_tokenizer
from lavie_jax.errors import UserError
from lavie_jax.models.clip import CLIP, CLIPConfig, CLIPVisionConfig
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.weights import load_part
from lavie_jax.weights.clip import OPENAI, import_clip
from lavie_jax.weights.reading import read_weights
from lavie_jax.weights.torchscript import read_torchscript

TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1)
TEXT = dict(**TOWER, vocab_size=99, max_position_embeddings=16)
VISION = dict(**TOWER, image_size=32, patch_size=8)


def transformers_model(text, vision, **fields):
    """A random model of transformers, with norms and biases that differ from 1 and 0."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig as TorchConfig
    from transformers import CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(TorchConfig(text_config=text, vision_config=vision, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return torch, model


def wanted(torch, model, images, tokens):
    """The vectors of the reference: (images, texts)."""
    with torch.no_grad():
        image = model.vision_model(pixel_values=torch.from_numpy(np.moveaxis(images, -1, 1).copy())).pooler_output
        text = model.text_model(input_ids=torch.from_numpy(tokens)).pooler_output
        return model.visual_projection(image).numpy(), model.text_projection(text).numpy()


def errors(folder, images, tokens, golden):
    part = load_part(folder, "clip", dtype=np.float32)
    ours = jax.jit(CLIP(part.config).apply)({"params": part.params}, jnp.asarray(images), jnp.asarray(tokens))
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, golden)]


def inputs(side, vocabulary, length, end):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, end, (3, length))
    tokens[0, 5:] = tokens[1, 9:] = tokens[2, -1] = end  # padding is the end token too, as CLIP's
    return rng.normal(size=(2, side, side, 3)).astype(np.float32), tokens


def openai_state(model):
    """The model's weights as OpenAI's file names them: the inverse of the importer, written independently."""
    theirs, ours = {}, dict(model.state_dict())
    for name, value in ours.items():
        if re.search(r"position_ids|logit_scale", name):
            continue
        if re.search(r"\.k_proj|\.v_proj", name):
            continue
        if ".q_proj." in name:
            value = __import__("torch").cat([ours[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = re.sub(r"self_attn\.q_proj\.(\w+)", r"attn.in_proj_\1", name)
        name = name.replace("self_attn", "attn").replace("layer_norm", "ln_")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        name = re.sub(r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks.", name)
        name = re.sub(r"text_model\.encoder\.layers\.", "transformer.resblocks.", name)
        for old, new in {
            "vision_model.embeddings.class_embedding": "visual.class_embedding",
            "vision_model.embeddings.patch_embedding": "visual.conv1",
            "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
            "vision_model.pre_layrnorm": "visual.ln_pre",
            "vision_model.post_layernorm": "visual.ln_post",
            "text_model.embeddings.token_embedding": "token_embedding",
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.final_ln_norm": "ln_final",
            "text_model.final_ln_": "ln_final",
        }.items():
            name = name.replace(old, new)
        if name in ("visual_projection.weight", "text_projection.weight"):
            name, value = {"v": "visual.proj", "t": "text_projection"}[name[0]], value.T.contiguous()
        theirs[name] = value
    return theirs


def traced(torch, state, path):
    """Saves a TorchScript archive whose modules hold these tensors."""

    class Tree(torch.nn.Module):
        def forward(self, x):
            return x + 1

    root = Tree()
    for name, value in state.items():
        *modules, leaf = name.split(".")
        node = root
        for module in modules:
            if module not in node._modules:
                node.add_module(module, Tree())
            node = node._modules[module]
        node.register_parameter(leaf, torch.nn.Parameter(value.clone()))
    root.register_buffer("input_resolution", torch.tensor(32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which OpenAI's files need
        torch.jit.trace(root, torch.zeros(1)).save(str(path))


def test_both_formats_give_the_vectors_of_transformers(tmp_path):
    torch, model = transformers_model({**TEXT, "bos_token_id": 97, "eos_token_id": 98}, VISION, projection_dim=24)
    images, tokens = inputs(32, 99, 16, 98)
    golden = wanted(torch, model, images, tokens)
    folder, words = tmp_path / "theirs", save_small_tokenizer(tmp_path / "words", ["red", "cat"])
    model.save_pretrained(folder)
    import_clip(folder, tmp_path / "clip", tokenizer=words)
    assert max(errors(tmp_path / "clip", images, tokens, golden)) < 1e-5

    state = openai_state(model)
    traced(torch, state, tmp_path / "ViT.pt")
    read = read_torchscript(tmp_path / "ViT.pt")
    assert read.keys() == state.keys() | {"input_resolution"}
    for name, value in state.items():
        np.testing.assert_array_equal(read[name].read(), value.numpy())
    notes = import_clip(tmp_path / "ViT.pt", tmp_path / "openai", tokenizer=words)
    assert "TorchScript" in notes[0]
    assert load_part(tmp_path / "openai", "clip").config.eos_token_id == 2  # the highest id, as OpenAI
    assert max(errors(tmp_path / "openai", images, tokens, golden)) < 1e-5


@pytest.mark.heavy
def test_the_full_size_model_gives_the_vectors_of_transformers(tmp_path):
    torch, model = transformers_model({"eos_token_id": 2}, {})
    images, tokens = inputs(224, 49408, 77, 49407)
    golden = wanted(torch, model, images, tokens)
    model.save_pretrained(tmp_path / "theirs")
    words = save_small_tokenizer(tmp_path / "words", ["red", "cat"])
    import_clip(tmp_path / "theirs", tmp_path / "clip", tokenizer=words)
    assert load_part(tmp_path / "clip", "clip", params=False).config == CLIPConfig()
    assert max(errors(tmp_path / "clip", images, tokens, golden)) < 1e-5


def test_the_config_reads_back_and_names_its_errors():
    config = CLIPConfig(text=CLIPTextConfig(**TEXT), vision=CLIPVisionConfig(**VISION), projection_dim=24)
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="CLIPVisionConfig: image_size = 33 is not a multiple of patch_size"):
        CLIPVisionConfig(**VISION | {"image_size": 33})
    with pytest.raises(UserError, match="num_attention_heads = 5"):
        CLIPVisionConfig(**VISION | {"num_attention_heads": 5})


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", content)
        file.writestr("x/constants.pkl", b"")
    return path


def test_hostile_and_damaged_archives_are_refused_in_one_line(tmp_path):
    class Hostile:
        def __reduce__(self):
            return eval, ("1",)

    hostile = archive(tmp_path / "a.pt", pickle.dumps(Hostile(), protocol=2))
    for read in (read_torchscript, read_weights):
        with pytest.raises(UserError, match="refused: it would run __builtin__.eval"):
            read(hostile)
    with pytest.raises(UserError, match="cannot be read as a TorchScript archive"):
        read_torchscript(archive(tmp_path / "b.pt", b"\x80\x02"))
    with pytest.raises(UserError, match="without tensors"):
        read_torchscript(archive(tmp_path / "c.pt", pickle.dumps({}, protocol=2)))


def test_what_is_not_clip_is_named(tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    with pytest.raises(UserError, match="config.json is missing"):
        import_clip(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="its model_type is 't5'"):
        import_clip(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len({ours for _, ours in OPENAI}) == len(OPENAI)
