"""Work that ranks do together: an error on one rank is an error on all, so that none waits for ever."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from weft.config.errors import CheckpointError, DataError, RunError, WeftError
from weft.parallel.comm import Comm

T = TypeVar("T")
KINDS: dict[str, type[WeftError]] = {kind.__name__: kind for kind in (DataError, CheckpointError, RunError)}


def on_every(comm: Comm, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns on every rank, in rank order, on every rank; a collective call.

    Args:
        comm: the ranks.
        work: returns a JSON value (tuples come back as lists); free of collectives.

    Raises:
        WeftError: ``work`` failed somewhere; one text on all ranks, with a line for each rank that failed.
            The kind is the one of the first of them, and ``RunError`` for any other exception. A rank that
            is alone raises what ``work`` raised.
    """
    if comm.size == 1:
        return comm.gather_objects(work())
    value, cause = _attempt(work)
    outcomes = comm.gather_objects((value, _tell(cause)))
    failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure}
    if failures:
        kind, _ = next(iter(failures.values()))
        raise KINDS[kind](
            "\n".join(f"rank {rank}: {text}" for rank, (_, text) in failures.items())
        ) from cause
    return [value for value, _ in outcomes]


def on_chief(comm: Comm, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0; its result, a JSON value, on every rank; a collective call.

    Raises:
        WeftError: ``work`` failed. Rank 0 raises the very error; the others raise the same words in the same
            kind (``RunError`` for anything but a data, checkpoint or run error).
    """
    value, cause = _attempt(work) if comm.rank == 0 else (None, None)
    value, failure = comm.gather_objects((value, _tell(cause)))[0]
    if cause:
        raise cause
    if failure:
        kind, text = failure
        raise KINDS[kind](text)
    return value


class Union:
    """Names that ranks have, each some of them: all of them, the same on every rank, asked for once.

    Args:
        comm: the ranks.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._known: dict[str, int] | None = None

    def of(self, own: Mapping[str, int]) -> dict[str, int]:
        """Every rank's names with their numbers; a collective call the first time."""
        if self._known is None:
            everyone = self._comm.gather_objects(dict(own))
            self._known = {name: number for names in everyone for name, number in names.items()}
        return self._known


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - told to every rank, and raised by all
        return None, error


def _tell(error: Exception | None) -> tuple[str, str] | None:
    """Kind and words of an error."""
    if error is None:
        return None
    kind = next((name for name, kind in KINDS.items() if isinstance(error, kind)), RunError.__name__)
    if isinstance(error, OSError):
        return kind, f"{error.filename or 'file system'}: {error.strerror or error}"
    return kind, str(error) if isinstance(error, WeftError) else repr(error)
