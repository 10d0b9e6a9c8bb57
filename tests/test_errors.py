"""Error messages about mistyped names and unusable folders."""

import os

import pytest

from lavie_jax.errors import UserError, check_folder, suggest


def test_a_typo_gets_the_nearest_name_and_all_allowed_ones():
    assert suggest("dddim", ["euler", "ddpm", "ddim"]) == "; did you mean 'ddim'? Allowed: ddim, ddpm, euler"


def test_a_name_like_none_gets_the_allowed_ones_only():
    assert suggest("heun", ["ddpm", "ddim"]) == ". Allowed: ddim, ddpm"


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="steps"):
        raise UserError("steps is 0; give 1 or more")


def test_a_folder_that_cannot_be_made_is_refused_with_what_is_in_the_way(tmp_path, monkeypatch):
    check_folder(tmp_path / "new/newer", "--out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=f"^--out x cannot be written: .*/{name} is a file, not a folder"):
            check_folder(tmp_path / name / "below", "--out x")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=f"--out x cannot be written: no permission to write in {tmp_path}"):
        check_folder(tmp_path / "new", "--out x")
