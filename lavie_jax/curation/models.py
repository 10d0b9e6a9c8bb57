"""Captions and aesthetic scores from models that a person brings; both run with PyTorch, on one thread.

Nothing is downloaded: models are folders as transformers saves them.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from lavie_jax.errors import UserError

Captioner = Callable[[np.ndarray], str]  # of sample frames, uint8 (T, H, W, 3)
Scorer = Callable[[np.ndarray], float]

CAPTION_TOKENS = 40
# How CLIP's training pictures were scaled (arXiv 2103.00020).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_captioner(what: str | Captioner) -> Captioner:
    """The captioner that a folder, "module:function" or a function is.

    A folder holds an image-to-text model with its processor, as transformers saves BLIP or GIT: it captions the middle
    frame, greedily, so that the same frame has the same caption. A function gets the sample frames of a scene.

    Raises UserError for what is neither, or cannot be loaded.
    """
    if callable(what):
        return what
    if Path(what).is_dir():
        return _model_captioner(Path(what))
    module, colon, name = what.partition(":")
    if not colon:
        raise UserError(f"--captioner is a folder or 'module:function'; {what!r} is neither")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--captioner {what!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"--captioner {what!r} is no function")
    return found


def _model_captioner(folder: Path) -> Captioner:
    torch, transformers = _libraries(folder)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{str(folder)!r} holds no image-to-text model with its processor: {error}") from error
    model.eval()

    def caption(frames: np.ndarray) -> str:
        picture = Image.fromarray(np.ascontiguousarray(frames[len(frames) // 2]))
        with torch.no_grad():
            ids = model.generate(
                **processor(images=picture, return_tensors="pt"), max_new_tokens=CAPTION_TOKENS, do_sample=False
            )
        return processor.batch_decode(ids, skip_special_tokens=True)[0]

    return caption


def make_scorer(clip: Path, head: Path) -> Scorer:
    """The aesthetic score of a scene: the mean over its first, middle and last sample frame.

    Args:
      clip: a CLIP model's folder, as transformers saves it.
      head: .safetensors or PyTorch file of a linear layer, or of several in a row without anything between, on CLIP's
        normalised image embedding; such are the predictors of LAION.

    Raises:
      UserError: the folder holds no CLIP, or the head does not fit it.
    """
    from lavie_jax.weights.pretrained import read_weights_file

    torch, transformers = _libraries(clip)
    layers = _linear_layers(head, {name: tensor.read() for name, tensor in read_weights_file(head).items()})
    try:
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{str(clip)!r} holds no CLIP model: {error}") from error
    model.eval()
    side, width = model.config.image_size, model.config.projection_dim
    if layers[0][0].shape[1] != width:
        raise UserError(f"{head} scores embeddings of {layers[0][0].shape[1]} numbers; CLIP in {clip} gives {width}")

    def score(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
        chosen = frames[[0, len(frames) // 2, -1]]
        pixels = np.stack([(_square(frame, side) / 255 - CLIP_MEAN) / CLIP_STD for frame in chosen])
        pixels = torch.from_numpy(np.ascontiguousarray(rearrange(pixels, "t h w c -> t c h w"), np.float32))
        with torch.no_grad():
            x = model(pixel_values=pixels).image_embeds.numpy()  # (T, D)
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        for weight, bias in layers:
            x = x @ weight.T + bias
        return float(x.mean())

    return score


def _square(frame: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The middle of a frame, as CLIP sees pictures."""
    picture = Image.fromarray(np.ascontiguousarray(frame))
    zoom = side / min(picture.size)
    size = tuple(max(side, round(n * zoom)) for n in picture.size)
    left, top = ((n - side) // 2 for n in size)
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + side, top + side)))


def _linear_layers(head: Path, tensors: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(weight, bias) of each layer, first to last."""
    names = sorted((n for n in tensors if n.endswith("weight")), key=lambda n: [int(i) for i in re.findall(r"\d+", n)])
    pairs = [(n, n.removesuffix("weight") + "bias") for n in names]
    if not names or {n for pair in pairs for n in pair} != set(tensors):
        raise UserError(f"{head} is no linear head: weights and biases alone are wanted; found {', '.join(tensors)}")
    layers = [(tensors[w].astype(np.float32), tensors[b].astype(np.float32)) for w, b in pairs]
    widths = [weight.shape[::-1] if weight.ndim == 2 else (0, 0) for weight, _ in layers]
    if any(a[1] != b[0] for a, b in zip(widths, widths[1:])) or widths[-1][1] != 1:
        raise UserError(f"{head}: the layers ({', '.join(map(str, widths))}) do not lead to one score")
    return layers


def _libraries(folder: Path):
    """(torch, transformers), for a model in `folder`. torch is held to one thread: workers are the parallelism."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is no model folder: config.json is missing")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"captions and scores by a model need PyTorch: pip install 'torch>=2.4' ({error})") from error
    torch.set_num_threads(1)
    return torch, transformers
