"""Proves before launch that a schedule does what a step needs, in an order that cannot hang.

1. Program (``program``): each list has every F, B and W of its stages once, POST and WAIT of every edge over
   which something is sent, in both directions, and nothing else; it makes before it uses, and uses all it
   makes; OUT comes with IN, GATHER with FREE, REDUCE after the last W of a stage, STEP at the end.
2. Channels: an edge in one direction is first in, first out, so all its seats launch in the same order.
3. Meetings: what several seats do together (passes of joined stages, sums of stages with several seats, STEP)
   they do in one order, and with one choice between whole backward passes and B and W apart.
4. Rendezvous: with every WAIT after the POST of all seats of its edge, and every meeting when all its seats
   have come to it, the graph of what happens before what has no cycle. The lists are run, which finds an
   order or the seats that wait for each other.
5. Memory: what forward passes keep at most, how many transfers are under way at most, and how many groups of
   an encoder.

It follows that whatever passes runs to its end, and that each W adds its part once, of inputs that are there.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, pairwise, repeat, zip_longest

from weft.plan.cycle import Cycle, Place, Stuck, words
from weft.plan.program import SHOWN, Fault, Listed, program
from weft.plan.schedule import Action, Edge, Graph, Schedule

_KEEP, _DROP = ("F", "IN"), ("W", "OUT")  # a forward pass more that is kept, and one less


@dataclass(frozen=True)
class Proof:
    """What is known of a schedule.

    Attributes:
        faults: none where the schedule can be run.
        live: of each seat, the most (stage, microbatch) whose forward pass is kept at one time: from F to W,
            but not from OUT to IN.
        in_flight: of each seat, the most transfers launched and not waited for at one time.
        groups: of each encoder (``vision`` of stages ``vision_0``, ``vision_1``), the most groups that a seat
            has between F and W; if it is frozen, between F and the last that its list has of the outputs.
        order: (seat, place) of all actions in an order in which they can happen; where ranks wait for each
            other, of those before that.
        cycle: the ranks that wait for each other, if there are any.
    """

    faults: tuple[Fault, ...]
    live: tuple[int, ...] = ()
    in_flight: tuple[int, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict[str, int])
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
        most_live: the limit for ``live`` of every seat; 0 for none.
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
    faults += _meetings(graph, lists)
    kept = [[made for made in actions if made.unit not in graph.frozen] for actions in schedule.lists]
    faults += _memory(lists, graph, most_live if training else 0)
    live = tuple(_peak(actions, _KEEP, _DROP) if training else 0 for actions in kept)
    flying = tuple(_peak(actions, ("POST",), ("WAIT",)) for actions in schedule.lists)
    return Proof(tuple(faults), live, flying, _groups(schedule), tuple(order), cycle)


def _graph(schedule: Schedule) -> Iterator[str]:
    """What no list can make good."""
    graph, stages = schedule.graph, set(schedule.graph.home)
    seats = sorted({seat for home in graph.home.values() for seat in home})
    if seats != list(range(len(schedule.lists))):
        yield f"stages are on ranks {seats}, but there are {len(schedule.lists)} lists: one for each"
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
            yield from (f"edge {edge.source}>{edge.target} {words}" for words in _edge(graph, edge))
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as error:
        yield f"edges lead in a circle: {'>'.join(map(str, error.args[1]))}"


def _edge(graph: Graph, edge: Edge) -> Iterator[str]:
    """What is wrong with an edge."""
    source, target = (graph.home[stage] for stage in edge)
    if set(source) & set(target) and source != target and edge not in graph.routed:
        yield f"is between ranks {source} and {target}, which overlap: name it among the routed ones"
    if max(map(graph.size, edge)) % min(map(graph.size, edge)):
        sizes = " and ".join(str(graph.size(stage)) for stage in edge)
        yield f"has passes of {sizes} microbatches at its ends: one must divide the other"
    if edge.target in graph.frozen and edge.source not in graph.frozen:
        yield f"brings gradients back from {edge.target}, which is frozen and has none"


def _peak(actions: Iterable[Action], more: Sequence[str], less: Sequence[str]) -> int:
    """The most that is there at one time, when these ops add one and those take one away."""
    return max(accumulate(((made.op in more) - (made.op in less) for made in actions), initial=0))


def _memory(lists: Iterable[Listed], graph: Graph, most: int) -> Iterator[Fault]:
    """The first action of each list that keeps more than the limit."""
    for listed in lists if most else ():
        live = 0
        for at, made in enumerate(listed.actions):
            live += (made.op in _KEEP and made.unit not in graph.frozen) - (made.op in _DROP)
            if live > most:
                kept = [made for made in listed.actions if made.unit not in graph.frozen]
                message = f"{listed.show(at)} makes {live} forward passes kept, of {most} allowed"
                message += f" ({_peak(kept, _KEEP, _DROP)} at the peak): put W of another before it"
                yield listed.fault("memory", at, f"{message}, or OUT and IN")
                break


def _groups(schedule: Schedule) -> dict[str, int]:
    """Of each encoder, the most groups in flight on a seat."""
    graph, found = schedule.graph, dict[str, int]()
    for stage, seats in graph.home.items():
        tower, _, number = stage.rpartition("_")
        for seat in seats if tower and number.isdecimal() else ():
            most = max(accumulate(_flight(schedule, stage, schedule.lists[seat]), initial=0))
            found[tower] = max(found.get(tower, 0), most)
    return found


def _flight(schedule: Schedule, stage: str, actions: Sequence[Action]) -> Iterator[int]:
    """Of each action of a list, by how many it changes the groups of a stage in flight."""
    graph, ends = schedule.graph, dict[int, int]()
    for at, made in enumerate(actions):
        if made.unit != stage and stage not in graph.frozen:
            continue
        if made[:2] in (("F", stage), ("W", stage)):
            ends[made.microbatch] = at
        elif made.op == "WAIT" and made.unit == stage and made.edge in graph.edges:
            ends[graph.part(made.edge, stage, made.microbatch)] = at
        elif made.op == "F" and (edge := Edge(stage, made.unit)) in graph.edges:
            for part in graph.parts(edge, made.unit, made.microbatch, schedule.microbatches):
                ends[graph.part(edge, stage, part)] = at
    over = Counter(ends.values())
    for at, made in enumerate(actions):
        yield int(made[:2] == ("F", stage))
        yield -over[at]


def _meetings(graph: Graph, lists: Sequence[Listed]) -> Iterator[Fault]:
    """Where seats of a stage do what they do together in another order, or differ in whole passes."""
    for stage, seats in graph.home.items():
        first, *rest = [list(_met(graph, lists[seat], stage)) for seat in seats]
        for seat, other in zip(seats[1:], rest, strict=True):
            for i, (one, two) in enumerate(zip_longest(first, other)):
                if one is None or two is None or one[1:] != two[1:]:
                    here = lists[seats[0]].show(one[0]) if one else "nothing"
                    there = lists[seat].show(two[0]) if two else "nothing"
                    apart = one is not None and two is not None and one[1] == two[1]
                    words = "only one of them has W right after it: make it so on both, or on none"
                    message = f"{here} is meeting {i} of stage {stage}, but on rank {seat} that is {there}: "
                    message += words if apart else "its ranks must do these in the same order"
                    yield lists[seats[0]].fault("meeting", one[0] if one else -1, message)
                    break


def _met(graph: Graph, listed: Listed, stage: str) -> Iterator[tuple[int, Action, bool]]:
    """Places and actions of a list that are meetings of a stage, and whether a B is one pass with its W."""
    for at, made in enumerate(listed.actions):
        if made.unit == stage and graph.meeting(made):
            after = listed.actions[at + 1 : at + 2]
            yield at, made, made.op == "B" and after == (made._replace(op="W"),)


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
    """An order in which everything can happen, or the part of it that can, and where seats then stand.

    Every seat goes on until a WAIT for which another has not posted, or a meeting to which another has not
    come. A POST that is in no list stops nobody here: that it is missing is said elsewhere.
    """
    order: list[tuple[int, int]] = []
    waits = [_waits(graph, lists, listed) for listed in lists]
    over = [0] * len(lists)  # of these waits
    reached = [0] * len(lists)
    stuck: dict[int, Stuck] = {}
    behind: list[list[int]] = [[] for _ in lists]  # seats that wait for each

    def there(need: Stuck) -> bool:
        at = reached[need.post.rank]
        return need.post.at < at or (need.post.at == at and need.wait.action.op != "WAIT")

    ready = deque(range(len(lists)))
    while ready:
        rank = ready.popleft()
        start, reached[rank] = reached[rank], len(lists[rank].actions)
        stuck.pop(rank, None)
        while over[rank] < len(waits[rank]):
            wait = waits[rank][over[rank]]
            if not there(wait):
                stuck[rank], reached[rank] = wait, wait.wait.at
                behind[wait.post.rank].append(rank)
                break
            over[rank] += 1
        order += zip(repeat(rank), range(start, reached[rank]), strict=False)
        ready += [other for other in behind[rank] if there(stuck[other])]
        behind[rank] = [other for other in behind[rank] if not there(stuck[other])]
    return order, stuck


def _waits(graph: Graph, lists: Sequence[Listed], listed: Listed) -> list[Stuck]:
    """Each WAIT of a list with the POSTs, and each meeting with the like, of other seats that have them."""
    parties = {edge: graph.party(edge) for edge in graph.edges}
    found: list[Stuck] = []
    count: Counter[Action] = Counter()
    for at, made in enumerate(listed.actions):
        wait = made.op == "WAIT"
        seats = parties.get(made.edge, ()) if wait else graph.meeting(made)
        here = Place(listed.rank, at, made)
        for other in seats if listed.rank in seats else ():
            need = Action("POST", *made[1:]) if wait else made
            places = lists[other].places.get(need, [])
            turn = 0 if wait else count[made]
            if other != listed.rank and turn < len(places):
                found.append(Stuck(here, Place(other, places[turn], need)))
        count[made] += 1
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
        place = lists[post.rank].place
        made, read = _maker(graph, post), _reader(graph, wait)
        if post.action.op == "POST" and (made is None or place.get(made, post.at) < wait.at):
            return f"on rank {post.rank}, move {post} before {wait}"
        if wait.action.op == "WAIT" and (read is None or place.get(read, -1) > post.at):
            return f"on rank {post.rank}, move {wait} after {post}"
    if all(stuck.wait.action.op not in ("WAIT", "STEP") for stuck in cycle):
        return "ranks do these together: put them in the same order on all"
    return "each makes too late what the next one needs: reorder F and B"


def _maker(graph: Graph, post: Place) -> Action | None:
    """What makes the value that is sent; None at an end that only receives."""
    return _user(graph, post, post.action.back)


def _reader(graph: Graph, wait: Place) -> Action | None:
    """What reads the value that is received; None at an end that only sends."""
    return _user(graph, wait, not wait.action.back)


def _user(graph: Graph, place: Place, target: bool) -> Action | None:
    """The pass at one end of a transfer, if that end is there."""
    made = place.action
    stage = made.target if target else made.unit
    if not made.target or place.rank not in graph.home[stage]:
        return None
    return Action("B" if made.back else "F", stage, graph.part(made.edge, stage, made.microbatch))
