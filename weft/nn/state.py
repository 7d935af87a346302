"""What a layer remembers of the tokens before: the parts of a hybrid cache."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass
class MambaState:
    """State of one Mamba-2 layer for ``seqs`` sequences, written in place.

    Attributes:
        conv: the last ``taps - 1`` inputs of the convolution.
        ssm: the scan's state, in the SSM state dtype of the precision policy.
    """

    conv: Float[Tensor, "seqs channels tail"]
    ssm: Float[Tensor, "seqs heads head_dim state"]


@dataclass
class KVState:
    """Keys and values of one attention layer; the first ``cache.lengths[s]`` places are in use."""

    keys: Float[Tensor, "seqs kv_heads places head_dim"]
    values: Float[Tensor, "seqs kv_heads places head_dim"]


@dataclass
class Cache:
    """States by layer, and how many tokens of each sequence they hold."""

    layers: dict[str, MambaState | KVState]
    lengths: list[int]

    def mamba(self, key: str) -> MambaState:
        """State of the Mamba-2 layer ``key``."""
        state = self.layers[key]
        if not isinstance(state, MambaState):
            raise TypeError(f"{key} holds {type(state).__name__}, not MambaState")
        return state

    def kv(self, key: str) -> KVState:
        """Keys and values of the attention layer ``key``."""
        state = self.layers[key]
        if not isinstance(state, KVState):
            raise TypeError(f"{key} holds {type(state).__name__}, not KVState")
        return state
