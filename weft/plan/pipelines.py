"""In which order each pipeline rank computes: lists of F, B and W for every kind of pipeline.

Everything else (transfers, gathers, reductions, offload) is placed around these lists by ``placing``.

    gpipe         every F, then every B                                               one stage per rank
    1f1b          forward passes until the first gradient comes, then F, B, F, B      one stage per rank
    interleaved   the same with several stages per rank, stage s on rank s % ranks    arXiv 2104.04473
    zbv           rank r has stages r and 2 ranks - 1 - r; B and W apart              arXiv 2401.10241
    zero_bubble   1f1b or interleaved, with W where the rank would be idle            arXiv 2401.10241
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Literal, NamedTuple, get_args

from weft.config.errors import ConfigError, Problem
from weft.plan.schedule import Action, Cost, Graph, Lists, Op, action

Kind = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
KINDS: tuple[str, ...] = get_args(Kind)
SPLIT = ("zero_bubble", "zbv")
"""Kinds that count on gradients being sent right after B, also where W follows directly."""


class _Word(NamedTuple):
    """An action whose microbatch is the next one of its stage."""

    op: Op
    stage: int


def compute(
    kind: str, ranks: int, virtual: int, microbatches: int, cost: Cost | None = None
) -> tuple[Graph, Lists]:
    """The stages of a pipeline and what each of its ranks computes, in order.

    Args:
        kind: one of ``KINDS``.
        ranks: pipeline ranks.
        virtual: stages per rank; 1 for gpipe and 1f1b, 2 for zbv.
        microbatches: of a step, any number.
        cost: of F, B and W of each stage (in any unit); zero_bubble is built for it, the others do not
            depend on it. All equal if not given.

    Raises:
        ValueError: a number that the kind does not have.
    """
    stages = {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(kind, max(virtual, 1))
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of pipeline; use one of {', '.join(KINDS)}")
    if virtual != stages:
        raise ValueError(f"{kind} has {stages} stage(s) per rank, not {virtual}; set virtual = {stages}")
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"{ranks} ranks and {microbatches} microbatches: both must be at least 1")
    if kind == "zbv":
        graph = Graph.chain([*range(ranks), *reversed(range(ranks))])
        return graph, tuple(_zbv(rank, ranks, microbatches) for rank in range(ranks))
    graph = Graph.chain(rank for _ in range(virtual) for rank in range(ranks))
    lists = tuple(_alternating(kind, rank, ranks, virtual, microbatches) for rank in range(ranks))
    return graph, _fill(graph, lists, cost or (lambda _: 1.0)) if kind == "zero_bubble" else lists


def _numbered(words: Iterable[_Word], microbatches: int) -> tuple[Action, ...]:
    """Each stage takes its microbatches in ascending order; those that do not exist are left out."""
    count: Counter[_Word] = Counter()
    actions: list[Action] = []
    for word in words:
        if count[word] < microbatches:
            actions.append(Action(word.op, str(word.stage), count[word]))
        count[word] += 1
    return tuple(actions)


def _alternating(kind: str, rank: int, ranks: int, virtual: int, microbatches: int) -> tuple[Action, ...]:
    """Some forward passes ahead, then one forward and one backward pass in turn.

    With several stages a rank takes its stages in turn, a round of microbatches each. Rounds have at least
    as many microbatches as there are ranks (so that a round is back from the other ranks when its next stage
    begins) unless there are fewer; the first ones take what does not divide.
    """
    rounds = max(1, microbatches // ranks)
    sizes = [microbatches // rounds + (index < microbatches % rounds) for index in range(rounds)]
    stages = range(rank, ranks * virtual, ranks)
    forward = [stage for size in sizes for stage in stages for _ in range(size)]
    backward = [stage for size in sizes for stage in reversed(stages) for _ in range(size)]
    behind = ranks - 1 - rank
    twice = kind == "interleaved" or virtual > 1
    ahead = microbatches if kind == "gpipe" else (virtual - 1) * sizes[0] + behind * (2 if twice else 1)
    ahead = min(ahead, len(forward))
    pairs = zip_longest(forward[ahead:], backward)
    steady = (
        [*([] if first is None else [_Word("F", first)]), _Word("B", second), _Word("W", second)]
        for first, second in pairs
    )
    return _numbered([*(_Word("F", stage) for stage in forward[:ahead]), *chain(*steady)], microbatches)


def _zbv(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    """The V of arXiv 2401.10241 section 6; short steps are long ones without the missing microbatches."""
    count = max(2 * ranks - 1, microbatches)
    behind = ranks - rank
    down, up = rank, 2 * ranks - 1 - rank
    names = {"f": _Word("F", down), "b": _Word("B", down), "w": _Word("W", down)}
    names |= {"F": _Word("F", up), "B": _Word("B", up), "W": _Word("W", up)}
    ahead = 2 * ranks - 1 - rank
    words = "f" * (2 * behind - 1) + "Ff" * rank + "FBW" * behind
    words += "fbwFBW" * (count - ahead) + "bwFBW" * (ahead - ranks)
    words += "bB" * rank + "bw" * behind + "W" * rank + "w" * rank
    return _numbered((names[word] for word in words), microbatches)


def _fill(graph: Graph, lists: Lists, cost: Cost) -> Lists:
    """The best of some ways to move F, B and W of these lists so that W fills what would be idle."""
    late = tuple(_late(actions, rank) for rank, actions in enumerate(lists))
    ways = [(1.0, False), (0.5, False), (1.0, True)]
    tries = [_Run(graph, lists, cost), _Run(graph, late, cost)]
    tries += [_Greedy(graph, lists, cost, *way) for way in ways]
    best = min(tries, key=lambda run: run.makespan())
    return tuple(tuple(actions) for actions in best.made)


def _late(actions: Iterable[Action], by: int) -> tuple[Action, ...]:
    """Every W this many B later than its own; in ZB-H1 of the paper rank r is r late."""
    queued: deque[Action] = deque()
    made: list[Action] = []
    for done in actions:
        if done.op == "W":
            queued.append(done)
        else:
            made.append(done)
        if done.op == "W" and len(queued) > by:
            made.append(queued.popleft())
    return (*made, *queued)


class _Run:
    """The lists in time: a rank begins its next action when what it needs is there; transfers take no time.

    Attributes:
        made: what each rank did, in order.
    """

    def __init__(self, graph: Graph, lists: Lists, cost: Cost) -> None:
        self.made: list[list[Action]] = [[] for _ in lists]
        self._left = [deque(actions) for actions in lists]
        self._cost = cost
        self._index = {stage: index for index, stage in enumerate(graph.home)}
        self._home = [seats[0] for seats in graph.home.values()]
        count = 1 + max(done.microbatch for actions in lists for done in actions)
        stages = range(len(self._home))
        # When each is over. The first F needs nothing; the last B needs only its F.
        self._over = {(op, stage): [float("inf")] * count for op in "FBW" for stage in stages}
        self._over["F", -1] = [0.0] * count
        self._over["B", len(stages)] = self._over["F", len(stages) - 1]

    def makespan(self) -> float:
        """Runs everything; returns when the last rank is through."""
        free = [0.0] * len(self.made)
        awake = [(0.0, rank) for rank in range(len(free))]
        while awake:
            now, rank = heapq.heappop(awake)
            done = self._next(rank, now) if free[rank] <= now else None
            if done is None:
                continue
            self.made[rank].append(done)
            stage = self._index[done.unit]
            free[rank] = self._over[done.op, stage][done.microbatch] = now + self._cost(done)
            reader = stage + {"F": 1, "B": -1, "W": 0}[done.op]
            readers = {rank, self._home[reader]} if 0 <= reader < len(self._home) else {rank}
            for other in readers:
                heapq.heappush(awake, (free[rank], other))
        return max(free)

    def _arrival(self, done: Action) -> float:
        """When an action could begin; infinite while that is not known."""
        stage = self._index[done.unit]
        row = {"F": ("F", stage - 1), "B": ("B", stage + 1), "W": ("B", stage)}[done.op]
        return self._over[row][done.microbatch]

    def _next(self, rank: int, now: float) -> Action | None:
        left = self._left[rank]
        return left.popleft() if left and self._arrival(left[0]) <= now else None


class _Greedy(_Run):
    """The same F in the same order and the same B, but whichever can run; W when neither can.

    No rank ever holds more microbatches between F and W than the fullest rank of the lists it starts from.
    As these lists run without a deadlock, so does this: their first action that is not done never waits.
    """

    def __init__(self, graph: Graph, lists: Lists, cost: Cost, patience: float, eager: bool) -> None:
        """``patience``: a W may delay the next F or B by this share of its cost; ``eager``: F before B."""
        super().__init__(graph, lists, cost)
        self._share, self._eager = 1 - patience, eager
        self._order = [{op: deque(a for a in actions if a.op == op) for op in "FB"} for actions in lists]
        self._queued: list[deque[Action]] = [deque() for _ in lists]
        self._live = [0] * len(lists)
        self._room = max(map(peak, lists))

    def _next(self, rank: int, now: float) -> Action | None:
        order, queued = self._order[rank], self._queued[rank]
        arrival = {op: self._arrival(order[op][0]) if order[op] else float("inf") for op in "FB"}
        if self._live[rank] == self._room:
            arrival["F"] = float("inf")
        for op in "FB" if self._eager else "BF":
            if arrival[op] <= now:
                done = order[op].popleft()
                self._live[rank] += op == "F"
                if op == "B":
                    queued.append(done._replace(op="W"))
                return done
        if queued and min(arrival.values()) - now >= self._share * self._cost(queued[0]):
            self._live[rank] -= 1
            return queued.popleft()
        return None


def peak(actions: Iterable[Action]) -> int:
    """Most microbatches of a rank's stages that are between their F and their W at once."""
    live = most = 0
    for done in actions:
        live += (done.op == "F") - (done.op == "W")
        most = max(most, live)
    return most


def parse_lists(text: str, where: str) -> Lists:
    """Lists from text: a line for each pipeline rank, actions apart by spaces; after ``#`` comments.

    Either all lines have only F, B and W, and ``placing.complete`` puts in the rest, or they are complete
    and run as they are.

    Args:
        text: the lines.
        where: the file, for messages.

    Raises:
        ConfigError: words that are not actions, or nothing at all.
    """
    lists: list[tuple[Action, ...]] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        actions: list[Action] = []
        for word in words:
            try:
                actions.append(action(word))
            except ValueError as error:
                problems.append(Problem(f"{where}, line {number}", f"{error}; correct the word"))
        if words:
            lists.append(tuple(actions))
    if not lists:
        problems.append(Problem(where, "has no actions; write a line for each pipeline rank"))
    if problems:
        raise ConfigError(problems)
    return tuple(lists)


def graph_of(lists: Sequence[Sequence[Action]]) -> Graph:
    """The chain of stages of these lists: a stage is where its forward passes are.

    Where lists name stages of encoders they are those of seats: the pipeline ranks are then the sets of seats
    that have the same stages of the decoder, counted by their lowest seats, and encoders are left out.

    Raises:
        ValueError: a stage on two ranks, a rank without stages, or names that are not 0, 1, ...
    """
    home: dict[str, tuple[int, ...]] = {}
    seats = names_encoders(lists)
    for rank, actions in enumerate(lists):
        stages = dict.fromkeys(done.unit for done in actions if done.op == "F")
        for stage in filter(str.isdecimal, stages) if seats else stages:
            home[stage] = (*home.get(stage, ()), rank)
            if len(home[stage]) > 1 and not seats:
                first, second = home[stage]
                raise ValueError(
                    f"stage {stage} has forward passes on pipeline ranks {first} and {second}; "
                    "put all of them on one"
                )
        if not stages:
            raise ValueError(f"pipeline rank {rank} has no F; give it at least one stage")
    missing = [str(stage) for stage in range(len(home)) if str(stage) not in home]
    if missing:
        raise ValueError(
            f"stages are {', '.join(home)}: name them 0 to {len(home) - 1} in the order of the model "
            f"({missing[0]} has no F)"
        )
    ranks = sorted(set(home.values()))
    return Graph.chain(ranks.index(home[str(stage)]) for stage in range(len(home)))


def names_encoders(lists: Sequence[Sequence[Action]]) -> bool:
    """Whether these are lists of seats that have stages of encoders (``vision_0``) beside the decoder's."""
    stages = {done.unit for actions in lists for done in actions if done.op == "F"}
    return any("_" in stage for stage in stages)
