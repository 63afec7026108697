"""Images in a zip, read one at a time where they are: nothing is unpacked."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from posixpath import commonpath
from zipfile import ZipFile, ZipInfo

from reference_trainer.data.folders import is_passed_over
from reference_trainer.data.labels import SPLITS, TABLE, Labels, labels_of, require_one_split
from reference_trainer.data.reading import Notes, require_squares, say_skipped
from reference_trainer.data.squares import cause, extensions
from reference_trainer.errors import UserError, printable, some_of

MOST_BYTES = 2**28
"""Of an image before it is decoded, and of a dataset.json: a member that unpacks to more is not read."""


@dataclass(frozen=True)
class ZippedFiles:
    """``ImageFiles`` of a zip."""

    opened: ZipFile
    members: tuple[ZipInfo, ...]
    names: tuple[str, ...]
    """From the folder in the zip that is read."""
    where: str
    labels: Labels | None

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """From the folder in the zip that is read."""
        return self.names[index]

    def content(self, index: int) -> io.BytesIO:
        """Unpacked in memory, and held against its checksum."""
        return io.BytesIO(_content(self.opened, self.members[index]))

    def stamp(self, index: int) -> tuple[int, ...]:
        """Size and checksum."""
        return self.members[index].file_size, self.members[index].CRC


@dataclass(frozen=True, kw_only=True)
class ZippedImages:
    """All images in a zip, made RGB squares as ``ImageFolder`` does, in the same order and with the same labels.

    Hidden files and folders are passed over. A folder that all images lie in is where names and class folders begin,
    as ``photos`` in a zip of a folder of that name; a dataset.json beside it, as EDM has it, gives the labels.
    """

    path: str
    """The file."""
    split: str | None = None
    """The folder in it that is read; None: all."""
    resolution: int = 64
    """Side in pixels the images are brought to, a multiple of 8."""
    held_out_every: int = 10
    """Every so-many-th image is never trained on, 2 or more."""

    def __post_init__(self) -> None:
        require_squares(self.resolution, self.held_out_every)

    def open(self) -> ZippedFiles:
        """Read its list of members, and the labels.

        Raises:
            UserError: it is no zip, or has no images; a name is there twice; see ``labels_of`` and
                ``require_one_split``.
        """
        shown = printable(self.path)
        try:
            opened = ZipFile(self.path)
        except Exception as error:  # of a damaged list of members it may raise anything
            raise UserError(
                f"cannot open {shown} as a zip ({cause(error)}): it is none, or was cut short; copy it again"
            ) from error
        members = _members(opened, shown)
        images = [name for name in members if name.lower().endswith(tuple(extensions()))]
        if not images:
            raise UserError(f"no image files in {shown}: expected names like *.png or *.jpg")
        base = _base([*images, *(name for name in members if name.rpartition("/")[2] == TABLE)])
        folders = _folders(members, base)
        if self.split is not None:
            base += f"{self.split}/"
        where = f"in {printable(f'{self.path}/{base}'.removesuffix('/'))}"
        names = sorted(
            (name[len(base) :] for name in images if name.startswith(base)), key=lambda name: name.split("/")
        )
        if not names:
            raise UserError(f"no image files {where}: for --split there are {some_of(folders, 8) or 'no folders'}")
        require_one_split(names, where)
        table = members.get(base + TABLE)
        content = None if table is None else _table(opened, table, where)
        labels = labels_of(names, _folders(members, base), content, where)
        return ZippedFiles(opened, tuple(members[base + name] for name in names), tuple(names), where, labels)

    def notes(self) -> Notes:
        """Empty ones; what cannot be read is left out."""
        return Notes()


def _members(opened: ZipFile, shown: str) -> dict[str, ZipInfo]:
    """Those that are not passed over; names of folders end in ``/``.

    Raises:
        UserError: one is there twice: which is meant, nobody can tell.
    """
    found, twice, outside = dict[str, ZipInfo](), list[str](), list[str]()
    for member in opened.infolist():
        name = member.filename.replace("\\", "/")
        parts = name.removesuffix("/").split("/")
        if not all(parts) or ".." in parts:  # an absolute path has an empty part
            outside.append(name)
        elif not any(map(is_passed_over, parts)):
            if name in found and not name.endswith("/"):
                twice.append(name)
            found[name] = member
    say_skipped("names that lead out of the zip", outside)
    if twice:
        raise UserError(f"{shown} has {len(twice)} names more than once ({some_of(twice)}): zip it anew")
    return found


def _base(names: Sequence[str]) -> str:
    """The folder that all are in, with ``/``, or nothing; no deeper than where images are for different purposes."""
    base = ""
    for part in commonpath([name.rpartition("/")[0] for name in names]).split("/"):
        if not part or part.lower() in SPLITS:
            break
        base += f"{part}/"
    return base


def _folders(names: Iterable[str], base: str) -> list[str]:
    """The names of those right below ``base``, with images or without, sorted."""
    below = (name[len(base) :] for name in names if name.startswith(base))
    return sorted({name.partition("/")[0] for name in below if "/" in name})


def _content(opened: ZipFile, member: ZipInfo) -> bytes:
    """Of at most ``MOST_BYTES``, whatever the list of members says."""
    with opened.open(member) as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it unpacks to more than {MOST_BYTES // 2**20} MiB")
    return content


def _table(opened: ZipFile, member: ZipInfo, where: str) -> bytes:
    try:
        return _content(opened, member)
    except Exception as error:  # a damaged member may raise anything
        raise UserError(f"cannot read {TABLE} {where} ({cause(error)}): zip it anew") from error
