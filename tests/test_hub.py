"""Weights on the Hugging Face hub, against a stand-in for its API: downloads, conversion, refusals, publishing."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import tiny
from huggingface_hub import constants

import lavie_jax
from lavie_jax import cascade
from lavie_jax.data.tokens import save_small_tokenizer
from lavie_jax.errors import UserError
from lavie_jax.stages import STAGES
from lavie_jax.training import options
from lavie_jax.weights import folder_hash, load_folder, locations
from lavie_jax.weights.hub import __main__ as command
from lavie_jax.weights.hub import publish
from lavie_jax.weights.hub.repository import Location, location_of
from lavie_jax.weights.locations import local_folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories; caches are in tmp_path."""
    with hub_server.serving() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest.py switches the real hub off
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "")
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cascade of tiny models, whose later stages share the base's text encoder."""
    return tiny.make_cascade(tmp_path_factory.mktemp("weights") / "cascade")


def test_locations_are_read_and_written():
    assert Location.parse("hub:a/b.c@v1/base/") == Location("a/b.c", "v1", "base")
    assert str(Location.parse("hub:a/b")) == "hub:a/b"
    commit = "0" * 40
    assert location_of(Path(f"/x/models--a--b-c/snapshots/{commit}/base")) == Location("a/b-c", commit, "base")
    assert location_of(Path("weights/base")) is None
    for wrong in ("hub:a", "hub:a/b@", "hub:/a/b", "hub:"):
        with pytest.raises(UserError, match="is not a location on the hub; give hub:OWNER/NAME"):
            local_folder(wrong)


def test_only_the_files_of_the_stages_in_question_are_downloaded(hub, folder):
    commit = hub.add_folder("someone/shapes", folder)
    hub.add("someone/shapes", {"README.md": b"", "optimizer.bin": b"large", "base/.hidden": b""})
    first = cascade.stage_folders("hub:someone/shapes", stages=("vsr",))
    assert folder_hash(first["vsr"]) == folder_hash(folder / "vsr")
    got = {name.removeprefix("someone/shapes/").split("/")[0] for name in hub.downloads()}
    assert {*first} >= {"vsr"} and not any("unet/model" in name and "/vsr/" not in name for name in hub.downloads())
    assert not got & {"README.md", "optimizer.bin"}
    hub.requests.clear()
    everything = cascade.stage_folders("hub:someone/shapes")
    assert {stage: folder_hash(path) for stage, path in everything.items()} == {
        stage: folder_hash(folder / stage) for stage in tiny.UNETS
    }
    assert not any("/vsr/unet" in name for name in hub.downloads())  # already there
    older = cascade.stage_folders(f"hub:someone/shapes@{commit}/base")
    assert older["base"].parts[-2:] == (commit, "base")
    assert locations.record("weights", older["base"]) == {"weights": f"hub:someone/shapes@{commit}/base"}
    assert set(lavie_jax.load("hub:someone/shapes", stages=["base"]).weights) == {"base"}


def test_a_cached_repository_is_used_without_a_network(hub, folder, monkeypatch):
    hub.add_folder("someone/base", folder / "base")
    online = local_folder("hub:someone/base")
    hub.down = True
    assert local_folder("hub:someone/base") == online and load_folder(online).stage == "base"
    with pytest.raises(UserError, match=r"hub:someone/other: the hub cannot be reached \(.*503.*\): check the network"):
        local_folder("hub:someone/other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert local_folder("hub:someone/base") == online
    with pytest.raises(
        UserError, match="hub:someone/other: the hub cannot be reached .*: check the network"
    ) as refused:
        local_folder("hub:someone/other")
    assert "\n" not in str(refused.value)


def test_a_cut_download_is_not_taken_for_whole(hub, folder):
    hub.add_folder("someone/base", folder / "base")
    whole = local_folder("hub:someone/base")
    (whole / "unet" / "model.safetensors").unlink()
    hub.down = True
    with pytest.raises(UserError, match="unet is missing|model.safetensors"):
        load_folder(local_folder("hub:someone/base"))
    hub.down = False
    assert folder_hash(local_folder("hub:someone/base")) == folder_hash(folder / "base")


@pytest.mark.parametrize(
    "location, message",
    [
        ("hub:someone/nothing", "there is no such repository, or it is private: check the name, or log in"),
        ("hub:someone/base@v9", "the repository has no branch, tag or commit 'v9'"),
        ("hub:someone/gated", "the repository is gated: accept its terms on http.*/someone/gated, then log in"),
        ("hub:someone/closed", "access is denied .*: log in with `hf auth login`"),
        ("hub:someone/text", "has no weights: the repository contains README.md, model.gguf; give one with a weights"),
        ("hub:someone/base/vsr", "has no weights: the repository contains config.json"),
        ("hub:someone/cut", "hub:someone/cut@[0-9a-f]{40} is incomplete: unet is missing"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(location, message, hub, folder):
    for name in ("base", "gated", "closed"):
        hub.add_folder(f"someone/{name}", folder / "base")
    hub.denied = {"someone/gated": (403, "GatedRepo"), "someone/closed": (403, "")}
    hub.add("someone/text", {"README.md": b"", "model.gguf": b""})
    hub.add("someone/cut", {"config.json": (folder / "base" / "config.json").read_bytes()})
    with pytest.raises(UserError, match=message) as refused:
        lavie_jax.load(location)
    assert "\n" not in str(refused.value) and location.partition("@")[0] in str(refused.value)


def test_training_starts_from_the_hub(hub, folder):
    hub.add_folder("someone/shapes", folder)
    argv = ["--config=configs/moving_shapes/base.py:tiny", "--workdir=nowhere"]
    config = options.parse([*argv, "--config.init_from=hub:someone/shapes/base"]).config
    assert load_folder(config.init_from, params=False).stage == "base" and "/snapshots/" in config.init_from


@pytest.mark.filterwarnings("ignore:Use 'content=")  # of huggingface_hub, when it uploads a large file
def test_a_folder_is_published_with_a_card_and_loaded_again(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    command.main(["push", str(folder), "someone/shapes", "--licence=apache-2.0", "--private"])
    location = capsys.readouterr().out.strip()
    commit, files = hub.commits["someone/shapes"][-1]
    assert location == f"hub:someone/shapes@{commit}"
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n") and 'lavie_jax.load("hub:someone/shapes")' in card
    for stage, path in cascade.stage_folders(location).items():
        assert folder_hash(path) == folder_hash(folder / stage) and folder_hash(path) in card
    assert "Not recorded" in card

    hub.add("someone/shapes", {"README.md": b"mine"})
    lavie_jax.push_to_hub(folder / "vsr", "someone/shapes", licence="mit")  # shares a part outside of it
    commit, files = hub.commits["someone/shapes"][-1]
    assert files["README.md"] == b"mine"
    assert folder_hash(local_folder(f"hub:someone/shapes@{commit}")) == folder_hash(folder / "vsr")


def test_the_card_of_a_run_has_its_training_and_numbers(folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/40/meta").mkdir(parents=True)
    record = {"step": 40, "config": {"stage": "base", "steps": 50, "batch": 8, "data": {"source": "array_record"}}}
    (run / "checkpoints/40/meta/metadata").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text('{"step": 40, "held_out/loss": 0.125}\n{"step": 40, "loss": 1}\n')
    (run / "weights").symlink_to(folder / "base")
    text = publish.card(run / "weights", "someone/shapes", "mit")
    for row in ("| step | 40 |", "| `data.source` | array_record |", "| held_out/loss | 0.125 at step 40 |"):
        assert row in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["someone/shapes"], "--licence"),
        (["shapes", "--licence=mit"], "'hub:shapes' is not a location on the hub"),
        (["someone/shapes/base", "--licence=mit"], "give OWNER/NAME, without a path"),
        (["someone/shapes", "--licence=mit"], "hub:someone/shapes: .*log in with `hf auth login`"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_line(words, message, hub, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["push", str(folder), *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message, line)
    assert not hub.commits


def test_a_folder_without_weights_is_not_published(hub, tmp_path):
    with pytest.raises(UserError, match="is not a weights folder"):
        lavie_jax.push_to_hub(tmp_path, "someone/shapes", licence="mit")
    assert not hub.requests


def test_originals_are_converted_with_the_files_that_conversion_reads(hub, folder, monkeypatch):
    """The converter, which has tests of its own, is replaced: it would need PyTorch."""
    calls = []

    def convert(stage, out, **files):
        calls.append((stage.name, files))
        shutil.copytree(folder / stage.name, out)
        return []

    monkeypatch.setattr(locations, "import_torch", lambda: None)
    monkeypatch.setattr(locations, "import_stage", convert)
    monkeypatch.setattr(locations, "inflate_pretrained", convert)
    unet = {"unet/config.json": b"{}", "unet/diffusion_pytorch_model.bin": b"", "vae/config.json": b"{}"}
    image = hub.add(STAGES["base"].image_repository, unet)
    commit = hub.add("someone/LaVie", {"lavie_base.pt": b"", "lavie_interpolation.pt": b"", "lavie_vsr.pt": b""})
    found = cascade.stage_folders("hub:someone/LaVie", stages=("base",))
    assert [name for name, _ in calls] == ["base"] and calls[0][1]["share"] is None
    assert calls[0][1]["unet_file"].name == "lavie_base.pt"
    assert not (calls[0][1]["pretrained"] / "unet/diffusion_pytorch_model.bin").exists()
    assert locations.record("weights", found["base"]) == {
        "weights": f"hub:someone/LaVie@{commit}/base",
        "weights_image_model": f"hub:CompVis/stable-diffusion-v1-4@{image}",
    }
    local_folder("hub:someone/LaVie", ("base", "interpolation"))
    assert [name for name, _ in calls] == ["base", "interpolation"]  # the base was converted before
    assert calls[1][1]["share"] == found["base"]
    assert local_folder("hub:CompVis/stable-diffusion-v1-4").name == "base"
    assert (calls[2][1]["pretrained"] / "unet/diffusion_pytorch_model.bin").exists()
    with pytest.raises(UserError, match="hub:stabilityai/stable-diffusion-x4-upscaler: there is no such repository"):
        local_folder("hub:someone/LaVie/vsr")


@pytest.mark.heavy  # sample.py in a process
def test_a_sample_records_repository_commit_and_hash(hub, folder, tmp_path):
    commit = hub.add_folder("someone/base", folder / "base")
    env = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    words = ["sample.py", "--prompt=a red circle", f"--out={tmp_path / 'out'}", "--weights"]
    for place, code in (("hub:someone/base", 0), ("hub:someone/nothing", 2)):
        done = subprocess.run(
            [sys.executable, *words, place], cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
    assert (
        done.stderr == "error: hub:someone/nothing: there is no such repository, or it is private: check the name, "
        "or log in with `hf auth login`, or set HF_TOKEN\n"
    )
    (file,) = (tmp_path / "out").glob("*.json")
    content = json.loads(file.read_text())
    assert content["made_with"]["weights"] == f"hub:someone/base@{commit}"
    assert content["request"]["weights_sha256"] == folder_hash(folder / "base")


@pytest.fixture
def originals(hub, tmp_path, monkeypatch):
    """Repositories like the published ones: LaVie's base, Stable Diffusion, the x4-upscaler; with tiny models."""
    checkpoints = pytest.importorskip("checkpoints")
    monkeypatch.setitem(checkpoints.TEXT, "vocab_size", 256)  # the small tokenizer's size
    sd = checkpoints.write_sd(tmp_path / "sd")
    x4 = checkpoints.write_sd(tmp_path / "x4", unet=checkpoints.X4_UNET, image=checkpoints.X4_IMAGE)
    (x4 / "scheduler/scheduler_config.json").write_text(json.dumps(checkpoints.X4_SCHEDULER))
    for folder, name in ((sd, STAGES["base"].image_repository), (x4, STAGES["vsr"].image_repository)):
        save_small_tokenizer(folder / "tokenizer", tiny.WORDS, length=tiny.CONTEXT)
        hub.add_folder(name, folder)
    for stage in ("base", "interpolation"):
        checkpoints.torch.save({"ema": checkpoints.lavie(stage)}, tmp_path / f"lavie_{stage}.pt")
    files = sorted(tmp_path.glob("lavie_*.pt"))
    hub.add("someone/LaVie", {file.name: file.read_bytes() for file in files})
    return hub


@pytest.mark.heavy  # imports torch, converts
def test_released_checkpoints_are_converted_once_with_their_image_model(originals, tmp_path):
    folders = cascade.stage_folders("hub:someone/LaVie", stages=("base",))
    (folder,) = folders.values()
    commit = originals.commits["someone/LaVie"][-1][0]
    image = f"hub:CompVis/stable-diffusion-v1-4@{originals.commits['CompVis/stable-diffusion-v1-4'][-1][0]}"
    assert locations.record("weights", folder) == {
        "weights": f"hub:someone/LaVie@{commit}/base", "weights_image_model": image,
    }  # fmt: skip
    assert load_folder(folder).stage == "base"
    assert not any("unet/diffusion" in name or "interpolation" in name for name in originals.downloads())
    before = folder_hash(folder)
    both = cascade.stage_folders("hub:someone/LaVie")  # converts the other stage, which shares the VAE
    assert set(both) == {"base", "interpolation"} and folder_hash(both["base"]) == before
    assert load_folder(both["interpolation"]).stage == "interpolation" and not (both["interpolation"] / "vae").exists()
    originals.requests.clear()
    assert local_folder(f"hub:someone/LaVie@{commit}/base") == folder and not originals.downloads()
    assert "someone/LaVie" in publish.card(folder, "someone/mine", "mit")


@pytest.mark.heavy  # imports torch, converts
def test_image_models_are_inflated(originals):
    for stage in ("base", "vsr"):
        folder = local_folder(f"hub:{STAGES[stage].image_repository}")
        assert load_folder(folder).stage == stage
        assert local_folder(locations.record("weights", folder)["weights"]) == folder


@pytest.mark.heavy  # imports torch, converts
def test_a_conversion_that_fails_leaves_nothing(originals, tmp_path):
    originals.add("someone/LaVie", {"lavie_base.pt": b"damaged"})
    with pytest.raises(UserError, match="lavie_base.pt"):
        local_folder("hub:someone/LaVie", ("base",))
    assert not list((tmp_path / "cache").rglob("config.json"))
