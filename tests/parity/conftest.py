"""Fixtures of the parity tests; transformers is imported once, by the first that needs it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.parity.pairs import Pair, gather, live_tensors
from weft.build.model import assemble_from
from weft.infer.compare import as_transformers_runs
from weft.models.hf_hybrid import write_config
from weft.spec.hybrid import HybridConfig


@pytest.fixture(scope="session")
def pair() -> Callable[[HybridConfig, int], Pair]:
    """Makes a pair from a config and a seed."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from tests.parity.randomize import randomize
    from tests.parity.reference_mtp import ReferenceMTP

    def make(config: HybridConfig, seed: int = 0) -> Pair:
        theirs = NemotronHForCausalLM(NemotronHConfig(**write_config(config))).eval()
        randomize(theirs, seed)
        mtp = ReferenceMTP(theirs.config, config.parts.mtp) if config.parts.mtp else None
        if mtp is not None:
            randomize(mtp, seed + 1)
        values = gather(config, live_tensors(theirs, mtp))
        here = as_transformers_runs(config)
        ours = assemble_from(here, "fp32", torch.device("cpu"), lambda name, _: values[name])
        return Pair(here, theirs, mtp, ours)

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread is faster for products this small, and sums come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
