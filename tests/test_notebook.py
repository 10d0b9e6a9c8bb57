"""The committed Colab notebook equals the output of its script, and every cell runs in a fresh process."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lavie_jax.data.tokens import save_small_tokenizer
from lavie_jax.data.video_files import read_video
from lavie_jax.weights import load_folder
from tools import make_notebook

ROOT = Path(__file__).parents[1]
QUICK = {"frames": 4, "base_steps": 2, "interpolation_steps": 2, "vsr_steps": 2}
STAGES = ["base", "interpolation", "vsr"]  # of the notebook


def run(cwd: Path, *runs: dict, installed: bool = True) -> subprocess.CompletedProcess:
    """Runs the notebook in `cwd` once per dict of form values. `installed`: lavie_jax is importable from the start."""
    env = {**os.environ, "PYTHONPATH": str(ROOT) if installed else ""}
    command = [sys.executable, str(ROOT / "tests/run_notebook.py"), str(make_notebook.NOTEBOOK), json.dumps(runs)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def shown(done: subprocess.CompletedProcess) -> list[Path]:
    return [Path(path) for path in re.findall(r"^shown: (.+\.mp4) ", done.stdout, re.MULTILINE)]


def stages_of(paths: list[Path]) -> list[str]:
    return [path.parent.name.rpartition("-")[0] for path in paths]


def test_the_committed_notebook_is_the_output_of_the_script():
    assert make_notebook.NOTEBOOK.read_text(encoding="utf-8") == make_notebook.notebook(), (
        "run python -m tools.make_notebook"
    )


def test_it_is_a_colab_notebook_of_format_4_5():
    content = json.loads(make_notebook.notebook())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3" and content["metadata"]["accelerator"] == "TPU"
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in ids)
    for cell in content["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_every_form_field_has_a_default_of_its_type():
    kinds = {"string": str, "integer": int, "boolean": bool, "raw": object}
    fields = re.findall(r"^(\w+) = (.*?)  # @param (.*)$", "".join(text for _, _, text in make_notebook.CELLS), re.M)
    assert len(fields) == len({name for name, _, _ in fields}) > 20
    for name, default, kind in fields:
        value = json.loads(default.replace("False", "false").replace("None", "null"))
        if kind.startswith("["):
            assert value in json.loads(kind), name
        else:
            assert isinstance(value, kinds[re.fullmatch(r'\{type:"(\w+)"\}', kind)[1]]), name


@pytest.mark.heavy
@pytest.mark.parametrize("weights", ["tiny", ""], ids=["tiny", "shipped"])
def test_every_cell_runs_and_reuses_its_results(weights, tmp_path):
    values = {"results": str(tmp_path / "results"), "height": 32, "width": 32, **QUICK}
    if weights:
        values["weights"] = str(tiny.make_cascade(tmp_path / "weights"))
    done = run(ROOT / "notebooks", values, values, installed=False)
    assert done.returncode == 0, done.stderr
    paths = shown(done)
    assert stages_of(paths) == 2 * STAGES
    assert paths[:3] == paths[3:] and done.stdout.count("1 of 1 samples exist in") == 3
    base, interpolation, vsr = paths[:3]
    shapes = [read_video(path).shape for path in (base, interpolation, vsr)]
    assert shapes == [(4, 32, 32, 3), (13, 32, 32, 3), (13, 128, 128, 3)]
    assert (vsr.parent / "contact-sheet.png").exists()
    (left,) = re.findall(r"left on the devices: (\d+) bytes", done.stdout)
    assert int(left) < 10_000, "a stage's weights were still on the device when the next stage started"


@pytest.mark.heavy  # test_convert.py converts such files, and the test above samples
def test_pytorch_files_are_checked_converted_and_sampled(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import checkpoints

    monkeypatch.setitem(checkpoints.TEXT, "vocab_size", 256)  # the small tokenizer's size
    files = {"stable_diffusion": checkpoints.write_sd(tmp_path / "sd")}
    files["upscaler"] = checkpoints.write_sd(tmp_path / "x4", unet=checkpoints.X4_UNET, image=checkpoints.X4_IMAGE)
    (files["upscaler"] / "scheduler/scheduler_config.json").write_text(json.dumps(checkpoints.X4_SCHEDULER))
    for folder in files.values():
        save_small_tokenizer(folder / "tokenizer", tiny.WORDS, length=tiny.CONTEXT)
    for stage in STAGES:
        files[f"lavie_{stage}"] = tmp_path / f"{stage}.pt"
        torch.save({"ema": checkpoints.lavie(stage)}, files[f"lavie_{stage}"])
    sha256 = hashlib.sha256(files["lavie_vsr"].read_bytes()).hexdigest()
    weights = tmp_path / "weights"
    values = {
        **{name: str(path) for name, path in files.items()},
        "weights": str(weights),
        "results": str(tmp_path / "results"),
        **QUICK,
        "delete_originals": True,
        **{"prompt": "a red circle", "frames": 2, "height": 16, "width": 24, "vsr_noise_level": 10},
    }

    refused = run(tmp_path, {**values, "lavie_vsr_sha256": sha256[::-1]})
    assert refused.returncode and "vsr.pt is damaged or a different file" in refused.stderr
    assert {path.name for path in weights.iterdir()} == {"base", "interpolation"} and files["lavie_vsr"].exists()

    done = run(tmp_path, {**values, "lavie_vsr_sha256": sha256})  # converted stages are skipped
    assert done.returncode == 0, done.stderr
    assert {path.name for path in weights.iterdir()} == set(STAGES)
    assert load_folder(weights / "interpolation").stage == "interpolation"
    assert not (weights / "interpolation" / "vae").exists(), "it should be shared with the base"
    assert not list(tmp_path.glob("*.pt")) and (tmp_path / "sd").is_dir() and (tmp_path / "x4").is_dir()
    assert stages_of(shown(done)) == STAGES
    assert [read_video(path).shape[:3] for path in shown(done)] == [(2, 16, 24), (5, 16, 24), (5, 32, 48)]
