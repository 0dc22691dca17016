"""Tar files: what lies where in one, and one of given members."""

from __future__ import annotations

import io
import tarfile


def layout(path):
    """Name, begin of header, begin and end of content of each member."""
    with tarfile.open(path) as archive:
        return [(m.name, m.offset, m.offset_data, m.offset_data + m.size) for m in archive]


def put(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
