"""The stages of the cascade, one file each, with their inputs and outputs.

    base            text                          -> 16 key frames               base.py            LaVie sec. 3.1, 3.2
    prediction      text (+ known frames)         -> 16 key frames               prediction.py      SEINE, sec. 4.4
    interpolation   text + key frames             -> 61 frames                   interpolation.py   LaVie sec. 3.3
    vsr             text + low-resolution frames  -> frames of 4 times the size  vsr.py             LaVie sec. 3.4

`stage.py` documents their common interface and `settings.py` their sampling settings. `conditioning.py` calls the UNet
in training and in sampling, `windows.py` splits long clips, and `clips.py` handles their size, padding and memory.
A new stage is one file here and one entry of `settings.STAGE_INFO`.
"""

import importlib
from collections.abc import Iterator, Mapping

from lavie_jax.stages.settings import STAGE_INFO


class _Stages(Mapping):
    """{name: Stage}, in the order of the cascade. A stage is imported when it is first used, so that its settings can
    be read and checked without importing jax."""

    def __getitem__(self, name: str):
        if name not in STAGE_INFO:
            raise KeyError(name)
        return importlib.import_module(f"lavie_jax.stages.{name}").STAGE

    def __iter__(self) -> Iterator[str]:
        return iter(STAGE_INFO)

    def __len__(self) -> int:
        return len(STAGE_INFO)


STAGES = _Stages()
