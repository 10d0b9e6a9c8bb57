"""Files that are complete or absent."""

import platform

import pytest

from lavie_jax.disk import new_file
from lavie_jax.errors import UserError


def test_a_file_appears_when_it_is_complete_and_an_error_leaves_the_former_one(tmp_path):
    path = tmp_path / "deep" / "values.json"
    with new_file(path) as temporary:
        temporary.write_text("first")
        assert temporary.suffix == ".json" and not path.exists()
    with pytest.raises(RuntimeError), new_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_processes_of_one_number_on_two_hosts_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """In containers the number is often the same, and hosts fill one folder of features or shards together."""
    path = tmp_path / "features.npz"
    monkeypatch.setattr(platform, "node", lambda: "host-0")
    with new_file(path) as ours:
        ours.write_text("ours")
        monkeypatch.setattr(platform, "node", lambda: "host-1")
        with new_file(path) as theirs:
            theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path):
    target, link = tmp_path / "disk" / "weights.json", tmp_path / "weights.json"
    link.symlink_to(target)
    for text in ("first", "second"):
        with new_file(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink() and target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_file_below_a_file_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="a folder above it is a file"), new_file(tmp_path / "a" / "b.txt"):
        pass
