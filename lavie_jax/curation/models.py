"""Captions and aesthetic scores from user-supplied models, run with PyTorch on one thread.

Nothing is downloaded: a model is a folder in the format of transformers' `save_pretrained`.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

from lavie_jax.errors import UserError

# Both take the sample frames of a scene, uint8 (T, H, W, 3).
Captioner = Callable[[np.ndarray], str]
BatchCaptioner = Callable[[Sequence[np.ndarray]], list[str]]
Scorer = Callable[[np.ndarray], float]

CAPTION_TOKENS = 40
# Per-channel normalization of CLIP's training images (arXiv 2103.00020).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_captioner(captioner: str | Captioner) -> Captioner:
    """Returns the captioner given by a model folder, "module:function", or a function.

    A folder holds an image-to-text model with its processor, such as BLIP or GIT. It captions the middle frame
    greedily, so that the same frame always gets the same caption. A function receives the sample frames of a scene.

    Raises:
        UserError: `captioner` is something else, or cannot be loaded.
    """
    if callable(captioner):
        return captioner
    if Path(captioner).is_dir():
        return _model_captioner(Path(captioner))
    module, colon, name = captioner.partition(":")
    if not colon:
        raise UserError(f"--captioner must be a folder or 'module:function'; {captioner!r} is neither")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--captioner {captioner!r} cannot be imported: {error}") from error
    if not callable(function):
        raise UserError(f"--captioner {captioner!r} is not a function")
    return function


def make_batch_captioner(captioner: str | Captioner) -> BatchCaptioner:
    """Returns the same captioner for several scenes at a time; a model runs on the GPU if PyTorch finds one."""
    if isinstance(captioner, str) and Path(captioner).is_dir():
        return _batch_captioner(Path(captioner), accelerator=True)
    one = make_captioner(captioner)
    return lambda scenes: [str(one(frames)) for frames in scenes]


def _model_captioner(folder: Path) -> Captioner:
    captions = _batch_captioner(folder)
    return lambda frames: captions([frames])[0]


def _batch_captioner(folder: Path, *, accelerator: bool = False) -> BatchCaptioner:
    torch, transformers = _libraries(folder)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{str(folder)!r} does not hold an image-to-text model with its processor: {error}") from error
    device = "cuda" if accelerator and torch.cuda.is_available() else "cpu"
    model.eval().to(device)

    def captions(scenes: Sequence[np.ndarray]) -> list[str]:
        """Captions the middle frames."""
        pictures = [Image.fromarray(np.ascontiguousarray(frames[len(frames) // 2])) for frames in scenes]
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False)
        return processor.batch_decode(ids, skip_special_tokens=True)

    return captions


def make_scorer(clip: Path, head: Path) -> Scorer:
    """Returns a function that computes the aesthetic score of a scene, the mean over three of its sample frames.

    Args:
        clip: folder of a CLIP model.
        head: .safetensors or PyTorch file of one or more consecutive linear layers, without activations, on CLIP's
            normalized image embedding. LAION's predictors have this form.

    Raises:
        UserError: the folder does not hold a CLIP model, or the head does not fit it.
    """
    from lavie_jax.weights.reading import read_weights_file

    torch, transformers = _libraries(clip)
    layers = _linear_layers(head, {name: tensor.read() for name, tensor in read_weights_file(head).items()})
    try:
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{str(clip)!r} does not hold a CLIP model: {error}") from error
    model.eval()
    side, width = model.config.image_size, model.config.projection_dim
    if layers[0][0].shape[1] != width:
        raise UserError(f"{head} takes embeddings of {layers[0][0].shape[1]} numbers; CLIP in {clip} has {width}")

    def score(frames: UInt8[np.ndarray, "t h w 3"]) -> float:
        """Returns the mean score of the first, middle and last frame."""
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
    """Resizes and center-crops a frame like CLIP's image processor."""
    picture = Image.fromarray(np.ascontiguousarray(frame))
    zoom = side / min(picture.size)
    size = tuple(max(side, round(n * zoom)) for n in picture.size)
    left, top = ((n - side) // 2 for n in size)
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + side, top + side)))


def _linear_layers(head: Path, tensors: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (weight, bias) of each layer, first to last."""
    names = sorted((n for n in tensors if n.endswith("weight")), key=lambda n: [int(i) for i in re.findall(r"\d+", n)])
    pairs = [(n, n.removesuffix("weight") + "bias") for n in names]
    if not names or {n for pair in pairs for n in pair} != set(tensors):
        raise UserError(f"{head} is not a linear head: only weights and biases are allowed; found {', '.join(tensors)}")
    layers = [(tensors[w].astype(np.float32), tensors[b].astype(np.float32)) for w, b in pairs]
    widths = [weight.shape[::-1] if weight.ndim == 2 else (0, 0) for weight, _ in layers]
    if any(a[1] != b[0] for a, b in zip(widths, widths[1:])) or widths[-1][1] != 1:
        raise UserError(f"{head}: layers of shapes {', '.join(map(str, widths))} do not chain to a single score")
    return layers


def _libraries(folder: Path):
    """Imports torch, limited to one thread because workers provide the parallelism, and transformers."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is not a model folder: config.json is missing")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"captioning and scoring models need PyTorch: pip install 'torch>=2.6' ({error})") from error
    torch.set_num_threads(1)
    return torch, transformers
