"""Results that are kept, also for threads that ask at the same time."""

from collections.abc import Callable
from functools import lru_cache, wraps
from threading import Lock
from typing import ParamSpec, TypeVar

_Words = ParamSpec("_Words")
_Made = TypeVar("_Made")


def once(most: int) -> Callable[[Callable[_Words, _Made]], Callable[_Words, _Made]]:
    """``lru_cache``, but ranks that are threads wait for one of them instead of all making the same."""

    def wrapped(make: Callable[_Words, _Made]) -> Callable[_Words, _Made]:
        kept, lock = lru_cache(maxsize=most)(make), Lock()

        @wraps(make)
        def found(*words: _Words.args, **named: _Words.kwargs) -> _Made:
            with lock:
                return kept(*words, **named)  # pyright: ignore[reportArgumentType]

        return found

    return wrapped
