"""A slow readable twin: runs lists by trying every rank in turn until nothing moves."""

from collections import Counter

from weft.plan.schedule import COMPUTE, Action


def needs(graph, done):
    """Computations of which this one uses results."""
    made = [Action("F", done.unit, done.microbatch)] if done.op == "B" else []
    made += [Action("B", done.unit, done.microbatch)] if done.op == "W" else []
    for source, target in graph.edges:
        if done.op == "F" and target == done.unit:
            made.append(Action("F", source, done.microbatch))
        if done.op == "B" and source == done.unit:
            made.append(Action("B", target, done.microbatch))
    return made


def run(graph, lists):
    """Computations in an order that they can have, up to a deadlock."""
    over, at, moved = [], [0] * len(lists), True
    known = set()
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions) and known.issuperset(needs(graph, actions[at[rank]])):
                over.append(actions[at[rank]])
                known.add(over[-1])
                at[rank] += 1
                moved = True
    return over


def makespan(graph, lists, cost=lambda _: 1.0, whole=False):
    """Time of these computations; ``whole``: a B and the W after it end together."""
    free, over = Counter(), {}
    after = dict(pair for actions in lists for pair in zip(actions, actions[1:], strict=False))
    for done in run(graph, lists):
        rank = graph.home[done.unit][0]
        start = max([free[rank], *(over[need] for need in needs(graph, done) if need.unit != done.unit)])
        free[rank] = over[done] = start + cost(done)
        if whole and done.op == "B" and after.get(done) == done._replace(op="W"):
            over[done] += cost(after[done])
    return max(free.values(), default=0)


def follow(schedule):
    """Runs complete lists with rendezvous; what each rank has left when nothing moves, and what was wrong.

    A WAIT goes on once both ends have posted. Channels must be first in, first out at both ends.
    """
    graph, lists = schedule.graph, schedule.lists
    at, posted, over, wrong, moved = [0] * len(lists), Counter(), set(), [], True
    channels = {}
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions):
                done = actions[at[rank]]
                if done.op == "WAIT" and posted[done._replace(op="POST")] < 2:
                    break
                if done.op == "POST":
                    posted[done] += 1
                    channels.setdefault((done.edge, done.back), {}).setdefault(rank, []).append(
                        done.microbatch
                    )
                    maker = Action("B", done.target) if done.back else Action("F", done.unit)
                    maker = maker._replace(microbatch=done.microbatch)
                    if graph.home[maker.unit] == (rank,) and maker not in over:
                        wrong.append(f"{done} before {maker}")
                if done.op in COMPUTE:
                    wrong += missing(graph, rank, done, over, lists[rank][: at[rank]])
                    over.add(done)
                at[rank] += 1
                moved = True
    wrong += [str(channel) for channel, ends in channels.items() if len({*map(tuple, ends.values())}) > 1]
    left = [actions[index:] for actions, index in zip(lists, at, strict=True)]
    return [each for each in left if each], wrong


def missing(graph, rank, done, over, before):
    """What this computation needs and does not have on its rank."""
    for need in needs(graph, done):
        if graph.home[need.unit] == (rank,):
            if need not in over:
                yield f"{need} before {done}"
            continue
        ends = (done.unit, need.unit) if done.op == "B" else (need.unit, done.unit)
        wait = Action("WAIT", ends[0], done.microbatch, ends[1], done.op == "B")
        if wait not in before:
            yield f"{wait} before {done}"


def live_peak(actions):
    """Most forward passes kept at once."""
    live, most = 0, 0
    for done in actions:
        live += (done.op in ("F", "IN")) - (done.op in ("W", "OUT"))
        most = max(most, live)
    return most
