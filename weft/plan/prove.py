"""Proves before launch that a schedule does what a step needs, in an order that cannot hang.

1. Program (``program``): each list has every F, B and W of its stages once, POST and WAIT at both ends of
   every edge between ranks and in both directions, and nothing else; it makes before it uses, and uses all it
   makes; OUT comes with IN, GATHER with FREE, REDUCE after the last W of a stage, STEP at the end.
2. Channels: an edge in one direction is first in, first out, so both ends launch in the same order.
3. Rendezvous: with every WAIT after the POST of both its ends, the graph of what happens before what has no
   cycle. The lists are run, which finds an order or the ranks that wait for each other.
4. Collectives: STEP is one of all ranks, and once and last everywhere. A stage has one pipeline rank, whose
   members all run the same list, so GATHER and REDUCE come in one order by construction. (For a stage with
   several homes, the lists of these would have to agree in what they do with it.)
5. Memory: what forward passes keep at most, and how many transfers are under way at most.

It follows that whatever passes runs to its end, and that each W adds its part once, of inputs that are there.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, pairwise, repeat

from weft.plan.cycle import Cycle, Place, Stuck, words
from weft.plan.program import SHOWN, Fault, Listed, peer, program
from weft.plan.schedule import Action, Graph, Schedule

_KEEP, _DROP = ("F", "IN"), ("W", "OUT")  # a forward pass more that is kept, and one less


@dataclass(frozen=True)
class Proof:
    """What is known of a schedule.

    Attributes:
        faults: none where the schedule can be run.
        live: of each pipeline rank, the most (stage, microbatch) whose forward pass is kept at one time: from
            F to W, but not from OUT to IN.
        in_flight: of each pipeline rank, the most transfers launched and not waited for at one time.
        order: (rank, place) of all actions in an order in which they can happen; where ranks wait for each
            other, of those before that.
        cycle: the ranks that wait for each other, if there are any.
    """

    faults: tuple[Fault, ...]
    live: tuple[int, ...] = ()
    in_flight: tuple[int, ...] = ()
    order: tuple[tuple[int, int], ...] = ()
    cycle: Cycle = ()

    @property
    def text(self) -> str:
        """The first faults, one per line (more for a cycle); empty where there is none."""
        more = len(self.faults) - SHOWN
        lines = [fault.message for fault in self.faults[:SHOWN]]
        return "\n".join([*lines, *([f"and {more} more"] if more > 0 else [])])


def prove(schedule: Schedule, most_live: int = 0, *, training: bool = True) -> Proof:
    """Faults of a schedule, and what it needs.

    Args:
        schedule: the lists; of a graph whose stages may have any number of inputs and outputs.
        most_live: the limit for ``live`` of every pipeline rank; 0 for none.
        training: whether the lists have gradients and a STEP; otherwise F and its transfers only, and nothing
            is kept.
    """
    graph = schedule.graph
    wrong = tuple(Fault("graph", -1, -1, message) for message in _graph(schedule))
    if wrong:
        return Proof(wrong)
    lists = [Listed.of(rank, actions) for rank, actions in enumerate(schedule.lists)]
    order, stuck = _run(graph, lists)
    cycle = _round(stuck)
    faults: list[Fault] = []
    if cycle:  # first, so that no cap on what is shown hides it
        lines = ["ranks wait for each other:", *words(cycle).splitlines(), _remedy(graph, lists, cycle)]
        faults.append(Fault("deadlock", *cycle[0].wait[:2], "\n  ".join(lines)))
    for listed in lists:
        faults += program(schedule, lists, listed.rank, training)
    faults += _channels(lists)
    faults += _memory(lists, most_live if training else 0)
    live = tuple(_peak(actions, _KEEP, _DROP) if training else 0 for actions in schedule.lists)
    flying = tuple(_peak(actions, ("POST",), ("WAIT",)) for actions in schedule.lists)
    return Proof(tuple(faults), live, flying, tuple(order), cycle)


def _graph(schedule: Schedule) -> Iterator[str]:
    """What no list can make good."""
    graph, stages = schedule.graph, set(schedule.graph.home)
    ranks = sorted(set(graph.home.values()))
    if ranks != list(range(len(schedule.lists))):
        yield f"stages are on pipeline ranks {ranks}, but there are {len(schedule.lists)} lists: one for each"
    if schedule.microbatches < 1:
        yield f"{schedule.microbatches} microbatches: at least 1"
    sources: dict[str, set[str]] = {stage: set() for stage in stages}
    for edge in graph.edges:
        if unknown := set(edge) - stages:
            yield f"edge {edge.source}>{edge.target}: there is no stage {', '.join(sorted(unknown))}"
        elif edge.source in sources[edge.target]:
            yield f"edge {edge.source}>{edge.target} is there twice: remove one"
        else:
            sources[edge.target].add(edge.source)
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as error:
        yield f"edges lead in a circle: {'>'.join(map(str, error.args[1]))}"


def _peak(actions: Iterable[Action], more: Sequence[str], less: Sequence[str]) -> int:
    """The most that is there at one time, when these ops add one and those take one away."""
    return max(accumulate(((made.op in more) - (made.op in less) for made in actions), initial=0))


def _memory(lists: Iterable[Listed], most: int) -> Iterator[Fault]:
    """The first action of each list that keeps more than the limit."""
    for listed in lists if most else ():
        live = 0
        for at, made in enumerate(listed.actions):
            live += (made.op in _KEEP) - (made.op in _DROP)
            if live > most:
                peak = _peak(listed.actions, _KEEP, _DROP)
                message = f"{listed.show(at)} makes {live} forward passes kept, of {most} allowed"
                message += f" ({peak} at the peak): put W of another before it, or OUT and IN"
                yield listed.fault("memory", at, message)
                break


def _channels(lists: Sequence[Listed]) -> Iterator[Fault]:
    """Where the ends of an edge launch the same transfers in another order."""
    posts: dict[tuple[str, str, bool], dict[int, list[int]]] = {}  # to the places on each rank
    for listed in lists:
        for at, (op, source, _, target, back) in enumerate(listed.actions):
            if op == "POST":
                posts.setdefault((source, target, back), {}).setdefault(listed.rank, []).append(at)
    for ends in posts.values():
        for (one, mine), (other, theirs) in pairwise(ends.items()):
            here = [lists[one].actions[at] for at in mine]
            there = [lists[other].actions[at] for at in theirs]
            if here == there or sorted(here) != sorted(there):  # what is missing is said elsewhere
                continue
            i = next(i for i, (left, right) in enumerate(zip(here, there, strict=True)) if left != right)
            message = f"{lists[one].show(mine[i])} is transfer {i} of its channel, but on rank {other}"
            message += f" that is {lists[other].show(theirs[i])}: post in the same order at both ends"
            yield lists[one].fault("channel", mine[i], message)


def _run(graph: Graph, lists: Sequence[Listed]) -> tuple[list[tuple[int, int]], dict[int, Stuck]]:
    """An order in which everything can happen, or the part of it that can, and where ranks then stand.

    Every rank goes on until a WAIT whose other end has not posted. A POST that is in no list stops nobody
    here: that it is missing is said elsewhere.
    """
    order: list[tuple[int, int]] = []
    waits = [_waits(graph, lists, listed) for listed in lists]
    over = [0] * len(lists)  # of these waits
    reached = [0] * len(lists)
    stuck: dict[int, Stuck] = {}
    behind: list[list[int]] = [[] for _ in lists]  # ranks that wait for each
    ready = deque(range(len(lists)))
    while ready:
        rank = ready.popleft()
        start, reached[rank] = reached[rank], len(lists[rank].actions)
        stuck.pop(rank, None)
        while over[rank] < len(waits[rank]):
            wait = waits[rank][over[rank]]
            if wait.post.at >= reached[wait.post.rank]:
                stuck[rank], reached[rank] = wait, wait.wait.at
                behind[wait.post.rank].append(rank)
                break
            over[rank] += 1
        order += zip(repeat(rank), range(start, reached[rank]), strict=False)
        ready += [other for other in behind[rank] if stuck[other].post.at < reached[rank]]
        behind[rank] = [other for other in behind[rank] if stuck[other].post.at >= reached[rank]]
    return order, stuck


def _waits(graph: Graph, lists: Sequence[Listed], listed: Listed) -> list[Stuck]:
    """Each WAIT of a list with the POST at the other end; without those that have none."""
    others = {edge: peer(graph, listed.rank, edge) for edge in graph.edges}
    found: list[Stuck] = []
    for at, made in enumerate(listed.actions):
        other = others.get(made.edge, -1) if made.op == "WAIT" else -1
        if other >= 0:
            post = Action("POST", *made[1:])
            place = lists[other].place.get(post)
            if place is not None:
                found.append(Stuck(Place(listed.rank, at, made), Place(other, place, post)))
    return found


def _round(stuck: Mapping[int, Stuck]) -> Cycle:
    """The shortest round of ranks that wait for each other where they stand; its lowest rank first."""
    rounds: list[Cycle] = []
    seen: set[int] = set()
    for rank in stuck:
        path: list[int] = []
        while rank not in seen:
            seen.add(rank)
            path.append(rank)
            rank = stuck[rank].post.rank
        if rank in path:
            ranks = path[path.index(rank) :]
            start = ranks.index(min(ranks))
            rounds.append(tuple(stuck[r] for r in ranks[start:] + ranks[:start]))
    return min(rounds, key=len, default=())


def _remedy(graph: Graph, lists: Sequence[Listed], cycle: Cycle) -> str:
    """A POST of the cycle that can go before the WAIT before it, or that WAIT after it."""
    for stuck, after in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
        post, wait = stuck.post, after.wait
        made, read = _maker(graph, post), _reader(graph, wait)
        place = lists[post.rank].place
        if made is None or place.get(made, post.at) < wait.at:
            return f"on rank {post.rank}, move {post} before {wait}"
        if read is None or place.get(read, -1) > post.at:
            return f"on rank {post.rank}, move {wait} after {post}"
    return "each makes too late what the next one needs: reorder F and B"


def _maker(graph: Graph, post: Place) -> Action | None:
    """What makes the value that is sent; None at the end that receives."""
    _, source, i, target, back = post.action
    maker = Action("B", target, i) if back else Action("F", source, i)
    return maker if graph.home[maker.unit] == post.rank else None


def _reader(graph: Graph, wait: Place) -> Action | None:
    """What reads the value that is received; None at the end that sends."""
    _, source, i, target, back = wait.action
    reader = Action("B", source, i) if back else Action("F", target, i)
    return reader if graph.home[reader.unit] == wait.rank else None
