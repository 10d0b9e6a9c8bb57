"""Weights on the Hugging Face hub, against a stand-in for its API: downloads, conversion, refusals, publishing."""

import json
import re
from pathlib import Path

import hub_server
import pytest
import tiny
from huggingface_hub import constants

import lavie_jax
from lavie_jax import cascade
from lavie_jax.errors import UserError
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
        ("hub:someone/cut", "is incomplete: hub:someone/cut@[0-9a-f]{40}/unet is missing"),
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
    assert "\n" not in str(refused.value) and location in str(refused.value)


def test_training_starts_from_the_hub(hub, folder):
    hub.add_folder("someone/shapes", folder)
    argv = ["--config=configs/moving_shapes/base.py:tiny", "--workdir=nowhere"]
    config = options.parse([*argv, "--config.init_from=hub:someone/shapes/base"]).config
    assert load_folder(config.init_from, params=False).stage == "base" and "/snapshots/" in config.init_from


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
