"""Folders of derived files: each made once, complete or absent, whoever makes it first."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from weft.config.errors import DataError

META = "meta.json"
_FORMAT = 1  # of the cache; a change makes all old entries unknown
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}


def cache_key(*parts: object) -> str:
    """A file name for everything that decides a result."""
    return blake2b(repr((_FORMAT, *parts)).encode(), digest_size=16).hexdigest()


def cached(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The ``meta.json`` of ``folder``: what ``build`` gave when it filled the folder.

    It fills another folder, which is renamed when it is whole.

    Several processes may build at once: the first rename counts, the others use it. What a crash leaves ends
    in ``.partial`` and is never read.

    Raises:
        DataError: the cache cannot be written.
    """
    if not (folder / META).is_file():
        partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.mkdir(parents=True)
            (partial / META).write_text(json.dumps(build(partial)), encoding="utf-8")
            _sync(partial)
            _commit(partial, folder)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise DataError(
                f"{folder}: cannot write the token cache ({error.strerror}); set data.cache"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return json.loads((folder / META).read_text(encoding="utf-8"))


def _commit(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / META).is_file():  # nobody else was faster: a real failure
            raise


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
