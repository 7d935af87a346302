"""Two ranks equal one rank, on threads and on Gloo processes: losses, gradients, two steps."""

import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.tiny import batch, make
from weft.config.errors import DataError, RunError
from weft.data.batch import Batch
from weft.parallel.c10d import C10dComm
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.mesh import mesh_of
from weft.parallel.threads import run_threads
from weft.spec.count import mean_context, training_flops_per_token
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig, TrainConfig
from weft.train.loop import NotFinite, Trainer
from weft.train.team import decoder_only


class Documents:
    """Sample g is one random document; a stand-in for the loader."""

    def microbatch(self, start: int, count: int) -> Batch:
        lengths = tuple(6 + (g * 5) % 9 for g in range(start, start + count))
        return batch(lengths, seed=start)

    def state(self, samples: int) -> dict:
        return {"samples": samples}


def two_steps(
    comm: Comm, micro: int = 1, precision: str = "fp64"
) -> tuple[list[dict], dict[str, torch.Tensor], list[torch.Tensor]]:
    model = make(precision)
    train = TrainConfig(train_iters=2, global_batch_size=4, micro_batch_size=micro, precision=precision)
    trainer = Trainer(
        RunConfig(model=model.config, train=train),
        decoder_only(model, mesh_of(PlanConfig(), comm)),
        Documents(),
    )
    rows, grads = [], []
    for step in (1, 2):
        rows.append(trainer.step(step, trainer.batches(trainer.samples)))
        grads += [flat.grad.clone() for flat in trainer.store.flats]
    tensors = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return rows, tensors, grads


def assert_same(left: tuple, right: tuple) -> None:
    """Law 3 of docs/design.md: fp64 to 1e-10 in loss, every gradient, and parameters after two steps."""
    for a, b in zip(left[0], right[0], strict=True):
        for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-10), name
        assert a["expert_load"] == b["expert_load"]
        assert a["tokens"] == b["tokens"]
        assert a["samples"] == b["samples"]
        assert a["flops_per_token"] == pytest.approx(b["flops_per_token"], rel=1e-12)
    for a, b in zip(left[2], right[2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_threads_equal_one_rank(ranks: int) -> None:
    alone = two_steps(SingleComm())
    for result in run_threads(ranks, two_steps):
        assert_same(result, alone)


def test_threads_equal_one_rank_in_single_precision() -> None:
    """Law 3 of docs/design.md: fp32 to 1e-5 in loss."""
    work = partial(two_steps, precision="fp32")
    alone = [row["loss"] for row in work(SingleComm())[0]]
    for rows, _, _ in run_threads(2, work):
        assert [row["loss"] for row in rows] == pytest.approx(alone, abs=1e-5)


def _exchanges(comm: Comm) -> list:
    """JSON values of unequal length, over the communicator and over its twin, and one rank's data error."""
    twin = comm.twin()
    found = [one.gather_objects({"rank": comm.rank, "text": "é" * 9**comm.rank}) for one in (comm, twin)]
    twin.barrier()
    try:
        trainer_of([_with_token(99 if comm.rank else 3)], comm)
    except DataError as error:
        return [*found, str(error)]
    return found


def _gloo(rank: int, port: int, answers: multiprocessing.Queue) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        rows, tensors, grads = two_steps(C10dComm())
        numpy = ({n: t.numpy() for n, t in tensors.items()}, [g.numpy() for g in grads])
        answers.put((rank, rows, *numpy, _exchanges(C10dComm())))
    finally:
        dist.destroy_process_group()


def test_gloo_processes_equal_one_rank() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=_gloo, args=(rank, port, answers)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    alone = two_steps(SingleComm())
    for _, rows, tensors, grads, exchanges in results:
        back = ({n: torch.from_numpy(t) for n, t in tensors.items()}, [torch.from_numpy(g) for g in grads])
        assert_same((rows, *back), alone)
        values = [{"rank": 0, "text": "é"}, {"rank": 1, "text": "é" * 9}]
        assert exchanges[:2] == [values, values]
        assert exchanges[2].startswith("rank 1: token id 99 (samples [0])")


def _masked(seed: int) -> Batch:
    return batch((1, 1), seed=seed)  # documents of one token have no target


def _unreadable(rank: int) -> Iterator[list[Batch]]:
    if rank == 1:
        raise OSError("the disk is gone")
    yield [batch((8,))]


def errors_of(ranks: int, work: Callable[[Comm], object]) -> list[str]:
    """The message that every rank raises; nobody may wait for the others."""

    def attempt(comm: Comm) -> str:
        with pytest.raises((DataError, RunError)) as caught:
            work(comm)
        return f"{type(caught.value).__name__}: {caught.value}"

    return run_threads(ranks, attempt, timeout=20)


def test_all_labels_masked() -> None:
    with pytest.raises(DataError, match=r"all 2 labels of the global batch are masked \(rank 0 read samp"):
        trainer_of([_masked(0)])
    first, second = errors_of(2, lambda comm: trainer_of([_masked(comm.rank + 4)], comm))
    assert first == second
    assert "all 4 labels" in first
    assert "rank 0 read samples [4]; rank 1 read samples [5]" in first


def test_one_rank_may_have_only_masked_labels() -> None:
    rows = run_threads(2, lambda comm: trainer_of([_masked(1) if comm.rank else batch((8,))], comm))
    assert rows[0]["tokens"] == rows[1]["tokens"] == 7


def test_token_beyond_the_vocabulary() -> None:
    with pytest.raises(DataError, match="^token id 99 .* vocabulary of 61"):
        trainer_of([_with_token(99)])
    first, second = errors_of(2, lambda comm: trainer_of([_with_token(-5 if comm.rank else 3)], comm))
    assert first == second
    assert first.startswith("DataError: rank 1: token id -5 (samples [0]) is outside")


def test_data_that_one_rank_cannot_read() -> None:
    def work(comm: Comm) -> None:
        trainer(comm).next_step(1, _unreadable(comm.rank))

    first, second = errors_of(2, work)
    assert first == second == "DataError: rank 1: reading the data failed: OSError('the disk is gone')"


def test_steps_are_taken_one_by_one_until_the_data_ends() -> None:
    one, steps = trainer(SingleComm()), iter([[batch((8,))], [batch((9,))]])
    assert [one.next_step(1, steps)["tokens"], one.next_step(2, steps)["tokens"]] == [7, 15]
    with pytest.raises(DataError, match="the data has ended before the last step"):
        one.next_step(3, steps)


def test_nan_stops_before_the_update() -> None:
    one = trainer(SingleComm())
    model = one.model
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    before = model.head.weight.clone()
    with pytest.raises(
        NotFinite, match=r"step 1: lm_loss = nan.*samples \[0\].*Nothing was updated"
    ) as caught:
        one.step(1, one.batches(0))
    assert torch.equal(model.head.weight, before)
    assert caught.value.row["step"] == 1
    assert math.isnan(caught.value.row["loss"])


def test_nan_of_one_rank_is_told_by_all() -> None:
    """Only rank 1 reads token 60, whose embedding is not finite."""

    def work(comm: Comm) -> None:
        one = trainer(comm)
        with torch.no_grad():
            one.model.embed.weight[60] = float("inf")
        tokens = np.full(8, 60 if comm.rank else 3)
        plain = batch((8,), seed=comm.rank + 7)
        future = np.where(plain.mask, 5, -1)
        one.step(1, [replace(plain, tokens=tokens, future=future)])

    first, second = errors_of(2, work)
    assert first == second
    assert first.startswith("NotFinite: step 1: lm_loss = nan")
    assert "(rank 1 read samples [8])" in first


def test_arithmetic_follows_the_packed_documents() -> None:
    one = trainer(SingleComm())
    whole = training_flops_per_token(one.config.model, mean_context((one.config.data.seq_length,)))
    assert one.flops_per_token == whole
    row = one.step(1, [batch((8, 3)), batch((5,))])
    packed = training_flops_per_token(one.config.model, mean_context((8, 3, 5)))
    assert row["flops_per_token"] == pytest.approx(packed, rel=1e-12)
    second = one.step(2, [batch((16,))])
    assert one.flops_per_token == pytest.approx((packed + second["flops_per_token"]) / 2, rel=1e-12)


def test_a_step_lasts_from_the_wait_for_data() -> None:
    def slow() -> Iterator[list[Batch]]:
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            pass
        yield [batch((8,))]

    one = trainer(SingleComm())
    row = one.next_step(1, slow())
    assert row["seconds"] > 0.1
    assert row["tokens_per_second"] == pytest.approx(8 / row["seconds"], rel=1e-9)


def _with_token(token: int) -> Batch:
    made = batch((8,))
    made.tokens[3] = token
    return made


def trainer(comm: Comm) -> Trainer:
    model = make("fp64")
    train = TrainConfig(global_batch_size=comm.size, micro_batch_size=1, precision="fp64")
    return Trainer(
        RunConfig(model=model.config, train=train),
        decoder_only(model, mesh_of(PlanConfig(), comm)),
        Documents(),
    )


def trainer_of(batches: list[Batch], comm: Comm | None = None) -> dict:
    return trainer(comm or SingleComm()).step(1, batches)
