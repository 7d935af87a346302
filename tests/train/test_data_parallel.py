"""Two ranks equal one rank, on threads and on Gloo processes: losses, gradients, two steps."""

import multiprocessing
import socket

import pytest
import torch

from tests.tiny import batch, make
from weft.config.errors import DataError, RunError
from weft.data.batch import Batch
from weft.parallel.comm import C10dComm, Comm, SingleComm, run_threads
from weft.spec.run import RunConfig, TrainConfig
from weft.train.loop import Trainer


class Documents:
    """Sample g is one random document; a stand-in for the loader."""

    def microbatch(self, start: int, count: int) -> Batch:
        lengths = tuple(6 + (g * 5) % 9 for g in range(start, start + count))
        return batch(lengths, seed=start)

    def state(self, samples: int) -> dict:
        return {"samples": samples}


def two_steps(comm: Comm, micro: int = 1) -> tuple[list[dict], dict[str, torch.Tensor], list[torch.Tensor]]:
    model = make("fp64")
    train = TrainConfig(train_iters=2, global_batch_size=4, micro_batch_size=micro, precision="fp64")
    trainer = Trainer(RunConfig(model=model.config, train=train), model, Documents(), comm)
    rows, grads = [], []
    for step in (1, 2):
        rows.append(trainer.step(step, trainer.batches(trainer.samples)))
        grads += [flat.grad.clone() for flat in trainer.store.flats]
    tensors = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return rows, tensors, grads


def assert_same(left: tuple, right: tuple) -> None:
    """Law 4: fp64 to 1e-10 in loss, every gradient, and parameters after two steps."""
    for a, b in zip(left[0], right[0], strict=True):
        for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-10), name
        assert a["expert_load"] == b["expert_load"]
        assert a["tokens"] == b["tokens"]
        assert a["samples"] == b["samples"]
    for a, b in zip(left[2], right[2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("ranks", [2, 4])
def test_threads_equal_one_rank(ranks: int) -> None:
    alone = two_steps(SingleComm())
    for result in run_threads(ranks, two_steps):
        assert_same(result, alone)


def _gloo(rank: int, port: int, answers: multiprocessing.Queue) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        rows, tensors, grads = two_steps(C10dComm())
        numpy = ({n: t.numpy() for n, t in tensors.items()}, [g.numpy() for g in grads])
        answers.put((rank, rows, *numpy))
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
    for _, rows, tensors, grads in results:
        back = ({n: torch.from_numpy(t) for n, t in tensors.items()}, [torch.from_numpy(g) for g in grads])
        assert_same((rows, *back), alone)


def test_all_labels_masked() -> None:
    one = batch((1, 1))
    with pytest.raises(DataError, match="labels of the global batch are masked"):
        trainer_of([one])


def test_token_beyond_the_vocabulary() -> None:
    with pytest.raises(DataError, match="token id 99 .* vocabulary of 61"):
        trainer_of([_with_token(99)])


def test_nan_stops_before_the_update() -> None:
    model = make("fp64")
    train = TrainConfig(global_batch_size=1, micro_batch_size=1, precision="fp64")
    trainer = Trainer(RunConfig(model=model.config, train=train), model, Documents(), SingleComm())
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    before = model.head.weight.clone()
    with pytest.raises(RunError, match=r"step 1: lm_loss = nan.*samples \[0\].*Nothing was updated"):
        trainer.step(1, trainer.batches(0))
    assert torch.equal(model.head.weight, before)


def _with_token(token: int) -> Batch:
    made = batch((8,))
    made.tokens[3] = token
    return made


def trainer_of(batches: list[Batch]) -> dict:
    model = make("fp64")
    config = RunConfig(
        model=model.config, train=TrainConfig(global_batch_size=1, micro_batch_size=1, precision="fp64")
    )
    return Trainer(config, model, Documents(), SingleComm()).step(1, batches)
