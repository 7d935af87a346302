"""A schedule played through with given costs: seats, their streams and the links between them.

Each seat (called rank, as in timelines) goes through its list. F, B, W take time of their own; POST, GATHER,
REDUCE, OUT and IN only launch something that runs beside them; WAIT, STEP and the use of what is not there
yet block, and so do passes that several seats begin together. All ranks that can go on lie in one heap by
time, so that transfers meet on a shared link in the order in which they become ready, and when a transfer
begins its end is known.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import NamedTuple

from weft.plan.schedule import Action, Schedule
from weft.plan.timeline import Span, Timeline, stream_of

Seconds = Callable[[Action], float]


class Channel(NamedTuple):
    """One direction of one edge, first in first out: the link of a transfer if nothing else is said."""

    source: str
    target: str
    back: bool


def channel(post: Action) -> Channel:
    """The channel of a POST or WAIT."""
    return Channel(post.unit, post.target, post.back)


def simulate(
    schedule: Schedule,
    cost: Seconds,
    transfer: Seconds = lambda post: 0.0,
    link: Callable[[Action], Hashable] = channel,
) -> Timeline:
    """When everything runs.

    Args:
        schedule: lists of all seats.
        cost: seconds of F, B, W, GATHER, REDUCE, OUT, IN and STEP; of B and W each, also where they run
            as one.
        transfer: seconds that the transfer of a POST takes, from when all its seats have posted it and its
            link is free.
        link: name of the link of a POST; transfers with the same name follow each other.

    Raises:
        ValueError: it does not come to an end (says what each rank waits for), or the seats of a channel
            post different microbatches.
    """
    return _Run(schedule, cost, transfer, link).timeline()


class _Run:
    """The state of a simulation; times are seconds since its start."""

    def __init__(
        self, schedule: Schedule, cost: Seconds, transfer: Seconds, link: Callable[[Action], Hashable]
    ) -> None:
        self.schedule, self.cost, self.transfer, self.link = schedule, cost, transfer, link
        self.lists = schedule.lists
        self.place = [0] * len(self.lists)  # of the next action of each rank
        self.ready = [(0.0, rank) for rank in range(len(self.lists))]  # heap: when a rank goes on
        self.spans: list[list[Span]] = [[] for _ in self.lists]
        self.links: defaultdict[Hashable, float] = defaultdict(float)  # when each link is next free
        self.streams: defaultdict[tuple[int, str], float] = defaultdict(
            float
        )  # when each stream is next free
        self.there: dict[tuple[int, str, str, int], float] = {}  # when a GATHER, OUT or IN is over
        self.orders: defaultdict[Channel, list[tuple[Action, int]]] = defaultdict(list)  # and who came first
        self.count: defaultdict[tuple[Channel, int], int] = defaultdict(int)  # posted by each rank
        self.posted: defaultdict[Action, dict[int, int]] = defaultdict(dict)  # the span on each rank
        self.arrives: dict[Action, float] = {}  # end of each transfer that all have posted
        self.blocked: defaultdict[Action, list[tuple[float, int]]] = defaultdict(list)  # ranks in a WAIT
        self.meeting: defaultdict[Action, dict[int, float]] = defaultdict(dict)  # when each rank came
        self.stepping: dict[int, float] = {}  # when each rank came to STEP

    def timeline(self) -> Timeline:
        while self.ready:
            now, rank = heapq.heappop(self.ready)
            while self.place[rank] < len(self.lists[rank]):
                done = self.lists[rank][self.place[rank]]
                self.place[rank] += 1
                until = self._do(rank, done, now)
                if until is None:
                    break
                if until > now:
                    heapq.heappush(self.ready, (until, rank))
                    break
        if waits := self._waits():
            raise ValueError(f"the schedule cannot go on: {'; '.join(waits)}")
        return Timeline(tuple(span for spans in self.spans for span in spans))

    def _do(self, rank: int, done: Action, now: float) -> float | None:
        """Start an action; when the rank goes on, or None if somebody else will say so."""
        match done.op:
            case "F" | "B" | "W":
                seats = self.schedule.graph.meeting(done)
                return self._meet(seats, rank, done, now) if seats else self._compute(rank, done, now)
            case "POST":
                self._post(rank, done, now)
            case "WAIT":
                if done not in self.arrives:
                    self.blocked[done].append((now, rank))
                    return None
                return self._span(rank, done, now, max(now, self.arrives[done]))
            case "STEP":
                return self._step(rank, done, now)
            case "FREE":
                self._span(rank, done, now, now)
            case _:
                self._launch(rank, done, now)
        return now

    def _span(self, rank: int, done: Action, start: float, end: float, receives: bool = False) -> float:
        self.spans[rank].append(Span(rank, stream_of(done, receives), done, start, end))
        return end

    def _meet(self, seats: tuple[int, ...], rank: int, done: Action, now: float) -> None:
        """What all these ranks do together, once the last of them comes."""
        came = self.meeting[done]
        came[rank] = now
        if len(came) == len(seats):
            start = max(self.meeting.pop(done).values())
            for each in seats:
                heapq.heappush(self.ready, (self._compute(each, done, start), each))

    def _compute(self, rank: int, done: Action, now: float) -> float:
        op, unit, index = done.op, done.unit, done.microbatch
        if op == "W":
            before = self.lists[rank][self.place[rank] - 2] if self.place[rank] > 1 else None
            joined = before == done._replace(op="B")
            return self._span(rank, done, now, now if joined else now + self.cost(done))
        start = max(now, self.there.get((rank, "GATHER", unit, -1), now))
        seconds = self.cost(done)
        if op == "B":
            start = max(start, self.there.get((rank, "IN", unit, index), now))
            weights, place = done._replace(op="W"), self.place[rank]
            if place < len(self.lists[rank]) and self.lists[rank][place] == weights:
                seconds += self.cost(weights)
        return self._span(rank, done, start, start + seconds)

    def _launch(self, rank: int, done: Action, now: float) -> None:
        """What runs on a stream of its own; an IN follows its OUT."""
        stream = (rank, stream_of(done))
        start = max(now, self.streams[stream])
        if done.op == "IN":
            start = max(start, self.there.get((rank, "OUT", done.unit, done.microbatch), start))
        end = self._span(rank, done, start, start + self.cost(done))
        self.streams[stream] = self.there[rank, done.op, done.unit, done.microbatch] = end

    def _post(self, rank: int, done: Action, now: float) -> None:
        """The last rank to post starts the transfer, and thereby says when it is over."""
        graph = self.schedule.graph
        order, turn = self.orders[channel(done)], self.count[channel(done), rank]
        self.count[channel(done), rank] += 1
        if turn == len(order):
            order.append((done, rank))
        theirs, other = order[turn]
        if theirs != done:
            raise ValueError(
                f"rank {rank} has {done} where rank {other} has {theirs}: both must be in one order"
            )
        source = graph.home[done.target if done.back else done.unit]
        self._span(rank, done, now, now, receives=rank not in source)
        ends = self.posted[done]
        ends[rank] = len(self.spans[rank]) - 1
        if len(ends) < len(graph.party(done.edge)):
            return
        link, wait = self.link(done), done._replace(op="WAIT")
        start = max(now, self.links[link])
        self.links[link] = self.arrives[wait] = end = start + self.transfer(done)
        for at, index in ends.items():
            self.spans[at][index] = self.spans[at][index]._replace(start=start, end=end)
        for since, sleeper in self.blocked.pop(wait, ()):
            self._span(sleeper, wait, since, end)
            heapq.heappush(self.ready, (end, sleeper))

    def _step(self, rank: int, done: Action, now: float) -> None:
        """A barrier of all ranks, each after its last REDUCE."""
        self.stepping[rank] = max(now, self.streams[rank, "store"])
        if len(self.stepping) < len(self.lists):
            return
        start = max(self.stepping.values())
        for each in self.stepping:
            end = self._span(each, done, start, start + self.cost(done))
            heapq.heappush(self.ready, (end, each))
        self.stepping = {}

    def _waits(self) -> list[str]:
        """What each rank that has not come to its end waits for."""
        found = dict.fromkeys(self.stepping, "STEP, which not all ranks reach")
        for action, sleepers in self.blocked.items():
            party, posted = self.schedule.graph.party(action.edge), self.posted[action._replace(op="POST")]
            for _, rank in sleepers:
                lacking = sorted(set(party) - posted.keys(), key=lambda seat: (seat != rank, seat))
                found[rank] = f"{action}, which rank {' and rank '.join(map(str, lacking))} has not posted"
        for action, came in self.meeting.items():
            found |= dict.fromkeys(came, f"{action}, to which not all its ranks come")
        return [f"rank {rank} waits in {words}" for rank, words in sorted(found.items())]


def bubble_formula(kind: str, ranks: int, virtual: int, microbatches: int) -> float | None:
    """The bubble share with F = B = W on all stages, free transfers and one STEP for all; None if not known.

    With p ranks, v stages on each and m microbatches: ``gpipe``, ``1f1b`` and (m a multiple of p)
    ``interleaved`` (p-1)/(v*m+p-1), Narayanan et al., arXiv 2104.04473; ``zero_bubble`` (m >= p) and ``zbv``
    (m >= 2p-1) (p-1)/(3*v*m+p-1), Qi et al., arXiv 2401.10241: what is lost is the p-1 forward passes before
    the last rank begins, which no list avoids. (For ``zbv`` they count 0, as there each rank steps alone.)
    """
    holds = {
        "gpipe": True,
        "1f1b": True,
        "interleaved": microbatches % ranks == 0,
        "zero_bubble": microbatches >= ranks,
        "zbv": microbatches >= 2 * ranks - 1,
    }
    passes = 3 if kind in ("zero_bubble", "zbv") else 1
    return (ranks - 1) / (passes * virtual * microbatches + ranks - 1) if holds.get(kind) else None
