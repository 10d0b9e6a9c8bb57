"""Write notebooks/lavie_colab.ipynb, the project in Colab: from weights to videos, stage by stage.

    python -m tools.make_notebook

The cells are here and nowhere else; tests/test_notebook.py sees to it that the committed notebook is what this makes,
and runs it. Cells are plain Python, without magics; a line `name = value  # @param ...` is a field of a Colab form.
"""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "lavie_colab.ipynb"

ABOUT = """
# LaVie in JAX

Text to video in three stages ([LaVie](https://arxiv.org/abs/2309.15103)): **base** makes key frames from a prompt,
**interpolation** four times as many frames, **vsr** frames of four times the size.

Run the cells from top to bottom. With nothing changed they sample a small model that comes with the project; it knows
one small world, coloured shapes that move. Weights of your own, Stable Diffusion and LaVie's checkpoints, are converted
below. One stage's weights are on the chip at a time, and on the host they are mapped from disk, not held in memory: it
is made for one chip of 16 GB and a host of 12 GB. The project's README says what was measured, and what not yet.

Everything is kept in the folder `results`. A cell that was stopped goes on where it was when it is run again, also in a
new session if the folder is on a mounted Drive. Other settings go to another folder: nothing is overwritten.
"""

INSTALL = """
# @title Install
import importlib.util
import subprocess
import sys
from pathlib import Path

# @markdown In Colab: the address of the project's git repository, and the runtime's hardware. Where `lavie_jax` is
# @markdown installed already, both are left alone. If Colab then asks for a restart, restart and run this cell again.
repository = ""  # @param {type:"string"}
hardware = "tpu"  # @param ["tpu", "cuda", "cpu"]

CLONE = Path("lavie-clone").resolve()

for folder in (Path.cwd(), Path.cwd().parent):  # opened in a clone
    if (folder / "sample.py").is_file():
        sys.path.insert(0, str(folder))
if importlib.util.find_spec("lavie_jax") is None:
    if not repository and not CLONE.exists():
        raise SystemExit("repository: give the address of the project's git repository")
    extra = {"tpu": "[tpu]", "cuda": "[cuda]", "cpu": ""}[hardware]
    if not CLONE.exists():
        subprocess.run(["git", "clone", "--depth", "1", repository, str(CLONE)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{CLONE}{extra}"], check=True)
if CLONE.exists():  # for sample.py and convert_torch.py, which are no part of the package
    sys.path.insert(0, str(CLONE))
"""

DEVICE = """
# @title The device
import jax

import lavie_jax

print(f"lavie_jax {lavie_jax.__version__}, jax {jax.__version__}")
for device in jax.local_devices():
    memory = (device.memory_stats() or {}).get("bytes_limit")
    print(device.device_kind, "" if memory is None else f"{memory / 2**30:.1f} GiB")
if jax.local_devices()[0].platform == "cpu":
    print("No TPU or GPU: good for the small model. In Colab: Runtime, Change runtime type.")
"""

KEEP = """
# @title Where things are kept
# @markdown To keep them beyond this session, mount Drive and name a folder in it: `/content/drive/MyDrive/lavie`.
results = "results"  # @param {type:"string"}
mount_drive = False  # @param {type:"boolean"}

if mount_drive:
    from google.colab import drive

    drive.mount("/content/drive")
"""

WEIGHTS = """
## Weights

Leave `weights` empty, and the small model that comes with the project is used; go on with the prompt. Or name a folder
that has some of `base/`, `interpolation/` and `vsr/`, or that shall get them from PyTorch files of yours.

For those, name LaVie's checkpoints and the image models that they were made from: Stable Diffusion 1.4 for base and
interpolation, the x4-upscaler for vsr. A place is a path, e.g. on a mounted Drive, or on the Hugging Face hub
`hub:OWNER/NAME` for an image model and `hub:OWNER/NAME/FILE` for a checkpoint. An image model is a diffusers folder,
or a CompVis `.ckpt` with the folder of its tokenizer. A SHA-256 that you give is checked; for a folder give
`HASH NAME, HASH NAME` of files in it.

Their licences are between you and their authors: read them before you use or share what you make.
"""

CONVERT = """
# @title Weights
import convert_torch
from lavie_jax import cascade
from lavie_jax.weights import originals

weights = ""  # @param {type:"string"}

# @markdown PyTorch files, to be converted into it:
lavie_base = ""  # @param {type:"string"}
lavie_base_sha256 = ""  # @param {type:"string"}
lavie_interpolation = ""  # @param {type:"string"}
lavie_interpolation_sha256 = ""  # @param {type:"string"}
lavie_vsr = ""  # @param {type:"string"}
lavie_vsr_sha256 = ""  # @param {type:"string"}
stable_diffusion = ""  # @param {type:"string"}
stable_diffusion_sha256 = ""  # @param {type:"string"}
stable_diffusion_tokenizer = ""  # @param {type:"string"}
upscaler = ""  # @param {type:"string"}
upscaler_sha256 = ""  # @param {type:"string"}
downloads = "downloads"  # @param {type:"string"}
# @markdown Once converted, delete the files named above and what was downloaded (folders that you named stay):
delete_originals = False  # @param {type:"boolean"}

diffusion = (stable_diffusion, stable_diffusion_sha256)
sources = {  # stage: its checkpoint and its image model, each with its hash
    "base": ((lavie_base, lavie_base_sha256), diffusion),
    "interpolation": ((lavie_interpolation, lavie_interpolation_sha256), diffusion),
    "vsr": ((lavie_vsr, lavie_vsr_sha256), (upscaler, upscaler_sha256)),
}
named = [stage for stage, ((checkpoint, _), _) in sources.items() if checkpoint]
if named and not weights:
    raise SystemExit("weights: name the folder for what is converted")
todo = [stage for stage in named if not (Path(weights) / stage / "config.json").exists()]
for number, stage in enumerate(todo):
    (checkpoint, checkpoint_hash), (image_model, image_hash) = sources[stage]
    if not image_model:
        raise SystemExit(f"{stage}: name the image model that the checkpoint was made from, too")
    files = {
        "unet": originals.get(checkpoint, downloads, sha256=checkpoint_hash),
        "pretrained": originals.get(image_model, downloads, sha256=image_hash),
        "out": Path(weights) / stage,
    }
    if stage != "vsr" and stable_diffusion_tokenizer:
        files["tokenizer"] = stable_diffusion_tokenizer
    if stage == "interpolation" and (Path(weights) / "base" / "config.json").exists():
        files["share"] = Path(weights) / "base"  # VAE and text encoder are the same: they are kept once
    if convert_torch.main(["import", f"--stage={stage}", *(f"--{name}={path}" for name, path in files.items())]):
        raise SystemExit(f"{stage} was not converted")
    if delete_originals:
        originals.discard(checkpoint, downloads)
        if image_model not in [sources[later][1][0] for later in todo[number + 1 :]]:
            originals.discard(image_model, downloads)

print("weights:", ", ".join(f"{stage} in {path}" for stage, path in cascade.stage_folders(weights or None).items()))
"""

PROMPT = """
# @title What to make
prompt = "a small red circle moving left over a blue background"  # @param {type:"string"}
seed = 0  # @param {type:"integer"}
# @markdown `all` is every stage that has weights.
stages = "all"  # @param ["all", "base", "base,interpolation", "base,vsr", "base,interpolation,vsr"]

# @markdown What is empty or `None` is as the weights say.
negative_prompt = ""  # @param {type:"string"}
frames = None  # @param {type:"raw"}
height = None  # @param {type:"raw"}
width = None  # @param {type:"raw"}
sampler = ""  # @param ["", "ddpm", "ddim", "euler", "respaced_ddim", "dpm++2m"]
base_steps = None  # @param {type:"raw"}
base_guidance = None  # @param {type:"raw"}
interpolation_steps = None  # @param {type:"raw"}
interpolation_guidance = None  # @param {type:"raw"}
vsr_steps = None  # @param {type:"raw"}
vsr_guidance = None  # @param {type:"raw"}
# @markdown Noise on the small frames, 0 to 350: more lets vsr invent more. Tiles, in small pixels, need less memory.
vsr_noise_level = None  # @param {type:"raw"}
vsr_tile = None  # @param {type:"raw"}
"""

SAMPLING = '''
import hashlib

from IPython.display import Image, Video, display

import sample
from lavie_jax.samples.outputs import slug
from lavie_jax.stages.settings import parse_stages

chosen = parse_stages(list(cascade.stage_folders(weights or None)) if stages == "all" else stages, own_clip=False)


def make(stage, given, clip=None):
    """Make a stage of the sample, or find what a run before made; show it. Returns the file of its exact frames."""
    name = f"{slug(prompt)}-{seed}"
    words = [f"--prompt={prompt}", f"--seed={seed}", f"--stages={stage}"]
    words += [f"--format={'mp4' if stage == 'vsr' else 'mp4,npz'}"]
    words += [f"--weights={weights}"] if weights else []
    words += [f"--input={clip}"] if clip else []
    prefix = "" if stage == "base" else f"{stage}-"
    words += [f"--{prefix}{setting}={value}" for setting, value in given.items() if value is not None]
    # Its settings, and through `clip` those of the stages before, name the folder: none is used for two requests.
    out = Path(results) / name / f"{stage}-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}"
    if sample.main([*words, f"--out={out}"]):
        raise SystemExit(f"{stage} is not finished; this cell, run again, goes on where it is")
    jax.clear_caches()  # the next stage's programs take the place of this one's
    display(Video(filename=str(out / f"0000-{name}.mp4"), embed=True, width=512, html_attributes="controls loop"))
    if (sheet := out / "contact-sheet.png").exists():
        display(Image(filename=str(sheet)))
    print(f"kept in {out}")
    return out / f"0000-{name}.npz"


print(f"{prompt!r}: {', '.join(chosen)}")
'''

BASE = """
# @title Base: key frames
clip = make(
    "base",
    {
        "negative-prompt": negative_prompt or None,
        "frames": frames,
        "height": height,
        "width": width,
        "sampler": sampler or None,
        "steps": base_steps,
        "guidance": base_guidance,
    },
)
"""

INTERPOLATION = """
# @title Interpolation: the frames between them
smooth = clip
if "interpolation" in chosen:
    smooth = make("interpolation", {"steps": interpolation_steps, "guidance": interpolation_guidance}, clip)
else:
    print("interpolation is not among the stages")
"""

VSR = """
# @title Super-resolution: four times the size
if "vsr" in chosen:
    make(
        "vsr",
        {"steps": vsr_steps, "guidance": vsr_guidance, "noise-level": vsr_noise_level, "tile": vsr_tile},
        smooth,
    )
else:
    print("vsr is not among the stages")
"""

KEPT = """
# @title What is kept
for path in sorted((Path(results) / f"{slug(prompt)}-{seed}").rglob("*.mp4")):
    print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
"""

CELLS = (
    ("about", "markdown", ABOUT),
    ("install", "code", INSTALL),
    ("device", "code", DEVICE),
    ("keep", "code", KEEP),
    ("weights-text", "markdown", WEIGHTS),
    ("weights", "code", CONVERT),
    ("prompt", "code", PROMPT),
    ("sampling", "code", SAMPLING),
    ("base", "code", BASE),
    ("interpolation", "code", INTERPOLATION),
    ("vsr", "code", VSR),
    ("kept", "code", KEPT),
)


def notebook() -> str:
    """The notebook as JSON, format 4.5."""
    cells = []
    for name, kind, text in CELLS:
        cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True)}
        if kind == "code":
            form = {"cellView": "form"} if "# @param" in text else {}  # Colab shows the form and folds the code
            cell |= {"execution_count": None, "metadata": form, "outputs": []}
        cells.append(cell)
    metadata = {
        "accelerator": "TPU",
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
    print(f"wrote {NOTEBOOK}")


if __name__ == "__main__":
    main()
