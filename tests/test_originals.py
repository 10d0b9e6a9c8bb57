"""Locations of published checkpoints: paths and the hub, their hashes, and what is deleted."""

import hashlib

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from lavie_jax.errors import UserError
from lavie_jax.weights import originals

HASH = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model" / "unet" / "lavie.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def hub(monkeypatch):
    """A fake hub with one repository; returns the list of its requests."""
    requests, files = [], ["README.md", "lavie.pt", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    files += ["vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"]
    files += ["text_encoder/config.json", "text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"]
    files += ["tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json", "safety/model.bin"]

    def write(folder, names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"weights")

    def one(*, repo_id, filename, revision, local_dir):
        requests.append((repo_id, filename, revision))
        if filename not in files:
            raise LocalEntryNotFoundError(f"no {filename}\nand more lines")
        write(local_dir, [filename])
        return str(local_dir / filename)

    def many(*, repo_id, revision, allow_patterns, local_dir):
        requests.append((repo_id, allow_patterns, revision))
        write(local_dir, allow_patterns)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", many)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id, revision: files)
    return requests


def test_a_path_is_returned_and_its_hash_is_checked(file, tmp_path):
    assert originals.get(str(file), tmp_path) == file
    assert originals.get(str(file), tmp_path, sha256=HASH.upper()) == file
    folder = tmp_path / "model"
    assert originals.get(str(folder), tmp_path, sha256=f"{HASH}  unet/lavie.pt, {HASH} *unet/lavie.pt\n") == folder


@pytest.mark.parametrize(
    "location, sha256, message",
    [
        ("unet/lavie.pt", "0" * 64, f"lavie.pt is damaged or a different file: its SHA-256 is {HASH}, not 000"),
        ("unet/lavie.pt", "abc", "must have 64 hexadecimal digits, not 'abc'"),
        ("unet", HASH, "cannot be checked: .*unet is a folder; give HASH NAME of files in it"),
        ("unet", f"{HASH} other.pt", "cannot be checked: .*other.pt does not exist"),
        ("other", "", "other does not exist; give a path, or hub:OWNER/NAME"),
    ],
)
def test_wrong_hashes_and_locations_are_refused(location, sha256, message, file, tmp_path):
    with pytest.raises(UserError, match=message):
        originals.get(str(tmp_path / "model" / location), tmp_path, sha256=sha256)


def test_a_file_of_the_hub_is_downloaded_checked_and_discarded(hub, tmp_path):
    location = "hub:someone/some.model@v1/lavie.pt"
    path = originals.get(location, tmp_path, sha256=HASH)
    assert path.read_bytes() == b"weights" and hub == [("someone/some.model", "lavie.pt", "v1")]
    with pytest.raises(UserError, match="damaged"):
        originals.get(location, tmp_path, sha256="0" * 64)
    originals.discard(location, tmp_path)
    assert not path.exists() and tmp_path.is_dir()


def test_only_the_files_that_conversion_reads_are_downloaded(hub, tmp_path):
    folder = originals.get("hub:someone/model", tmp_path)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "unet/config.json", "vae/config.json", "vae/diffusion_pytorch_model.bin", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    }  # fmt: skip


def test_an_error_of_the_hub_is_one_line(hub, tmp_path):
    with pytest.raises(UserError) as refused:
        originals.get("hub:someone/model/other.pt", tmp_path)
    assert str(refused.value).startswith("hub:someone/model/other.pt: the hub cannot be reached (no other.pt): check")
    with pytest.raises(UserError, match="'hub:model' is not a location on the hub"):
        originals.get("hub:model", tmp_path)


def test_discarding_deletes_files_but_never_a_users_folder(file, tmp_path):
    originals.discard(str(tmp_path / "model"), tmp_path)
    assert file.exists()
    originals.discard(str(file), tmp_path)
    assert not file.exists() and file.parent.is_dir()
