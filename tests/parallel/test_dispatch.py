"""Expert dispatch over ranks equals one device, moves exactly the bytes of its routing, and keeps little."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.plan.deliveries import deliveries
from weft.nn.slots import Exchange
from weft.ops.experts import expert_mlp
from weft.parallel.comm import Comm
from weft.parallel.dispatch import ShardedExchange, expert_comms
from weft.parallel.ledger import LedgerComm, record
from weft.parallel.threads import run_threads
from weft.plan.dispatch import Dispatch, Transport, traffic

TRANSPORTS: tuple[Transport, ...] = ("all_gather", "all_to_all", "per_rank", "per_node")
GRIDS = [(2, 1, 8), (4, 1, 8), (2, 2, 8), (1, 2, 8), (8, 1, 2), (8, 1, 4)]  # ep, etp, ranks of a node
WIDTH, INNER, TOP_K = 6, 4, 3


@dataclass
class Case:
    """Tokens of every rank, their experts, and the weights of all experts; fp64."""

    counts: list[int]
    experts: int = 8
    top_k: int = TOP_K
    missing: float = 0.0
    one: bool = False
    width: int = WIDTH
    inner: int = INNER
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(len(self.counts) + sum(self.counts))
        tokens, e, w, f = sum(self.counts), self.experts, self.width, self.inner
        shapes = {"x": (tokens, w), "weights": (tokens, self.top_k), "up": (e, f, w), "down": (e, w, f)}
        self.tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.cotangent = torch.randn(tokens, w, dtype=torch.float64)
        self.chosen = torch.rand(tokens, e).topk(self.top_k, 1).indices
        self.chosen.masked_fill_(torch.rand(self.chosen.shape) < self.missing, -1)
        if self.one:
            self.chosen.fill_(-1)[:, 1] = e - 1

    def here(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def leaves(self, rank: int, own: slice, inner: slice) -> dict[str, Tensor]:
        """What one rank has: its tokens, and parts of its experts."""
        here, t = self.here(rank), self.tensors
        parts = {
            "x": t["x"][here],
            "weights": t["weights"][here],
            "up": t["up"][own, inner],
            "down": t["down"][own, :, inner],
        }
        return {name: part.clone().requires_grad_() for name, part in parts.items()}


def run(
    exchange: Exchange, leaves: dict[str, Tensor], chosen: Tensor, experts: int, bound: int | None = None
):
    """The routed experts, and the counts of their rows."""
    rows, weights, counts, home = exchange.announce(chosen, experts, bound)(leaves["x"], leaves["weights"])()
    return home(expert_mlp(rows, leaves["up"], leaves["down"], counts, weights))(), counts


def alone(case: Case) -> dict[str, Tensor]:
    """Output and gradients on one device."""
    leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
    y, _ = run(Exchange(), leaves, case.chosen, case.experts)
    y.backward(case.cotangent)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def sharded(case: Case, grid: tuple[int, int, int], transport: Transport, bound: int | None = None):
    """Output and gradients put together from all ranks, ledgers forward and backward, and counts of rows."""
    ep, etp, node = grid
    per, part = case.experts // ep, case.inner // etp

    def work(comm: Comm):
        at, place = divmod(comm.rank, etp)
        own, inner = slice(at * per, at * per + per), slice(place * part, place * part + part)
        leaves, here = case.leaves(comm.rank, own, inner), case.here(comm.rank)
        exchange = ShardedExchange(expert_comms(comm, etp, node), case.experts, transport)
        with record(comm) as there:
            y, counts = run(exchange, leaves, case.chosen[here], case.experts, bound)
        with record(comm) as back:
            y.backward(case.cotangent[here])
        return {"y": y.detach(), **{k: leaf.grad for k, leaf in leaves.items()}}, (there, back), counts

    results, ledgers, counts = zip(*run_threads(ep * etp, work), strict=True)
    whole = {name: torch.cat([r[name] for r in results]) for name in ("y", "x", "weights")}
    for name, dim in (("up", 1), ("down", 2)):
        rows = [torch.cat([r[name] for r in results[i : i + etp]], dim) for i in range(0, ep * etp, etp)]
        whole[name] = torch.cat(rows)
    return whole, ledgers, counts


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert (got[name] - value).abs().max().item() <= 1e-12 * value.abs().max().clamp_min(1).item(), name


KINDS = {
    "uneven": {},
    "missing": {"missing": 0.4},
    "one expert": {"one": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_one_device(grid, transport, kind):
    counts = [5, 0, 3, 7, 2, 1, 4, 6][: grid[0] * grid[1]]  # the second rank has none
    case = Case(counts, **KINDS[kind])
    whole, _, _ = sharded(case, grid, transport)
    equal(whole, alone(case))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_static_rows(grid, transport):
    """Every expert computes the same number of rows, whatever was chosen."""
    ranks = grid[0] * grid[1]
    case = Case([5, 0, 3, 7, 2, 1, 4, 6][:ranks], missing=0.2)
    bound = 7
    whole, _, counts = sharded(case, grid, transport, bound)
    equal(whole, alone(case))
    assert all(found == [ranks * bound] * (case.experts // grid[0]) for found in counts)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_has_tokens(transport):
    whole, _, _ = sharded(Case([0, 0, 0, 0]), (2, 2, 8), transport)
    assert whole["y"].shape == (0, WIDTH)
    assert not whole["up"].any()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_under_way_before_it_is_awaited(transport):
    """Without gradients too: counts leave when they are announced, rows when they are dispatched."""
    case = Case([5, 0, 3, 7])
    want = alone(case)["y"]

    def work(comm: Comm) -> Tensor:
        here, part = case.here(comm.rank), slice(comm.rank * 2, comm.rank * 2 + 2)
        leaves = case.leaves(comm.rank, part, slice(None))
        exchange = ShardedExchange(expert_comms(comm, 1, 2), case.experts, transport)
        with record(comm) as ledger:
            send = exchange.announce(case.chosen[here], case.experts)
            assert len(ledger.entries) == 1
            arrive = send(leaves["x"], leaves["weights"])
            assert [entry.metadata for entry in ledger.entries] == [True, True, False]
            arrived = arrive()
            rows = arrived.rows, leaves["up"], leaves["down"], arrived.counts, arrived.weights
            before = len(ledger.entries)
            arrive = arrived.home(expert_mlp(*rows))
            assert len(ledger.entries) == before + 1
        return arrive()

    with torch.no_grad():
        got = torch.cat(run_threads(4, torch.no_grad()(work)))
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def routing(case: Case, grid: tuple[int, int, int]) -> Dispatch:
    ep, etp, node = grid
    tokens = sum(case.counts) // len(case.counts)
    return Dispatch(tokens, case.width, case.top_k, case.experts, ep, etp, node, element=8)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("grid", [*GRIDS, (4, 2, 4)])
def test_bytes_are_those_of_the_routing(grid, transport):
    """Every copy of a token, one by one: with weights on the way there, without them on the way back."""
    ranks = grid[0] * grid[1]
    case = Case([5, 0, 3, 7, 2, 1, 4, 6][:ranks], missing=0.2)
    there, back, metadata = [0] * ranks, [0] * ranks, [0] * ranks
    for rank in range(ranks):
        for chosen in case.chosen[case.here(rank)].tolist():
            for start, end, slots in deliveries(transport, routing(case, grid), rank, chosen):
                if start != end:
                    rich, poor = 8 * (case.width + slots), 8 * case.width
                    there[end], there[start] = there[end] + rich, there[start] + poor
                    back[start], back[end] = back[start] + rich, back[end] + poor
                    metadata[end] += 4 * slots
    _, ledgers, _ = sharded(case, grid, transport)
    assert [forward.bytes() for forward, _ in ledgers] == there
    assert [backward.bytes() for _, backward in ledgers] == back
    counts = traffic(transport, Dispatch(0, 1, case.top_k, case.experts, *grid)).metadata
    assert [forward.metadata_bytes - sum(counts) for forward, _ in ledgers] == metadata
    assert not any(backward.metadata_bytes for _, backward in ledgers)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("grid", [(8, 1, 8), (8, 1, 4), (4, 2, 4)])
def test_bytes_of_balanced_routing(grid, transport):
    case = Case([512] * 8, experts=64, top_k=8, width=32)
    want = traffic(transport, routing(case, grid))
    _, ledgers, _ = sharded(case, grid, transport)
    payload, metadata = (
        sum(n) / 8 for n in zip(*((f.bytes(), f.metadata_bytes) for f, _ in ledgers), strict=True)
    )
    hidden, weights = sum(want.hidden), sum(want.weights)
    assert payload * hidden / (2 * hidden + weights) == pytest.approx(hidden, rel=0.02)
    assert metadata == pytest.approx(sum(want.metadata), rel=0.02)


def test_static_bytes():
    """Every rank sends each other one its experts' rows, full or not, and not a word of metadata."""
    case, bound = Case([5, 0, 3, 7], missing=0.2), 6
    _, ledgers, _ = sharded(case, (4, 1, 8), "all_to_all", bound)
    rows = 3 * (case.experts // 4) * bound
    for forward, backward in ledgers:
        assert forward.bytes() == backward.bytes() == rows * 8 * (2 * case.width + 1)
        assert forward.metadata_bytes == backward.metadata_bytes == 0


@pytest.mark.parametrize(("etp", "blocks"), [(1, 4), (2, 8)])
def test_static_shapes_ask_nothing_of_the_device(etp, blocks):
    """A meta tensor has no values to ask for."""
    comm, bound = LedgerComm(1, 4 * etp), 5
    exchange = ShardedExchange(expert_comms(comm, etp, 8), 8, "all_to_all")
    like = {"device": "meta", "requires_grad": True}
    x, weights = torch.empty(6, WIDTH, **like), torch.empty(6, TOP_K, **like)
    chosen = torch.empty(6, TOP_K, dtype=torch.int64, device="meta")
    arrived = exchange.announce(chosen, 8, bound)(x, weights)()
    assert arrived.counts == [blocks * bound] * 2
    assert arrived.rows.shape == (2 * blocks * bound, WIDTH)
    y = arrived.home(arrived.rows * arrived.weights.unsqueeze(1))()
    y.sum().backward()
    assert (y.shape, x.grad.shape, weights.grad.shape) == ((6, WIDTH), (6, WIDTH), (6, TOP_K))


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (4, 1), (2, 2)])
def test_what_autograd_keeps(ep, etp):
    """At most ``b k (etp w + 2 f)`` bytes of each token, and 5% for indices and weights."""
    tokens, top_k, experts, width, inner = 128, 4, 8, 256, 512
    per, part = experts // ep, inner // etp

    def work(comm: Comm) -> int:
        exchange = ShardedExchange(expert_comms(comm, etp, 8), experts, "all_to_all")
        x, weights = torch.randn(tokens, width), torch.rand(tokens, top_k)
        up, down = torch.randn(per, part, width), torch.randn(per, width, part)
        leaves = {"x": x, "weights": weights, "up": up, "down": down}
        mine = {leaf.requires_grad_().untyped_storage().data_ptr() for leaf in leaves.values()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in mine:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        chosen = torch.rand(tokens, experts).topk(top_k, 1).indices
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = run(exchange, leaves, chosen, experts)
        return sum(kept.values()) * bool(y.requires_grad)

    total = sum(run_threads(ep * etp, work)) / (tokens * ep * etp)
    assert 4 * top_k * (etp * width + inner) <= total
    assert total <= 1.05 * 4 * top_k * (etp * width + 2 * inner)
