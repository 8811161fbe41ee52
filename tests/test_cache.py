"""The cache and what writes files: whole or nothing, found by content, repaired when damaged."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeq.errors import StorageFailed
from edgeq.system import files
from edgeq.system.cache import Cache


def write(text: str):  # noqa: ANN201
    def make(folder: Path) -> None:
        (folder / "file").write_text(text, encoding="utf-8")

    return make


def never(folder: Path) -> None:
    raise AssertionError("made again")


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    place = cache.entry("kind", "name", write("x"))
    assert cache.entry("kind", "name", never) == place
    (entry,) = cache.entries()
    assert entry.kind == "kind" and cache.size() == entry.size_bytes > 0
    assert cache.purge("other") == 0 and cache.purge() == entry.size_bytes and cache.size() == 0


@pytest.mark.parametrize("damage", ["change", "remove", "add", "index"])
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    place = cache.entry("kind", "name", write("x"))
    file = place / "file"
    if damage == "change":
        file.write_text("y", encoding="utf-8")
    elif damage == "remove":
        file.unlink()
    elif damage == "add":
        (place / "more").write_text("z", encoding="utf-8")
    else:
        (place / "SHA256SUMS").write_bytes(b"\xff")
    assert (cache.entry("kind", "name", write("new")) / "file").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_killed_make_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def killed(folder: Path) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise error

    with pytest.raises(error):
        cache.entry("kind", "name", killed)
    assert list(cache.entries()) == [] and not list(tmp_path.rglob("half"))
    cache.entry("kind", "name", write("x"))


def test_two_that_want_the_same_wait_for_each_other(tmp_path: Path) -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        write("x")(folder)

    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(lambda _: Cache(tmp_path).entry("kind", "name", make), range(8)))
    assert len(set(places)) == 1 and made == [1]


def test_a_temporary_cache_is_gone_when_closed() -> None:
    cache = Cache.temporary()
    cache.entry("kind", "name", write("x"))
    assert cache.root.is_dir()
    cache.close()
    assert not cache.root.exists()


def test_the_variable_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "mine"))
    assert Cache().root == tmp_path / "mine"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="stop"), files.replacing(path) as partial:
        partial.write_text("half", encoding="utf-8")
        raise ValueError("stop")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "old"


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(ValueError, match="stop"), files.replacing_dir(path) as partial:
        (partial / "new").touch()
        raise ValueError("stop")
    assert [item.name for item in tmp_path.iterdir()] == ["folder"] and (path / "old").is_file()
    with files.replacing_dir(path) as partial:
        (partial / "new").touch()
    assert [item.name for item in path.iterdir()] == ["new"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_the_disks_refusal_is_one_sentence(code: int) -> None:
    with pytest.raises(StorageFailed, match="writing x"), files.storage_errors("writing x"):
        raise OSError(code, "no")


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="strange"), files.storage_errors("writing x"):
        raise OSError(errno.EXDEV, "strange")
