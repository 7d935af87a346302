"""Random bits as a pure function of names and indices, by integer mixing.

What depends on them is the same under every layout, order and repetition of the computation.
"""

import hashlib

from jaxtyping import Float64, Int64
from torch import Tensor

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # odd constants of splitmix64, as signed numbers


def mix(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), of 64 bits with a sign: one to one."""
    x = (x ^ _right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _right(x, 31)


def _right(x: Int64[Tensor, "..."], places: int) -> Int64[Tensor, "..."]:
    """Shift to the right, zeros coming in."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def salt(name: str) -> int:
    """56 bits for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def uniform(
    name: str, rows: Int64[Tensor, " rows"], columns: Int64[Tensor, " columns"]
) -> Float64[Tensor, "rows columns"]:
    """Numbers of [0, 1) for every pair of indices, another table for each name."""
    bits = mix(mix(rows + salt(name)).unsqueeze(1) + columns)
    return _right(bits, 11).double() * 2.0**-53
