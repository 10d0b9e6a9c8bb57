"""LoRA files and textual inversions for the stages that take them: `--lora`, `--embedding`, and `load(loras=...)`.

Both are merged into the weights when these are loaded, one tensor at a time. They are checked before, against the names
and shapes in the weights folders.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lavie_jax.data import tokens
from lavie_jax.errors import UserError, user_path
from lavie_jax.models.registry import network_name
from lavie_jax.stages import STAGES
from lavie_jax.weights import Part, Weights
from lavie_jax.weights.embeddings import Embedding, read_embedding
from lavie_jax.weights.folder import read_part
from lavie_jax.weights.lora import Changes, Lora, check_scale, merge_array, read_lora, shapes_of

TOKEN_EMBEDDING = "embeddings/token_embedding/embedding"  # path of CLIP's table of tokens
PARTS = ("unet", "text_encoder")  # that a LoRA may change


def parse_embedding(text: str) -> tuple[str, str | None]:
    """Parses FILE[:TOKEN]; a token does not contain slashes, and a drive's letter is not a file."""
    file, colon, word = text.rpartition(":")
    if not colon or len(file) < 2 or set(word) & set("/\\") or user_path(text).exists():
        return text, None
    return file, word


@dataclasses.dataclass(frozen=True)
class Personal:
    """LoRA files and embeddings to add to the weights.

    Attributes:
        loras: (file, strength), merged in this order.
        embeddings: new words.
    """

    loras: tuple[tuple[Lora, float], ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @classmethod
    def read(cls, loras: Iterable[Any] = (), embeddings: Iterable[Any] = ()) -> "Personal":
        """Reads files: a LoRA is a path or (path, strength), an embedding a path or (path, word). Raises UserError."""
        pairs = [_pair(one, 1.0) for one in _several(loras)]
        checked = [(file, check_scale(file, strength)) for file, strength in pairs]
        words = [_pair(one, None) for one in _several(embeddings)]
        return cls(
            loras=tuple((read_lora(Path(file)), strength) for file, strength in checked),
            embeddings=tuple(read_embedding(Path(file), word) for file, word in words),
        )

    def __bool__(self) -> bool:
        return bool(self.loras or self.embeddings)

    @property
    def words(self) -> dict[str, int]:
        """{new word: number of its vectors}."""
        words = {}
        for one in self.embeddings:
            if one.word in words:
                raise UserError(f"two embeddings have the word {one.word!r}: give one another, as in FILE:WORD")
            words[one.word] = len(one.vectors)
        return words

    def record(self) -> dict[str, Any]:
        """Returns what determines a sample, as JSON values; {} without files."""
        loras = [{"scale": strength, "sha256": lora.sha256} for lora, strength in self.loras]
        embeddings = [{"word": one.word, "sha256": one.sha256} for one in self.embeddings]
        return ({"loras": loras} if loras else {}) | ({"embeddings": embeddings} if embeddings else {})

    def files(self) -> dict[str, list[str]]:
        """Returns the paths of the files, for the record of how a sample was made; {} without files."""
        loras, embeddings = [str(lora.path) for lora, _ in self.loras], [str(one.path) for one in self.embeddings]
        return ({"loras": loras} if loras else {}) | ({"embeddings": embeddings} if embeddings else {})

    def apply(self, weights: Mapping[str, Weights]) -> tuple[dict[str, Weights], list[str]]:
        """Merges everything into the stages that take it.

        Args:
            weights: {stage: weights folder}; for one that was loaded without parameters, all is checked and the words
                are added.

        Returns:
            The weights, and notes for the user about what does not apply.

        Raises:
            UserError: a file belongs to another model, or a word is in the vocabulary.
        """
        if not self:
            return dict(weights), []
        takers = [stage for stage in weights if STAGES[stage].takes_adapters]
        others = [stage for stage in weights if stage not in takers]
        what = " and ".join(["LoRA files"] * bool(self.loras) + ["embeddings"] * bool(self.embeddings))
        if not takers:
            raise UserError(
                f"{what} of Stable Diffusion 1.x do not fit the stage {', '.join(others)}; they are for "
                f"{', '.join(name for name, stage in STAGES.items() if stage.takes_adapters)}"
            )
        notes = [f"{what} are not applied to {', '.join(others)}, which is of another model family"] if others else []
        changes, more = self._changes({stage: weights[stage] for stage in takers})
        changed = dict(weights)
        for stage in takers:
            changed[stage] = _merged(weights[stage], changes[stage])
            if self.embeddings:
                changed[stage] = self._with_words(changed[stage])
        return changed, list(dict.fromkeys(notes + more))

    def _changes(self, weights: Mapping[str, Weights]) -> tuple[dict[str, list[tuple[Changes, float]]], list[str]]:
        """Returns the changes of each stage, and notes. Raises UserError for a LoRA that fits none of them."""
        shapes = {stage: {part: _shapes(own, part) for part in PARTS} for stage, own in weights.items()}
        found: dict[str, list[tuple[Changes, float]]] = {stage: [] for stage in weights}
        notes = []
        for lora, strength in self.loras:
            errors = []
            for stage in weights:
                try:
                    changes, more = lora.changes(shapes[stage])
                except UserError as error:
                    errors.append((stage, error))
                else:
                    found[stage].append((changes, strength))
                    notes += more
            if len(errors) == len(weights):
                raise errors[0][1]
            notes += [f"not applied to {stage}: {error}" for stage, error in errors]
        return found, notes

    def _with_words(self, weights: Weights) -> Weights:
        """Returns weights whose tokenizer and token embedding have the new words."""
        shapes = _shapes(weights, "text_encoder")
        if TOKEN_EMBEDDING not in shapes:
            raise UserError(
                f"embeddings are new words of CLIP's text encoder, but {weights.path} has a "
                f"{network_name(weights.text_encoder.config)}"
            )
        width = shapes[TOKEN_EMBEDDING][1]
        for one in self.embeddings:
            if one.vectors.shape[1] != width:
                family = {1024: ", Stable Diffusion 2's", 1280: ", Stable Diffusion XL's"}.get(one.vectors.shape[1], "")
                raise UserError(
                    f"{one.path} has vectors of width {one.vectors.shape[1]}{family}, but the text encoder of "
                    f"{weights.path} has {width}"
                )
        first = len(tokens.load_tokenizer(weights.tokenizer_dir, self.words)) - sum(self.words.values())
        rows = np.concatenate([one.vectors for one in self.embeddings])
        part = weights.text_encoder
        size = max(part.config.vocab_size, first + len(rows))
        params = flatten_dict(part.params, sep="/")
        if params:
            old = np.asarray(params[TOKEN_EMBEDDING])
            table = np.zeros((size, width), old.dtype)
            table[: len(old)] = old
            table[first : first + len(rows)] = rows.astype(old.dtype)
            params[TOKEN_EMBEDDING] = table
        config = dataclasses.replace(part.config, vocab_size=size)
        encoder = Part(config, unflatten_dict(params, sep="/"))
        return dataclasses.replace(weights, text_encoder=encoder, new_words=self.words)


def _shapes(weights: Weights, part: str) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of a part, from its file if its parameters were not loaded."""
    params = flatten_dict(getattr(weights, part).params, sep="/")
    return shapes_of(params or read_part(weights.path, part)[1])


def _merged(weights: Weights, changes: Sequence[tuple[Changes, float]]) -> Weights:
    """Returns weights with changes merged into the parameters, if these were loaded."""
    parts = {}
    for part in PARTS:
        flat = flatten_dict(getattr(weights, part).params, sep="/")
        for path in flat:
            own = [(one[part][path], strength) for one, strength in changes if path in one[part]]
            if own:
                flat[path] = merge_array(flat[path], own)
        parts[part] = Part(getattr(weights, part).config, unflatten_dict(flat, sep="/"))
    return dataclasses.replace(weights, **parts)


def _several(files: Any) -> list[Any]:
    """Returns a list of files; a single path is a list of one."""
    return [files] if isinstance(files, str | os.PathLike) else list(files)


def _pair(given: Any, default: Any) -> tuple[Any, Any]:
    """Returns (path, value) of a path, or of such a pair. Raises UserError for anything else."""
    path, value = given if isinstance(given, tuple | list) and len(given) == 2 else (given, default)
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f"loras and embeddings are lists of files, or of (file, scale) and (file, word); given {given!r}"
        )
    return path, value
