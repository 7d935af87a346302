"""Work that one rank does for all."""

from collections.abc import Callable
from typing import TypeVar

from weft.config.errors import RunError, WeftError
from weft.parallel.comm import Comm

T = TypeVar("T")


def on_chief(comm: Comm, work: Callable[[], T]) -> None:
    """Run ``work`` on rank 0; what stops it there stops every rank with the same message.

    Raises:
        WeftError: the error of rank 0 (on the other ranks as a ``RunError`` of the same words).
    """
    failure: WeftError | OSError | None = None
    if comm.rank == 0:
        try:
            work()
        except (WeftError, OSError) as error:
            failure = error
    message = comm.gather_objects(str(failure) if failure else None)[0]
    if failure:
        raise failure
    if message:
        raise RunError(message)
