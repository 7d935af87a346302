"""Work done ahead of its use, in order."""

import threading
from collections.abc import Generator, Iterable
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")
_LATEST_STOP = 0.1  # seconds a thread with a full queue needs to notice that nobody reads any more


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same items in the same order, made up to ``depth`` ahead by one thread.

    An exception of the producer is raised at its place in the order. Closing the iterator (leaving a
    ``for`` early) stops the thread.
    """
    queue: Queue[tuple[bool, Any]] = Queue(maxsize=depth)  # (True, item), then (False, error or None)
    stop = threading.Event()

    def put(more: bool, value: Any) -> None:
        while not stop.is_set():
            try:
                queue.put((more, value), timeout=_LATEST_STOP)
                break
            except Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(True, item)
                if stop.is_set():
                    return
            put(False, None)
        except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
            put(False, error)

    thread = threading.Thread(target=produce, name="weft-prefetch", daemon=True)
    thread.start()
    try:
        more, value = queue.get()
        while more:
            yield value
            more, value = queue.get()
    finally:
        stop.set()
        thread.join()
    if value is not None:
        raise value
