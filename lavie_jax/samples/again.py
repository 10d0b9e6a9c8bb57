"""Makes a sample again from its video, which contains how it was made, or from its JSON file.

    python -m lavie_jax.samples.again samples/0000-a-red-circle-moving-left-0.mp4
    python -m lavie_jax.samples.again clip.mp4 --out again --weights weights/base

Runs sample.py with the settings in FILE. Options of sample.py that FILE cannot contain are passed on: weights folders,
and the files of --input, --first-frame, --last-frame, --lora and --embedding. sample.py refuses, before it samples,
weights or files whose hashes differ from those in FILE.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavie_jax.commands import scripts
from lavie_jax.data.video_files import FORMATS
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors
from lavie_jax.samples.outputs import SIDECAR_VERSION, Output
from lavie_jax.samples.prompt_syntax import Reading
from lavie_jax.samples.prompts import check_seed, check_unicode, one_line, prompts_at_of_json
from lavie_jax.samples.provenance import read_sample
from lavie_jax.stages.settings import STAGE_INFO

SCRIPT = scripts() / "sample.py"
# Fields of a request that only a file fulfils, and the options that give one.
FILES = {
    "input_sha256": ("--input",),
    "known_sha256": ("--first-frame", "--last-frame"),
    "loras": ("--lora",),
    "embeddings": ("--embedding",),
}
# Options that would make another sample, or replace one without comparing it with the file.
REFUSED = {
    *("--prompt", "--prompts-at", "--prompt-file", "--prompt-syntax", "--long-prompts", "--seed", "--num-videos"),
    *("--stages", "--preset", "--part", "--overwrite"),
    *(flag for info in STAGE_INFO.values() for _, flag, *_ in info.flags()),
}


def options_of(request: Mapping[str, Any]) -> list[str]:
    """Returns the options of sample.py that lead to this request, without those of FILES and the weights.

    Raises:
        UserError: a stage is unknown, as in files of another version, or a text cannot be on a command line.
    """
    settings = settings_of(request)
    prompt = f"--prompt={request['prompt']}"
    if prompts_at := request.get("prompts_at"):
        prompt = f"--prompts-at={one_line(prompts_at_of_json(prompts_at))}"
    options = [prompt, f"--seed={check_seed(request.get('seed'))}", f"--stages={','.join(settings)}"]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in Reading.stored(request).to_dict().items()]
    for stage, given in settings.items():
        for name, flag, kind, *_ in STAGE_INFO[stage].flags():
            if name in given:
                options.append(flag if kind is bool else f"{flag}={given[name]}")
    for option in options:
        check_unicode(option, "the sample's request")
    return options


def settings_of(request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {stage: settings that a user has to give} for this request, in the order of its stages.

    Raises:
        UserError: a stage is unknown, as in files of another version.
    """
    stages = request.get("stages")
    if not isinstance(stages, list) or not stages or not all(stage in list(STAGE_INFO) for stage in stages):
        raise UserError(f"the sample was made by the stages {stages}; known are {', '.join(STAGE_INFO)}")
    settings: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for stage in stages:
        own = request if STAGE_INFO[stage].main else request.get(stage)
        if not isinstance(own, Mapping):
            raise UserError(f"the file lacks the settings of {stage}, a stage that the sample was made by")
        for name, _, kind, *_ in STAGE_INFO[stage].flags():
            # A weights folder's window is recorded also where it is not used.
            unused = name == "long_window" and own.get("long") is None
            value = None if unused else own.get(name)
            if value is not None and (kind is not bool or value):
                settings[stage][name] = value
    return settings


def prepare(file: Path, out: Path, more: Sequence[str]) -> tuple[list[str], Path | None]:
    """Returns the options of sample.py, and the JSON file that holds it to the request, if it is new.

    Raises:
        UserError: the file does not contain how it was made, a file that it was made from is not given, or an option
            in `more` would make something else.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist")
    request, dtype = read_sample(file)
    given = [text.split("=")[0] for text in more]
    if other := next((option for option in given if option in REFUSED), None):
        raise UserError(f"{other}: the sample is made again as {file} describes it: use sample.py to make another one")
    for field, options in FILES.items():
        if request.get(field) and not set(given) & set(options):
            raise UserError(f"{file} was made with files of the user ({field}): give them with {' or '.join(options)}")
    check_folder(out, f"--out {out}")
    options = [*options_of(request), "--no-contact-sheet", f"--out={out}"]
    options += [f"--dtype={dtype}"] if dtype else []
    format = "png" if file.is_dir() else file.suffix[1:].lower()
    if format in FORMATS:
        options.append(f"--format={format}")
    sidecar = Output(folder=out, index=0, formats=(), request=request).path("json")
    if sidecar.exists():
        return [*options, *more], None
    out.mkdir(parents=True, exist_ok=True)
    content = {"format_version": SIDECAR_VERSION, "request": request, "made_with": {}}
    sidecar.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*options, *more], sidecar


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = Parser(
            prog="python -m lavie_jax.samples.again",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("file", type=Path, metavar="FILE", help="a video, picture or JSON file of sample.py")
        parser.add_argument("--out", type=Path, default=Path("again"), metavar="DIR", help="(default: %(default)s)")
        args, more = parser.parse_known_args(argv)
        options, sidecar = prepare(args.file, args.out, more)
    code = subprocess.run([sys.executable, str(SCRIPT), *options]).returncode
    if code == 2 and sidecar is not None:  # refused: what holds sample.py to the request was not made by it
        sidecar.unlink(missing_ok=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
