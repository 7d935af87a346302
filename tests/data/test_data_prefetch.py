"""The prefetch thread keeps order, hands exceptions on, and ends."""

import threading

import pytest

from weft.data.prefetch import prefetch


def threads() -> int:
    return sum(t.name == "weft-prefetch" for t in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 3])
def test_order_is_kept(depth):
    assert list(prefetch(range(100), depth)) == list(range(100))
    assert threads() == 0


def test_an_exception_arrives_at_its_place():
    def items():
        yield 1
        yield 2
        raise KeyError("three")

    met = []
    with pytest.raises(KeyError, match="three"):
        met.extend(prefetch(items()))
    assert met == [1, 2]
    assert threads() == 0


def test_leaving_early_stops_the_thread():
    endless = iter(int, 1)
    stream = prefetch(endless)
    assert next(stream) == 0
    stream.close()
    assert threads() == 0
