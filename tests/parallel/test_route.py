"""Routes on ranks: equal to the legs in one process, first in first out, transposed, counted."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gangs import Gangs, threads
from tests.once import once
from tests.plan.routes import Values, carried, even, lower_bound, numbers, random_pair, whole
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.ledger import LedgerComm, record
from weft.parallel.route import Channel, channel, moved
from weft.plan.route import End, Route, compile_route, transpose

HERE = "tests.parallel.test_route"
CPU = torch.device("cpu")


def me(comm: Comm) -> int:
    return comm.ranks[comm.rank]


def over(comm: Comm, name: str = "route", width: tuple[int, ...] = (2,)) -> Channel:
    return Channel(comm.group(comm.ranks, name), width, torch.float64, CPU)


def mine(values: Values, comm: Comm) -> Tensor | None:
    return torch.from_numpy(values[me(comm)]) if me(comm) in values else None


@once(256)
def routes(seed: int) -> tuple[End, End, Route]:
    source, target = random_pair(seed)
    return source, target, compile_route(source, target)


def many(comm: Comm, seeds: list[int]) -> list:
    """Rows there and back of random routes, all under way together, and bytes."""
    there, back = over(comm, "there"), over(comm, "back")
    pending = []
    with record(comm) as ledger:
        for seed in seeds:
            _, _, route = routes(seed)
            x, y = numbers(route.sources, seed), numbers(route.targets, seed + 1)
            pending.append(there.post(route, mine(x, comm)))
            pending.append(back.post(transpose(route), mine(y, comm)))
        values = [one.wait().tolist() for one in reversed(pending)][::-1]
    return [values, ledger.bytes()]


def expected(seeds: list[int], size: int) -> list[list]:
    results: list[list] = [[[], 0] for _ in range(size)]
    for seed in seeds:
        source, target, route = routes(seed)
        assert sum(route.links.values()) == lower_bound(source, target)
        ways = (route, numbers(route.sources, seed)), (transpose(route), numbers(route.targets, seed + 1))
        for way, values in ways:
            out = carried(way, values)
            for rank, result in enumerate(results):
                result[0].append(out.get(rank, np.zeros((0, 2))).tolist())
                result[1] += 16 * sum(rows for (_, to), rows in way.links.items() if to == rank)
    return results


@pytest.mark.parametrize("part", range(2))
def test_threads_do_what_the_legs_say(part: int) -> None:
    """Values of all kinds of ends, there and back, and no byte more than must travel."""
    seeds = list(range(100 * part, 100 * part + 100))
    assert threads(8, lambda comm: many(comm, seeds)) == expected(seeds, 8)


def test_processes_do_too(processes: Gangs) -> None:
    seeds = [seed for seed in range(200, 300) if max(random_pair(seed)[1].holdings) < 4][:12]
    assert processes(4).run(f"{HERE}:many", {"seeds": seeds}) == expected(seeds, 4)


def sums(comm: Comm) -> list:
    """Of numbers whose sum depends on the order: 1e16 + 1 - 1e16 is 0, in another order 1."""
    route = compile_route(whole(3, [0, 1, 2], "partial"), even(3, [0, 1, 2]))
    x = torch.full((3, 2), (1e16, 1.0, -1e16)[comm.rank], dtype=torch.float64)
    return over(comm).post(route, x).wait()[:, 0].tolist()


def test_summands_are_added_in_the_order_of_ranks() -> None:
    assert threads(3, sums) == [[0.0]] * 3


def idle(comm: Comm) -> list:
    """Ranks 1 and 2 neither post nor make a channel."""
    route = compile_route(even(4, [0]), whole(4, [3], "partial"))
    with record(comm) as ledger:
        if me(comm) in (0, 3):
            way = channel(comm, route, (2,), torch.float64, CPU, "apart")
            way.post(route, torch.ones(4, 2, dtype=torch.float64) if me(comm) == 0 else None).wait()
    return [ledger.bytes(), len(ledger.entries)]


def test_idle_ranks_take_no_part(processes: Gangs) -> None:
    told = [[0, 0], [0, 0], [0, 0], [64, 1]]
    assert threads(4, idle) == told
    assert processes(4).run(f"{HERE}:idle") == told


def hop(comm: Comm) -> Route:
    """From the first half of the ranks to the second, each to its own."""
    half = comm.size // 2
    return compile_route(even(12, range(half)), even(12, range(half, comm.size)))


def microbatches(comm: Comm) -> list:
    """Several under way on each of two channels between the same ranks, posted in different orders."""
    route, names = hop(comm), ["a", "b"]
    ways = {name: channel(comm, route, (3,), torch.bfloat16, CPU, name) for name in names}
    sends = me(comm) < comm.size // 2
    pending = []
    for name in names if sends else names[::-1]:
        for i in range(4):
            x = torch.full(
                (12 // (comm.size // 2), 3), 10 * i + me(comm) + 100 * names.index(name)
            ).bfloat16()
            pending.append((name, i, ways[name].post(route, x if sends else None)))
    return [[name, i, one.wait().unique().tolist()] for name, i, one in pending[::-1]]


def test_first_in_first_out(processes: Gangs) -> None:
    results = threads(4, microbatches)
    for rank in (2, 3):
        assert sorted(results[rank]) == [
            [name, i, [100.0 * n + 10 * i + rank - 2]] for n, name in enumerate("ab") for i in range(4)
        ]
    assert processes(4).run(f"{HERE}:microbatches") == results


def test_neighbours_are_sent_the_tensor_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, received = [], []

    class Spy(LedgerComm):
        def start_transfer(self, sends, receives):
            sent.extend(sends.values())
            received.extend(receives.values())
            return super().start_transfer(sends, receives)

    route = compile_route(even(8, [0]), even(8, [1]))
    x, into = torch.zeros(8, 2, dtype=torch.float64), torch.ones(8, 2, dtype=torch.float64)
    Channel(Spy(0, 2), (2,), torch.float64, CPU).post(route, x).wait()
    assert (sent[0].data_ptr(), sent[0].shape) == (x.data_ptr(), x.shape)
    got = Channel(Spy(1, 2), (2,), torch.float64, CPU).post(route, into=into).wait()
    assert got.data_ptr() == into.data_ptr() == received[0].data_ptr()


def adjoint(comm: Comm) -> list:
    """Gradients of a product with the moved rows, by autograd; sources and targets overlap."""
    route = compile_route(even(6, [0, 1]), whole(6, [1, 2]))
    there, back = over(comm, "there"), over(comm, "back")
    x, y = (mine(numbers(ends, 5), comm) for ends in (route.sources, route.targets))
    x = (torch.zeros(0, 2, dtype=torch.float64) if x is None else x).requires_grad_()
    out = moved(x, route, there, back)
    (out * (0 if y is None else y)).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_gradients_come_back_summed() -> None:
    y = numbers({1: 6, 2: 6}, 5)
    total = y[1] + y[2]
    assert threads(3, adjoint) == [total[:3].tolist(), total[3:].tolist(), []]


def test_into_is_filled_and_sums_start_at_zero() -> None:
    route = transpose(compile_route(even(4, [0]), whole(3, [0, 1])))

    def work(comm: Comm) -> list:
        x = torch.full((3, 2), 1.0 + comm.rank, dtype=torch.float64)
        into = torch.full((4, 2), 9.0, dtype=torch.float64) if comm.rank == 0 else None
        return over(comm).post(route, x, into).wait()[:, 0].tolist()

    assert threads(2, work) == [[3.0, 3.0, 3.0, 0.0], []]


def bytes_of(comm: Comm) -> list:
    route = compile_route(even(12, [0, 1, 2]), even(12, [1, 2, 3]))
    with record(comm) as ledger:
        x = torch.zeros(route.sources.get(me(comm), 0), 5, dtype=torch.float64)
        way = over(comm, "bytes", (5,))
        way.post(route, x).wait()
        way.post(compile_route(even(0, [0]), even(0, [1])), x[:0]).wait()
    return [[entry.op, list(entry.ranks), entry.bytes, entry.metadata] for entry in ledger.entries]


def test_bytes_are_those_of_the_rows_that_travel(processes: Gangs) -> None:
    """A rank keeps the rows that it has already, and nothing is heard of ranks without rows."""
    told = threads(4, bytes_of)
    links = compile_route(even(12, [0, 1, 2]), even(12, [1, 2, 3])).links
    for rank in range(4):
        assert sum(entry[2] for entry in told[rank]) == 40 * sum(
            n for (_, to), n in links.items() if to == rank
        )
    assert told[0] == []
    assert processes(4).run(f"{HERE}:bytes_of") == told
    assert [bytes_of(LedgerComm(rank, 4)) for rank in range(4)] == told


def test_alone() -> None:
    route = compile_route(even(5, [0]), even(5, [0]))
    x = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    assert over(SingleComm()).post(route, x).wait().equal(x)
    with pytest.raises(ValueError, match=r"rank 0 sends .*float64 of shape \[5, 2\], not .*float32"):
        over(SingleComm()).post(route, x.float())
    with pytest.raises(ValueError, match=r"rank 0 sends .* of shape \[5, 2\], not nothing"):
        over(SingleComm()).post(route)
    with pytest.raises(ValueError, match="what rank 0 fills must be contiguous"):
        over(SingleComm()).post(route, x, torch.zeros(2, 5, dtype=torch.float64).T)
