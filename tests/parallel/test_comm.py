"""Collectives on threads and on Gloo processes, and the ledger of all three back ends."""

import os
import sys
import threading
import time
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from torch import Tensor

from tests.gangs import GangError, Gangs, threads
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.ledger import Entry, LedgerComm, record

HERE = "tests.parallel.test_comm"
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64]


def number(rank: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small integers that differ by rank and place: their sums are exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 3 + rank * 5) % 11 - 4).reshape(shape).to(dtype)


def me(comm: Comm) -> int:
    return comm.ranks[comm.rank]


# Programs of one rank, for any back end.


def everything(comm: Comm) -> list:
    """Every collective, in every dtype, on strided inputs."""
    results = []
    for dtype in DTYPES:
        parts = number(me(comm), 3, comm.size, dtype=dtype).T
        summed = number(me(comm), 2, 5, dtype=dtype).T
        out = torch.full((comm.size * parts[:2].numel(),), 7, dtype=dtype)
        gathered = comm.all_gather(parts[:2], out)
        assert gathered.data_ptr() == out.data_ptr()
        assert comm.all_reduce(summed) is summed
        results += [gathered, comm.all_gather(parts), summed]
        results += [comm.reduce_scatter(parts), comm.all_to_all(parts)]
    return [[list(tensor.shape), tensor.flatten().tolist()] for tensor in results]


def chain(comm: Comm) -> list:
    """Overlapping pairs: the middle ranks make two groups, those at the ends one and another one together."""
    at, last = me(comm), comm.size - 1
    groups = [comm.group((i, i + 1)) for i in (at - 1, at) if 0 <= i < last]
    if at in (0, last):
        groups.append(comm.group((last, 0)))
    started = [group.start_all_gather(number(at, 2)) for group in groups]
    pairs = [pending.wait().tolist() for pending in reversed(started)]
    whole = comm.group(range(comm.size - 1, -1, -1))
    assert whole.size == comm.size
    return [pairs, whole.gather_objects(at), comm.gather_objects(len(groups))]


def orders(comm: Comm) -> list:
    """The order of a group is the order of its ranks."""
    groups = [comm.group(ranks) for ranks in permutations(range(3)) if me(comm) < 3]
    assert [comm.group(group.ranks) for group in groups] == groups
    return [[group.rank, *everything(group)] for group in groups]


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return comm.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return ctx.comm.all_reduce(grad.clone()), None


def program(comm: Comm, device: str = "cpu") -> list:
    """What a ledger tells of sub-groups, backward passes, empty tensors, host values and one-rank groups."""
    with record(comm) as ledger:
        half = comm.group([rank for rank in range(comm.size) if rank % 2 == me(comm) % 2])
        tall = torch.zeros(comm.size, 3, device=device)
        comm.all_gather(tall)
        comm.start_reduce_scatter(tall.bfloat16()).wait()
        comm.all_to_all(tall.double())
        half.all_reduce(tall[:, :2])
        half.all_gather(tall[:, :0])
        comm.reduce_scatter(tall[:, :0])
        comm.all_reduce(tall[:0])
        x = torch.ones(5, device=device, requires_grad=True)
        Summed.apply(x, comm).sum().backward()
        assert comm.gather_objects([7]) == [[7]] * comm.size
        half.barrier()
        comm.group([me(comm)]).all_reduce(tall)
    comm.barrier()
    assert ledger.metadata_bytes > 0
    return [[e.op, list(e.ranks), e.bytes, e.metadata] for e in ledger.entries]


def empty(comm: Comm) -> list:
    nothing = torch.zeros(comm.size, 0, 2)
    pending = comm.start_all_reduce(nothing)
    results = [pending.wait(), comm.all_gather(nothing), comm.all_gather(nothing, torch.zeros(0))]
    results += [comm.reduce_scatter(nothing), comm.all_to_all(nothing)]
    return [list(tensor.shape) for tensor in results]


def around(comm: Comm) -> list:
    """From each rank to the next and to itself: several under way in two groups, the last awaited first."""
    groups, pending, results = (comm, comm.group(comm.ranks, "other")), [], []
    here, to, source = comm.rank, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    for dtype in [*DTYPES, torch.bool, torch.complex64]:
        for turn in range(3):
            for group in groups if me(comm) % 2 else groups[::-1]:
                x = number(me(comm) + turn, 4, 2, dtype=dtype).T
                out = {source: torch.empty(2, 4, dtype=dtype), here: torch.empty(8, dtype=dtype)}
                pending.append(group.start_transfer({to: x, here: x}, out))
                results.append(out)
    for one in pending[::-1]:
        one.wait()
        one.wait()
    return [str(out[place].flatten().tolist()) for out in results for place in (source, here)]


def some(comm: Comm) -> list:
    """Only the middle ranks take part; the ledger hears of what they receive, and who sends waits late."""
    with record(comm) as ledger, comm.metadata() if comm.size < 4 else nullcontext():
        out = torch.zeros(3)
        if comm.rank == 1:
            comm.start_transfer({2: torch.ones(3), 0: torch.ones(0)}, {}).wait()
        if comm.rank == 2:
            comm.start_transfer({}, {1: out, 0: torch.ones(0)}).wait()
    return [[e.op, list(e.ranks), e.bytes, e.metadata] for e in ledger.entries] + [out.tolist()]


def one_fails(comm: Comm, rank: int) -> None:
    sys.stdout.write(f"seen by {comm.rank}\n")
    if comm.rank == rank:
        raise KeyError("the first")
    comm.barrier()


def one_sleeps(comm: Comm, rank: int) -> None:
    if comm.rank == rank:
        time.sleep(600)
    comm.barrier()


def one_dies(comm: Comm, rank: int) -> None:
    if comm.rank == rank:
        os._exit(3)
    comm.barrier()


def rank_of(comm: Comm) -> int:
    return comm.rank


# Threads.


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_threads_equal_their_definition(size: int) -> None:
    results = threads(size, everything)
    for rank in range(size):
        expected = []
        for dtype in DTYPES:
            parts = torch.stack([number(i, 3, size, dtype=dtype).T for i in range(size)])
            summed = sum(number(i, 2, 5, dtype=dtype).T for i in range(size))
            expected += [parts[:, :2], parts, summed, parts.sum(0)[rank], parts[:, rank]]
        assert results[rank] == [[list(tensor.shape), tensor.flatten().tolist()] for tensor in expected]


@pytest.mark.parametrize("size", [3, 4])
def test_groups_overlap_and_are_used_unevenly(size: int) -> None:
    results = threads(size, chain)
    counts = [2] * size
    for rank, (pairs, backwards, found) in enumerate(results):
        groups = [(i, i + 1) for i in (rank - 1, rank) if 0 <= i < size - 1]
        groups += [(size - 1, 0)] if rank in (0, size - 1) else []
        assert pairs == [[number(i, 2).tolist() for i in group] for group in reversed(groups)]
        assert backwards == list(range(size))[::-1]
        assert found == counts


def test_groups_are_cached_and_checked() -> None:
    def work(comm: Comm) -> list[str]:
        pair = [0, 1] if comm.rank < 2 else [2, 3]
        group, alone = comm.group(pair), comm.group([comm.rank])
        assert group is comm.group(tuple(pair)) is group.group(pair)
        assert comm.group(range(4)) is comm
        assert group.ranks == tuple(pair)
        assert isinstance(alone, SingleComm)
        assert (alone.ranks, alone.rank) == ((comm.rank,), 0)
        assert isinstance(group, Comm)
        for wrong in ([3 - comm.rank], [comm.rank, comm.rank]):
            with pytest.raises(ValueError, match=f"rank {comm.rank} asks for a group"):
                comm.group(wrong)
        return group.gather_objects(comm.rank)

    assert threads(4, work) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_handles_may_be_waited_for_late_and_twice() -> None:
    def work(comm: Comm) -> list:
        strided = torch.ones(4, 2)[:, 0]
        first, second = comm.start_all_reduce(strided), comm.start_all_gather(torch.tensor(comm.rank))
        third = comm.start_reduce_scatter(torch.arange(3.0))
        assert third.wait() is third.wait()
        return [second.wait().tolist(), first.wait().tolist(), strided.tolist(), third.wait().item()]

    for rank, result in enumerate(threads(3, work)):
        assert result == [[0, 1, 2], [3.0] * 4, [3.0] * 4, 3.0 * rank]


def test_inputs_may_change_once_a_collective_is_over() -> None:
    """A rank that is ahead does not disturb those that still read."""

    def work(comm: Comm) -> list:
        found, x = [], torch.zeros(1)
        for step in range(50):
            x.fill_(step + comm.rank)
            found.append(comm.all_gather(x).flatten().tolist())
        return found

    assert threads(4, work) == [[[step + rank for rank in range(4)] for step in range(50)]] * 4


def test_twins_do_not_mix() -> None:
    def work(comm: Comm) -> list:
        twin = comm.twin()
        found: list = []
        other = threading.Thread(target=lambda: found.extend(twin.gather_objects(i)[0] for i in range(20)))
        other.start()
        mine = [comm.all_reduce(torch.tensor(i)).item() for i in range(20)]
        other.join()
        return [found, mine]

    assert threads(2, work) == [[list(range(20)), list(range(0, 40, 2))]] * 2


@pytest.mark.parametrize("shape", [(2, 2), (), (4,)])
def test_rows_that_do_not_fit(shape: tuple[int, ...]) -> None:
    for comm in (SingleComm(), LedgerComm(1, 3)):
        for call in (comm.reduce_scatter, comm.all_to_all):
            with pytest.raises(ValueError, match="has not one row for each of"):
                call(torch.zeros(shape))
        for out in (torch.zeros(7), torch.zeros(3, 2).T, torch.zeros(3, dtype=torch.int64)):
            with pytest.raises(ValueError, match="gathering needs"):
                comm.all_gather(torch.zeros(1), out)


def test_the_first_error_releases_all_threads_from_all_boards() -> None:
    def work(comm: Comm) -> None:
        pair = comm.group([0, 1] if comm.rank < 2 else [2, 3])
        if comm.rank == 3:
            raise KeyError("the first")
        pair.barrier()
        comm.barrier()

    begun = time.monotonic()
    with pytest.raises(KeyError, match="the first"):
        threads(4, work)
    assert time.monotonic() - begun < 4


def test_a_timeout_names_who_did_not_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()

    def work(comm: Comm) -> None:
        if comm.rank == 2:
            stop.wait(1)
        comm.all_gather(torch.zeros(3))

    with pytest.raises(
        TimeoutError, match=r"ranks \[2\] did not arrive within 0.2 s at the all_gather of 3 float32 of ranks"
    ):
        threads(4, work, timeout=0.2)
    told = capsys.readouterr().err
    assert [told.count(f"[rank {rank}] is at") for rank in range(4)] == [1] * 4
    assert "stop.wait(1)" in told


def test_different_collectives_are_told_apart() -> None:
    def work(comm: Comm) -> None:
        (comm.all_reduce if comm.rank else comm.all_gather)(torch.zeros(2 + comm.rank))

    with pytest.raises(RuntimeError, match="rank 0: all_gather of 2 .*; rank 1: all_reduce of 3 "):
        threads(2, work)


def test_transfers_are_first_in_first_out() -> None:
    results = threads(3, around)
    for rank, found in enumerate(results):
        expected = [
            str(number(sender + turn, 4, 2, dtype=dtype).T.flatten().tolist())
            for dtype in [*DTYPES, torch.bool, torch.complex64]
            for turn in range(3)
            for _ in range(2)
            for sender in ((rank - 1) % 3, rank)
        ]
        assert found == expected


def test_transfers_concern_only_their_ends() -> None:
    nothing = [[0.0] * 3]
    assert threads(4, some) == [nothing, nothing, [["transfer", [0, 1, 2, 3], 12, False], [1.0] * 3], nothing]
    assert some(LedgerComm(2, 4)) == [["transfer", [0, 1, 2, 3], 12, False], [0.0] * 3]
    assert threads(3, some)[2][0] == ["transfer", [0, 1, 2], 12, True]


def test_a_sender_that_does_not_come_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            comm.group([2, 1]).start_transfer({}, {0: torch.zeros(3)}).wait()

    told = (
        r"rank 2 did not send within 0.2 s what rank 1 waits for: transfer 0 of 3 float32 in ranks \[2, 1\]"
    )
    with pytest.raises(TimeoutError, match=told):
        threads(3, work, timeout=0.2)
    assert "[rank 1] is at" in capsys.readouterr().err


def test_both_ends_of_a_transfer_agree() -> None:
    def work(comm: Comm) -> None:
        x = torch.zeros(3 + comm.rank)
        comm.start_transfer({1: x} if comm.rank == 0 else {}, {0: x} if comm.rank else {}).wait()

    with pytest.raises(RuntimeError, match="rank 1 expects 4 float32 from rank 0, but is sent 3 float32"):
        threads(2, work)


def test_transfers_that_cannot_be() -> None:
    x = torch.zeros(4)
    for comm in (SingleComm(3), LedgerComm(1, 3).group([1, 2])):
        own, size = comm.rank, comm.size
        with pytest.raises(ValueError, match=rf"to or from places \[-1, {size}\] of a group of"):
            comm.start_transfer({-1: x}, {size: x})
        other = ({}, {own: x}), ({own: x}, {own: x[1:]}), ({own: x}, {own: x.int()})
        for sends, receives in (({own: x}, {}), *other):
            with pytest.raises(ValueError, match="of a transfer to itself; both ends must be alike"):
                comm.start_transfer(sends, receives)
        with pytest.raises(ValueError, match=r"receives from places \[0\] must be contiguous"):
            comm.start_transfer({}, {0: x[::2]})


def test_named_groups_are_apart() -> None:
    def work(comm: Comm) -> list:
        plain, one, other = (comm.group([1, 0], name) for name in ("", "a", "b"))
        assert len({plain, one, other, comm}) == 4
        assert comm.group([1, 0], "a") is one is other.group([1, 0], "a")
        assert other.group([1, 0]) is plain
        groups = (plain, one, other) if comm.rank else (other, one, plain)
        found = {group: group.start_all_gather(torch.tensor(i)) for i, group in enumerate(groups)}
        return [found[group].wait().tolist() for group in (plain, one, other)]

    assert threads(2, work) == [[[0, 2], [1, 1], [2, 0]]] * 2


# Processes.


@pytest.mark.parametrize("size", [4, 2])
def test_processes_equal_threads(processes: Gangs, size: int) -> None:
    assert processes(size).run(f"{HERE}:everything") == threads(size, everything)


@pytest.mark.parametrize("work", [chain, orders, program, empty, around, some])
def test_programs_of_groups_equal_threads(processes: Gangs, work) -> None:
    assert processes(4).run(f"{HERE}:{work.__name__}") == threads(4, work)


def test_output_and_errors_of_ranks_are_told(processes: Gangs) -> None:
    assert processes(2).run(f"{HERE}:rank_of") == [0, 1]
    with pytest.raises(GangError, match=r"ranks \[1\] failed in .*:one_fails") as caught:
        processes(2).run(f"{HERE}:one_fails", {"rank": 1})
    told = str(caught.value).splitlines()
    assert {"[rank 0] seen by 0", "[rank 1] seen by 1", "[rank 1] KeyError: 'the first'"} <= set(told)


@pytest.mark.slow
def test_a_process_that_hangs_or_dies_is_named(processes: Gangs) -> None:
    with pytest.raises(GangError, match=r"ranks \[0, 1\] did not answer") as caught:
        processes(2).run(f"{HERE}:one_sleeps", {"rank": 1}, timeout=1)
    stacks = [line for line in str(caught.value).splitlines() if "in one_sleeps" in line]
    assert [line.split("]")[0] for line in stacks] == ["[rank 0", "[rank 1"]
    with pytest.raises(GangError, match=r"ranks \[.*1\] failed.*\n(.*\n)*\[rank 1\] died with status 3"):
        processes(2).run(f"{HERE}:one_dies", {"rank": 1})
    assert processes(2).run(f"{HERE}:rank_of") == [0, 1]


# The ledger.


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_rank_that_is_played_keeps_the_same_ledger(size: int, device: str) -> None:
    told = threads(size, program)
    assert [program(LedgerComm(rank, size), device) for rank in range(size)] == told


def test_bytes_are_those_of_the_ideal_algorithm() -> None:
    comm = LedgerComm(2, 4)
    with record(comm) as ledger:
        tall = torch.zeros(4, 3)
        comm.all_gather(tall[0])
        comm.reduce_scatter(tall)
        comm.all_to_all(tall)
        comm.group([3, 2]).all_reduce(tall)
        comm.gather_objects("ab")
    assert ledger.entries[:4] == [
        Entry("all_gather", (0, 1, 2, 3), 36, metadata=False),
        Entry("reduce_scatter", (0, 1, 2, 3), 36, metadata=False),
        Entry("all_to_all", (0, 1, 2, 3), 36, metadata=False),
        Entry("all_reduce", (3, 2), 48, metadata=False),
    ]
    assert (ledger.bytes(), ledger.bytes("all_reduce"), ledger.bytes(ranks=[0, 1, 2, 3])) == (156, 48, 108)
    assert ledger.metadata_bytes == 3 * (8 + 4)


def test_nothing_to_move() -> None:
    shapes = [[3, 0, 2], [3, 3, 0, 2], [3, 3, 0, 2], [0, 2], [3, 0, 2]]
    assert threads(3, empty) == [shapes] * 3
    assert empty(LedgerComm(0, 3)) == shapes
    assert empty(SingleComm()) == [[1, 0, 2], [1, 1, 0, 2], [1, 1, 0, 2], [0, 2], [1, 0, 2]]


def test_one_rank_has_no_ledger() -> None:
    with record(SingleComm()) as ledger:
        everything(SingleComm())
    assert ledger.entries == []
