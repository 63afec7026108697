"""Which files below a folder count: the same everywhere, through links, without loops, hidden ones and runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reference_trainer.config import TrainConfig
from reference_trainer.data.folders import LARGEST_CONFIG, list_files
from reference_trainer.errors import UserError
from reference_trainer.options import to_json

EXTENSIONS = frozenset({".png", ".jpg"})


def write(root: Path, *names: str, content: str = "x") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def names(root: Path) -> list[str]:
    return [file.as_posix() for file in list_files(root, EXTENSIONS).files]


def test_the_order_is_that_of_the_names_whatever_the_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "b.png", "a.png", "a/z.png", "B.PNG", "b/1.jpg", "a/c/2.png", "a.txt", "a b/x.png", "png")
    found = names(tmp_path)
    assert found == ["B.PNG", "a/c/2.png", "a/z.png", "a b/x.png", "a.png", "b/1.jpg", "b.png"]
    assert found == [
        p.relative_to(tmp_path).as_posix()
        for p in sorted(tmp_path.rglob("*"))
        if p.is_file() and p.suffix.lower() in EXTENSIONS  # as it always was: caches keep their names
    ]
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            self.scanned = scandir(path)

        def __enter__(self):
            return reversed(list(self.scanned))

        def __exit__(self, *_: object) -> None:
            self.scanned.close()

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(tmp_path) == found


def test_hidden_files_and_what_archives_and_drives_leave_are_passed_over(tmp_path: Path):
    write(tmp_path, "a.png", "._a.png", ".hidden/b.png", "__MACOSX/a.png", "c/@eaDir/thumb.jpg", "c/.thumbnails/d.png")
    assert names(tmp_path) == ["a.png"]


def test_a_hidden_root_is_read(tmp_path: Path):
    assert names(write(tmp_path / ".cache" / "photos", "a.png")) == ["a.png"]


def test_links_to_folders_are_followed(tmp_path: Path):
    elsewhere, root = write(tmp_path / "disk", "cats/1.png", "dogs/2.png"), write(tmp_path / "data", "own/3.png")
    (root / "cats").symlink_to(elsewhere / "cats")
    (root / "4.png").symlink_to(elsewhere / "dogs" / "2.png")
    assert names(root) == ["4.png", "cats/1.png", "own/3.png"]


def test_loops_end_and_a_folder_counts_once_under_its_own_name(tmp_path: Path):
    root = write(tmp_path / "data", "z/1.png", "z/deep/2.png")
    write(tmp_path, "beside.png")
    (root / "a").symlink_to(root / "z")  # comes first by name
    (root / "z" / "deep" / "loop").symlink_to(root / "z")
    (root / "z" / "self").symlink_to(root / "z" / "self")
    (root / "here").symlink_to(root)
    (root / "up").symlink_to(tmp_path)  # would read what lies beside the folder
    outside = write(tmp_path / "outside", "3.png")
    (outside / "back").symlink_to(root)
    (root / "one").symlink_to(outside)
    (root / "two").symlink_to(outside)
    assert names(root) == ["one/3.png", "z/1.png", "z/deep/2.png"]


def test_a_link_to_nothing_is_named_not_lost(tmp_path: Path):
    root = write(tmp_path, "a.png")
    (root / "cats").symlink_to("/not/mounted/cats")
    (root / "b.png").symlink_to("/not/there.png")
    (root / "notes.txt").symlink_to(root / "a.png")
    listing = list_files(root, EXTENSIONS)
    assert [(path.name, error.strerror) for path, error in listing.unlisted] == [("cats", "No such file or directory")]
    assert [file.name for file in listing.files] == ["a.png", "b.png"]  # reading it will say so


def test_folders_called_like_images_are_folders(tmp_path: Path):
    assert names(write(tmp_path, "x.png/y.png")) == ["x.png/y.png"]


def deny(monkeypatch: pytest.MonkeyPatch, denied: Path) -> None:
    """As chmod would, were the tests not sometimes run by root."""
    scandir = os.scandir

    def guarded(path: Path):
        if Path(path) == denied:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)


def test_a_closed_folder_is_named_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "a.png", "closed/b.png", "open/c.png")
    deny(monkeypatch, tmp_path / "closed")
    listing = list_files(tmp_path, EXTENSIONS)
    assert [(path.name, error.strerror) for path, error in listing.unlisted] == [("closed", "Permission denied")]
    assert len(listing.files) == 2


def test_a_closed_root_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deny(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"cannot list .*: Permission denied"):
        list_files(tmp_path, EXTENSIONS)


def test_runs_are_passed_over_with_all_that_lies_in_them(tmp_path: Path):
    root = write(tmp_path, "a.png", "runs/ilct/samples.png", "runs/ilct/more/x.png", "runs/notes.png")
    (root / "runs" / "ilct" / "config.json").write_text(json.dumps(to_json(TrainConfig())))
    listing = list_files(root, EXTENSIONS)
    assert [file.as_posix() for file in listing.files] == ["a.png", "runs/notes.png"]
    assert [run.as_posix() for run in listing.runs] == ["runs/ilct"]


def test_the_folder_asked_for_is_read_even_if_a_run_was_put_into_it(tmp_path: Path):
    root = write(tmp_path, "a.png", "config.json", content='{"part": "TrainConfig"}')
    assert names(root) == ["a.png"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no JSON",
        "[1]",
        "null",
        '{"part": "UNet"}',
        "[" * 100_000,
        "\ufeff",
        '{"part": "TrainConfig"' + " " * LARGEST_CONFIG + "}",
    ],
    ids=["empty", "text", "list", "null", "another part", "deep", "mark", "large"],
)
def test_any_other_config_json_is_the_users(content: str, tmp_path: Path):
    assert names(write(write(tmp_path, "c/a.png"), "c/config.json", content=content)) == ["c/a.png"]


def test_a_config_json_that_is_a_pipe_is_not_waited_for(tmp_path: Path):
    write(tmp_path, "c/a.png")
    os.mkfifo(tmp_path / "c" / "config.json")
    assert names(tmp_path) == ["c/a.png"]
