"""How prompts are read: weighted words, `(word:1.3)` and `[word]`, and prompts longer than the text encoder's window.

The syntax is that of A1111 (AUTOMATIC1111/stable-diffusion-webui), which other programs share in large part:

    (word)         more attention, by 1.1; ((word)) by 1.1^2
    [word]         less, by 1 / 1.1
    (word:1.3)     by 1.3. Weights multiply where brackets are nested
    \\( \\) \\[ \\] \\\\   the character itself
    BREAK          ends a chunk of a long prompt early

An unclosed bracket counts to the end, and a closing bracket without an opening one is text. Standard library only.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lavie_jax.errors import UserError, suggest

PLAIN, WEIGHTED = SYNTAXES = ("plain", "weighted")
CUT, CHUNK = LONG_PROMPTS = ("cut", "chunk")
STEP = 1.1  # the weight of a pair of brackets without a number
MAX_WEIGHT = 10.0

_PIECE = re.compile(
    r"""\\[\\()\[\]|]?                                     # an escaped character, or a backslash that is dropped
    |:(?P<space>\s*)(?P<weight>[^:\s\\()\[\]]+)\s*\)     # the end of (word:1.3)
    |:\s*[+-]?[.\d]+\s*(?P<editing>\])
    |[()\[\]]|[^\\()\[\]:]+|:""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_OTHERS = (  # of A1111's syntax; they would change the prompt during sampling, or load files
    (re.compile(r"\bAND\b"), "AND adds up the guidance of several prompts, which is not supported: write and"),
    (re.compile(r"<(lora|lyco|hypernet):"), "files are not named in prompts: give a LoRA with --lora FILE:SCALE"),
)


class Run(NamedTuple):
    """A part of a prompt, without its brackets, and its weight."""

    text: str
    weight: float = 1.0


Parts = tuple[tuple[Run, ...], ...]  # a prompt as runs, divided at BREAK


@dataclasses.dataclass(frozen=True)
class Reading:
    """How prompts are read; the defaults take them as they are.

    Attributes:
        prompt_syntax: "plain", or "weighted" for brackets with a meaning.
        long_prompts: "cut" ignores words after the text encoder's window; "chunk" encodes them in further windows.

    Raises:
        UserError: an unknown value.
    """

    prompt_syntax: str = PLAIN
    long_prompts: str = CUT

    def __post_init__(self):
        for name, allowed in (("prompt_syntax", SYNTAXES), ("long_prompts", LONG_PROMPTS)):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name}: unknown value {value!r}{suggest(str(value), allowed)}")

    @classmethod
    def stored(cls, request: Mapping[str, Any]) -> "Reading":
        """Returns the reading of a request that is stored with a sample (`to_dict`)."""
        return cls(**{f.name: request[f.name] for f in dataclasses.fields(cls) if f.name in request})

    @property
    def weighted(self) -> bool:
        """Whether brackets have a meaning."""
        return self.prompt_syntax == WEIGHTED

    @property
    def chunked(self) -> bool:
        """Whether a prompt may have several windows."""
        return self.long_prompts == CHUNK

    def to_dict(self) -> dict[str, str]:
        """The values that are not the defaults, for the record of a sample."""
        values = dataclasses.asdict(self)
        return {f.name: values[f.name] for f in dataclasses.fields(self) if values[f.name] != f.default}

    def parse(self, text: str, suffix: str = "", *, closed: bool = False) -> Parts:
        """Returns a prompt, to which `suffix` is appended, as weighted runs.

        Args:
            text: the prompt.
            suffix: appended to it; brackets of the prompt do not reach into it.
            closed: whether an unclosed bracket of the prompt is an error.

        Raises:
            UserError: the prompt is of brackets alone, a weight is out of range, or what it means is not supported.
        """
        if not self.weighted:
            return ((Run(text + suffix),),)
        parts = [*_parsed(text, closed)]
        first, *others = _parsed(suffix, closed=False)
        parts = [*parts[:-1], parts[-1] + first, *others]
        if len(parts) > 1 and not self.chunked:
            raise UserError(f"prompt {text!r}: BREAK begins another chunk: use --long-prompts {CHUNK}, or leave it out")
        return tuple(map(_merged, parts))


AS_IS = Reading()


def words_of(parts: Parts) -> str:
    """Returns the text of a parsed prompt, without its weights, with spaces where its pieces are tokenized apart."""
    return " ".join(run.text.strip() for part in parts for run in part)


def _parsed(text: str, closed: bool) -> list[list[Run]]:
    """Returns the runs of a text, divided at BREAK."""
    for pattern, reason in _OTHERS:
        if pattern.search(text):
            raise UserError(f"prompt {text!r}: {reason}")
    runs: list[Run | None] = []  # None is BREAK
    round_starts: list[int] = []  # the run at which each open bracket begins
    square_starts: list[int] = []

    def close(starts: list[int], weight: float) -> None:
        first = starts.pop()
        runs[first:] = [run and run._replace(weight=run.weight * weight) for run in runs[first:]]

    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece == "(":
            round_starts.append(len(runs))
        elif piece == "[":
            square_starts.append(len(runs))
        elif piece == ")" and round_starts:
            close(round_starts, STEP)
        elif piece == "]" and square_starts:
            close(square_starts, 1 / STEP)
        elif match["weight"] and round_starts and (weight := _weight(text, match)) is not None:
            close(round_starts, weight)
        elif piece.startswith("\\"):
            runs.append(Run(piece[1:]))
        elif square_starts and (match["editing"] or "|" in piece):
            raise UserError(
                f"prompt {text!r}: [a:b:0.5] and [a|b], which change the prompt during sampling, are not supported: "
                "use --prompts-at for a change over time, or write \\[ and \\] for brackets as text"
            )
        else:
            ends_bracket = bool(match["weight"] and round_starts)  # "(time: noon)", text after a colon
            for number, words in enumerate(_BREAK.split(piece[:-1] if ends_bracket else piece)):
                runs += [None, Run(words)] if number else [Run(words)]
            if ends_bracket:
                close(round_starts, STEP)
    if closed and (round_starts or square_starts):
        raise UserError(f"prompt {text!r}: close the bracket before the | at which this prompt ends")
    while round_starts:
        close(round_starts, STEP)
    while square_starts:
        close(square_starts, 1 / STEP)
    return _checked(text, runs)


def _weight(text: str, match: re.Match) -> float | None:
    """Returns the weight that ends a bracket; None for text after a colon and a space."""
    if _NUMBER.fullmatch(match["weight"]):
        return float(match["weight"])
    if match["space"]:
        return None
    raise UserError(
        f"prompt {text!r}: {match['weight']!r} is not a weight, a number from 0 to {MAX_WEIGHT:g}, as in (word:1.3); "
        "leave a space after a colon that is text"
    )


def _checked(text: str, runs: list[Run | None]) -> list[list[Run]]:
    """Divides runs at BREAK. Raises UserError for weights out of range, and for brackets without a word."""
    parts: list[list[Run]] = [[]]
    for run in runs:
        if run is None:
            parts.append([])
        elif run.text:
            parts[-1].append(run)
    words = [run for part in parts for run in part if run.text.strip()]
    if text.strip() and not words:
        raise UserError(f"prompt {text!r} has no words, only brackets: give words, or --prompt-syntax {PLAIN}")
    if wrong := next((run for run in words if not 0 <= run.weight <= MAX_WEIGHT), None):
        raise UserError(
            f"prompt {text!r}: the weight of {wrong.text.strip()!r} is {wrong.weight:.6g}; weights are from 0 to "
            f"{MAX_WEIGHT:g}, also where brackets are nested"
        )
    return parts


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Joins neighbours of equal weight, which are then tokenized together, as without brackets."""
    merged: list[Run] = []
    for text, weight in runs:
        weight = round(weight, 9)  # 1.1 and 1 / 1.1 cancel
        if merged and merged[-1].weight == weight:
            merged[-1] = Run(merged[-1].text + text, weight)
        else:
            merged.append(Run(text, weight))
    return tuple(merged)
