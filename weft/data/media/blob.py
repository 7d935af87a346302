"""Bytes that lie somewhere in a file: all of it, a member of an archive, or base64 text inside a line."""

import binascii
from base64 import b64decode
from pathlib import Path
from typing import NamedTuple


class Fault(Exception):
    """Why a sample cannot be used.

    Attributes:
        reason: a few words, under which samples are counted.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Blob(NamedTuple):
    """Bytes ``offset`` to ``offset + size`` of a file; ``text`` is 1 where they are base64 in JSON."""

    path: str
    offset: int
    size: int
    text: int = 0

    def read(self, most: int) -> bytes:
        """The bytes.

        Raises:
            Fault: the file is missing or shorter, they are more than ``most``, or are not base64.
        """
        if self.size > most:
            fix = "raise data.media.max_bytes or leave it out"
            raise Fault("too many bytes", f"{self.path}: {self.size:,} bytes; the limit is {most:,}: {fix}")
        try:
            with Path(self.path).open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise Fault("missing file", f"{self.path}: cannot be read ({error.strerror})") from error
        if len(data) < self.size:
            end = self.offset + self.size
            raise Fault("truncated file", f"{self.path}: ends before byte {end:,}, which was there before")
        if not self.text:
            return data
        try:
            return b64decode(data.replace(b"\\", b""), validate=True)
        except (binascii.Error, ValueError) as error:
            raise Fault("not base64", f"data inside the line is not base64 ({error})") from error


def whole(path: Path) -> Blob:
    """All of a file.

    Raises:
        Fault: it is missing, or not a file.
    """
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise Fault("missing file", f"{path} {kind}; put it there or mend the reference")
    return Blob(str(path), 0, path.stat().st_size)


def inside(payload: str, raw: bytes, path: str, offset: int) -> Blob:
    """Base64 text that stands in ``raw``, which begins at ``offset`` of a file.

    Raises:
        Fault: it does not stand there as it is.
    """
    for form in (payload, payload.replace("/", "\\/")):  # JSON may write a slash either way
        found = raw.find(form.encode())
        if found >= 0:
            return Blob(path, offset + found, len(form.encode()), 1)
    raise Fault("not base64", "data inside the line has escaped characters; write base64 as it is")
