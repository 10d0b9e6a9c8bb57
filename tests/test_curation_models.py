"""Captioners and aesthetic scores, with tiny random models saved by transformers."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lavie_jax.curation import __main__ as command
from lavie_jax.curation import models
from lavie_jax.errors import UserError
from tests import videos

torch = pytest.importorskip("torch", reason="captioning and scoring models run with PyTorch")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "red", "blue", "land", "moves", "by")


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """Returns the folder of a BLIP with a few thousand parameters, the model and its processor."""
    import transformers

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config=small | special | {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "projection_dim": 8},
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
        initializer_range=1.0,
    )
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(config).eval()
    processor = transformers.BlipProcessor(
        transformers.BlipImageProcessorPil(size={"height": 32, "width": 32}),
        transformers.BertTokenizer(str(folder / "vocab.txt")),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Returns the folder of a CLIP with a few thousand parameters, and its vision model."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 32, "max_position_embeddings": 8, "projection_dim": 6},
        vision_config=small | {"image_size": 32, "patch_size": 8, "projection_dim": 6},
        projection_dim=6,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder, transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()


def linear(rng, *widths):
    return [(rng.normal(size=(b, a)).astype(np.float32), rng.normal(size=b).astype(np.float32))
            for a, b in zip(widths, widths[1:])]  # fmt: skip


def test_a_model_folder_captions_the_middle_frame(blip):
    folder, model, processor = blip
    frames = videos.pan(1, 9)
    captioner = models.make_captioner(str(folder))
    pixels = processor(images=Image.fromarray(frames[4]), return_tensors="pt")
    ids = model.generate(**pixels, max_new_tokens=models.CAPTION_TOKENS, do_sample=False)
    caption = captioner(frames)
    assert caption == processor.batch_decode(ids, skip_special_tokens=True)[0] == captioner(frames)
    assert caption and set(caption.split()) <= set(WORDS)


def test_a_score_is_the_head_applied_to_clip_embeddings(clip, tmp_path):
    import transformers

    folder, model = clip
    (first, last) = linear(np.random.default_rng(0), 6, 4, 1)
    torch.save({"layers.0.weight": torch.tensor(first[0]), "layers.0.bias": torch.tensor(first[1]),
                "layers.10.weight": torch.tensor(last[0]), "layers.10.bias": torch.tensor(last[1])},
               tmp_path / "head.pth")  # fmt: skip
    frames = videos.pan(2, 5)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [Image.fromarray(frames[i]) for i in (0, 2, 4)]
    with torch.no_grad():
        x = model(**processor(images=pictures, return_tensors="pt")).image_embeds.numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = ((x @ first[0].T + first[1]) @ last[0].T + last[1]).mean()
    assert models.make_scorer(folder, tmp_path / "head.pth")(frames) == pytest.approx(expected, abs=1e-3)


def test_scores_and_captions_are_stored_and_used_as_filters(blip, clip, tmp_path):
    """With the median score as the threshold, the upper half of the scenes is kept."""
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(5):
        videos.encode(folder / f"{seed}.mp4", videos.pan(seed, 16))
    ((weight, bias),) = linear(np.random.default_rng(1), 6, 1)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    words = ["--input", str(folder), "--workers", "1", "--min-height", "80", "--min-words", "0",
             "--aesthetic-clip", str(clip[0]), "--aesthetic-head", str(tmp_path / "head.safetensors")]  # fmt: skip
    for seed in range(5):
        (folder / f"{seed}.txt").write_text("written by hand")
    command.main([*words, "--out", str(tmp_path / "all")])
    rows = [json.loads(line) for line in (tmp_path / "all/clips.jsonl").read_text().splitlines()]
    scores = {row["source"]: row["aesthetic"] for row in rows}
    assert len(set(scores.values())) == 5 and (tmp_path / "all/report/aesthetic.png").stat().st_size > 1000
    middle = sorted(scores.values())[2]
    (folder / "0.txt").unlink()
    command.main([*words, "--out", str(tmp_path / "half"), "--min-aesthetic", str(middle), "--captioner", str(blip[0])])
    rows = [json.loads(line) for line in (tmp_path / "half/clips.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == {name for name, score in scores.items() if score >= middle}
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "half/dropped.jsonl").read_text().splitlines()]
    assert reasons == ["low aesthetic score"] * 2


def test_unsuitable_models_are_refused(clip, tmp_path):
    rng = np.random.default_rng(0)
    folder = clip[0]
    for widths, message in (((5, 1), "takes embeddings of 5 numbers; CLIP in .* has 6"), ((6, 2), "do not chain to")):
        ((weight, bias),) = linear(rng, *widths)
        save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
        with pytest.raises(UserError, match=message):
            models.make_scorer(folder, tmp_path / "head.safetensors")
    save_file({"weight": np.ones((1, 6), np.float32), "scale": np.ones(1, np.float32)}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="is not a linear head"):
        models.make_scorer(folder, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="does not hold an image-to-text model"):
        models.make_captioner(str(folder))
    with pytest.raises(UserError, match="does not exist"):
        models.make_scorer(folder, tmp_path / "nothing.safetensors")
