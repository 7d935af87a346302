"""A move's gather and scatter are transposes: <gather x, y> == <x, scatter y>, summed over ranks."""

import pytest
import torch

from weft.parallel import moves
from weft.parallel.comm import Comm
from weft.parallel.moves import Blocks, Features, Rows, Swap
from weft.parallel.threads import run_threads

CPU = torch.device("cpu")
SHARED = ((0, 1, 4), (2, 3, 4))  # two ranks with a column in common


def made(kind: str, comm: Comm):
    """A move, the shape of this rank's part and the shape of the whole."""
    counts = [3, 2, 0] if comm.size == 3 else [3, 2]
    own = counts[comm.rank // 2 if kind == "blocks" else comm.rank]
    match kind:
        case "rows":
            return Rows(comm, counts), (own, 4), (sum(counts), 4)
        case "features":
            return Features(comm, ((0, 2), (1, 3)), CPU), (5, 2), (5, 4)
        case "shared":
            return Features(comm, SHARED, CPU), (5, 3), (5, 5)
        case "once":
            return Features(comm, SHARED, CPU, once=True), (5, 3), (5, 5)
        case "blocks":
            return Blocks(comm, counts, 2), (own, 3), (sum(counts), 6)
        case _:
            return Swap(comm, counts), (sum(counts), 2), (own, 2 * comm.size)


CASES = [("rows", 2), ("rows", 3), ("features", 2), ("shared", 2), ("once", 2), ("blocks", 4), ("swap", 2)]


@pytest.mark.parametrize(("kind", "ranks"), [*CASES, ("swap", 3)])
def test_transposes(kind, ranks):
    def work(comm: Comm):
        generator = torch.Generator().manual_seed(comm.rank)
        move, part, whole = made(kind, comm)
        x = torch.randn(part, generator=generator, dtype=torch.float64)
        y = torch.randn(whole, generator=generator, dtype=torch.float64)
        return (move.gather(x) * y).sum().item(), (x * move.scatter(y)).sum().item()

    forward, backward = map(sum, zip(*run_threads(ranks, work), strict=True))
    assert forward == pytest.approx(backward, abs=1e-12)


@pytest.mark.parametrize(("kind", "ranks"), CASES[:1] + CASES[3:])
def test_autograd_is_the_transpose(kind, ranks):
    def work(comm: Comm):
        move, part, _ = made(kind, comm)
        x = torch.ones(part, dtype=torch.float64, requires_grad=True)
        y = moves.gather(move, x)
        cotangent = torch.arange(y.numel(), dtype=torch.float64).view_as(y) + comm.rank
        y.backward(cotangent)
        assert torch.equal(x.grad, move.scatter(cotangent))
        again = cotangent.clone().requires_grad_()
        out = moves.scatter(move, again)
        out.backward(torch.ones_like(out))
        assert torch.equal(again.grad, move.gather(torch.ones_like(out)))

    run_threads(ranks, work)


def test_rows_come_in_order_and_uneven():
    def work(comm: Comm):
        whole = torch.arange(10.0).view(5, 2)
        counts = [3, 2, 0]
        move = Rows(comm, counts)
        mine = whole.split(counts)[comm.rank]
        assert torch.equal(move.gather(mine), whole)
        assert torch.equal(move.scatter(whole), 3 * mine)

    run_threads(3, work)


def test_shared_columns_add_up_or_count_once():
    def work(comm: Comm):
        ones = torch.ones(1, 3)
        assert Features(comm, SHARED, CPU).gather(ones).tolist() == [[1, 1, 1, 1, 2]]
        assert Features(comm, SHARED, CPU, once=True).gather(ones).tolist() == [[1, 1, 1, 1, 1]]
        got = Features(comm, SHARED, CPU, once=True).scatter(torch.ones(1, 5)).tolist()
        assert got == ([[2, 2, 2]] if comm.rank == 0 else [[2, 2, 0]])

    run_threads(2, work)


def test_product_equals_its_parts():
    """The joined projection against gather, product and scatter one after another, gradients too."""

    def work(comm: Comm):
        generator = torch.Generator().manual_seed(comm.rank)
        before, after = Rows(comm, [3, 2]), Features(comm, ((0, 2), (1, 3)), CPU)
        x = torch.randn(3 - comm.rank, 6, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        grads = []
        for joined in (True, False):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            if joined:
                y = moves.product(*leaves, before, after)
            else:
                y = moves.scatter(after, moves.gather(before, leaves[0]) @ leaves[1].t())
            (y * torch.arange(y.numel()).view_as(y)).sum().backward()
            grads.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    run_threads(2, work)
