"""Bytes that every rank receives in tensor parallelism: the ledger against formulas, to the byte.

With n ranks, a gather or scatter of a buffer of V bytes brings (n-1)/n V to each rank and a total twice that.
One forward and backward pass of T tokens, residual width E, on a plane tp x x (x: tp_embed), in elements:

- a projection from the residual to inner features, L of them on a rank: 2 T E/x over tp (gather,
  and the scatter of its gradient), 2 T x L over x (scatter, gather); the same for the way back. With x = 1
  these are Megatron's two all-reduces per layer and pass, as gather and scatter; with x > 1 AxoNN's over both
  axes (arXiv 2502.08145), without redundant work between them.
- a product between the residual and whole features of width W (latent, router logits): 2 T/tp W over x;
- a norm over the residual: two totals of T/tp over x; a gated norm whose groups span s ranks, G of them on
  each: two totals of T G over these;
- token table: 2 T E over the plane; the head, per depth: 2 T E, and 3 T for the softmax from each rank.
"""

import pytest
import torch

from tests.parallel.equal import Samples
from tests.tiny import CONFIG, batch
from weft.build.model import assemble
from weft.data.batch import Batch
from weft.parallel.comm import Comm
from weft.parallel.ledger import record
from weft.parallel.mesh import mesh_of
from weft.parallel.threads import run_threads
from weft.plan.shard import Plane, features
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.layers import AttentionConfig, MambaConfig, MLPConfig, MoEConfig
from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig
from weft.spec.run import RunConfig, TrainConfig
from weft.train.loop import Trainer
from weft.train.objective import Totals, objective, to_device
from weft.train.team import decoder_only

WORD, INTEGER = 8, 8  # fp64, int64
LENGTHS = (9, 7, 16)  # divisible by the plane, so that nothing is padded
TOKENS = sum(LENGTHS)


class Formula:
    """Bytes of one rank, added up layer by layer."""

    def __init__(self, tp: int, x: int) -> None:
        self.tp, self.x, self.plane, self.bytes = tp, x, Plane(tp, x), 0.0

    def move(self, ranks: int, elements: float) -> None:
        self.bytes += (ranks - 1) / ranks * elements * WORD

    def total(self, ranks: int, elements: float) -> None:
        self.move(ranks, 2 * elements)

    def inner(self, dim) -> None:
        """A projection between the residual and the inner dimension ``dim``."""
        own = len(features(dim, self.plane, 0)[0])
        self.move(self.tp, 2 * TOKENS * CONFIG.hidden_size / self.x)
        self.move(self.x, 2 * TOKENS * self.x * own)

    def whole(self, width: int) -> None:
        """A product between the residual and whole features."""
        self.move(self.x, 2 * TOKENS / self.tp * width)

    def norm(self) -> None:
        self.total(self.x, 2 * TOKENS / self.tp)

    def mixer(self, config) -> None:
        match config:
            case MambaConfig():
                self.inner(config.in_rows)
                self.inner(config.out_proj.cols)
                width = config.inner // self.plane.size
                span = max(1, config.norm_group // width)
                self.total(span, 2 * TOKENS * max(1, width // config.norm_group))
            case AttentionConfig():
                self.inner(config.qkv_proj.rows)
                self.inner(config.o_proj.cols)
            case MLPConfig():
                self.inner(config.up_proj.rows)
                self.inner(config.down_proj.cols)
            case MoEConfig():
                self.whole(config.experts)
                self.whole(2 * config.latent)
                self.mixer(config.shared)
                ranks = self.plane.size
                self.bytes += 2 * (ranks - 1) / ranks * len(LENGTHS) * config.experts * INTEGER

    def model(self) -> float:
        """The tiny model: its layers, and one MTP depth used twice."""
        depth = CONFIG.mtp[0].blocks
        for block in (*CONFIG.blocks, *depth, *depth):
            self.norm()
            self.mixer(block.mixer)
        n, width = self.plane.size, CONFIG.hidden_size
        self.norm()
        for _ in range(CONFIG.depths):
            for _ in range(3):
                self.norm()
            self.whole(width)  # the joining projection: whole partial sums, of which each rank keeps its part
        self.move(n, (1 + CONFIG.depths) * 2 * TOKENS * width)
        for _ in range(1 + CONFIG.depths):
            self.move(n, 2 * TOKENS * width + 3 * TOKENS * n)
        return self.bytes


@pytest.mark.parametrize(("tp", "x"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_ledger_equals_formula(tp, x):
    packed = batch(LENGTHS)
    totals = Totals(packed.targets, TOKENS, 1.0)

    def work(comm: Comm) -> int:
        mesh = mesh_of(PlanConfig(decoder=LayoutConfig(tp=tp, tp_embed=x)), comm)
        model = assemble(CONFIG, "fp64", torch.device("cpu"), 1, mesh)
        with record(comm) as ledger:
            objective(model, to_device(packed), totals, TOKENS)[0].backward()
        assert not ledger.metadata_bytes, "shapes are known: nothing is negotiated in a layer"
        return ledger.bytes()

    want = Formula(tp, x).model()
    assert run_threads(tp * x, work) == [want] * (tp * x)


def test_metadata_is_under_one_percent_of_a_step():
    """A training step of the first run's model on 4 x 128 tokens; its counts and errors travel as JSON."""
    config = stdlib_lm().model
    plan = PlanConfig(decoder=LayoutConfig(tp=2, dp=2, store=StoreConfig(level=3)))

    class Tokens(Samples):
        def microbatch(self, start: int, count: int) -> Batch:
            return batch((128,) * count, seed=start, depths=self.depths, vocab=config.vocab_size)

    def work(comm: Comm) -> tuple[int, int]:
        mesh = mesh_of(plan, comm)
        model = assemble(config, "fp32", torch.device("cpu"), 1, mesh)
        train = TrainConfig(global_batch_size=4, micro_batch_size=2)
        trainer = Trainer(
            RunConfig(model=config, train=train),
            decoder_only(model, mesh),
            Tokens(False, 128, config.depths),
        )
        with record(comm) as ledger:
            trainer.step(1, trainer.batches(0))
        return ledger.bytes(), ledger.metadata_bytes

    for payload, metadata in run_threads(4, work):
        assert 0 < metadata < payload / 100
