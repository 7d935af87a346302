"""The hybrid cache: keys and values for attention, convolution and scan state for Mamba-2."""

import torch

from weft.nn.state import Cache, KVState, MambaState
from weft.spec.hybrid import HybridConfig
from weft.spec.layers import AttentionConfig, MambaConfig, MixerConfig
from weft.spec.param import size


def make_cache(
    config: HybridConfig,
    seqs: int,
    places: int,
    dtype: torch.dtype,
    ssm_dtype: torch.dtype,
    device: torch.device,
) -> Cache:
    """An empty cache.

    Args:
        config: the model.
        seqs: sequences generated together.
        places: tokens that keys and values have room for, prompt and continuation together.
        dtype: of keys, values and convolution inputs.
        ssm_dtype: of the scan state.
        device: where it lies.
    """
    layers: dict[str, MambaState | KVState] = {}
    for i, block in enumerate(config.blocks):
        state = _state(block.mixer, seqs, places, dtype, ssm_dtype, device)
        if state is not None:
            layers[f"layers.{i}"] = state
    return Cache(layers, [0] * seqs)


def _state(
    mixer: MixerConfig,
    seqs: int,
    places: int,
    dtype: torch.dtype,
    ssm_dtype: torch.dtype,
    device: torch.device,
) -> MambaState | KVState | None:
    match mixer:
        case MambaConfig():
            conv = torch.zeros(seqs, size(mixer.conv_rows), mixer.conv - 1, dtype=dtype, device=device)
            shape = (seqs, mixer.heads, mixer.head_dim, mixer.state)
            return MambaState(conv, torch.zeros(shape, dtype=ssm_dtype, device=device))
        case AttentionConfig():
            shape = (seqs, mixer.kv_heads, places, mixer.head_dim)
            keys = torch.zeros(shape, dtype=dtype, device=device)
            return KVState(keys, torch.zeros_like(keys))
    return None


def first(cache: Cache, seqs: int) -> Cache:
    """The first ``seqs`` sequences: views, so that writing them writes the cache."""
    layers: dict[str, MambaState | KVState] = {}
    for key, state in cache.layers.items():
        if isinstance(state, MambaState):
            layers[key] = MambaState(state.conv[:seqs], state.ssm[:seqs])
        else:
            layers[key] = KVState(state.keys[:seqs], state.values[:seqs])
    return Cache(layers, cache.lengths[:seqs])
