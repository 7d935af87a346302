"""Timelines in the trace event format of Chrome, which ui.perfetto.dev opens."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from weft.plan.schedule import Action
from weft.plan.timeline import STREAMS, Span, Timeline

Event = dict[str, Any]
_MICRO = 1e6


def perfetto(timelines: Mapping[str, Timeline]) -> dict[str, list[Event]]:
    """What ``json.dump`` writes: a process per timeline, a track per rank and stream, arrows for transfers.

    Spans of one stream that overlap get tracks of their own, as those of one track must not. Each timeline
    starts at 0; what is live on a rank is a counter.
    """
    events: list[Event] = []
    for process, (name, line) in enumerate(timelines.items(), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        for event in _events(line.shifted(-line.start)):
            events.append({**event, "pid": process})
            if "id" in event:  # arrows of different timelines are different
                events[-1]["id"] = f"{name} {event['id']}"
    return {"traceEvents": events}


def _events(line: Timeline) -> Iterator[Event]:
    senders: dict[Action, int] = {}  # the first rank of each transfer; arrows go to those that only receive
    for span in line.spans:
        if span.stream == "send":
            senders[span.action] = min(span.rank, senders.get(span.action, span.rank))
    came = {span.action for span in line.spans if span.stream == "receive"}
    for track, (name, spans) in enumerate(_tracks(line)):
        yield {"ph": "M", "name": "thread_name", "tid": track, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "tid": track, "args": {"sort_index": track}}
        for rank, stream, action, start, end in spans:
            at = {"name": str(action), "tid": track, "ts": start * _MICRO}
            facts = {"unit": action.unit, "microbatch": action.microbatch}
            yield {**at, "ph": "X", "cat": action.op, "dur": (end - start) * _MICRO, "args": facts}
            if action in came and (stream == "receive" or senders.get(action) == rank):
                arrow = {"ph": "s"} if stream == "send" else {"ph": "f", "bp": "e"}
                yield {**at, **arrow, "cat": "transfer", "id": str(action)}
    for rank, levels in line.live().items():
        for time, value in levels:
            yield {"ph": "C", "name": f"live, rank {rank}", "ts": time * _MICRO, "args": {"live": value}}


def _tracks(line: Timeline) -> Iterator[tuple[str, list[Span]]]:
    """Names and spans of all tracks, by rank and stream; within a track no two spans overlap."""
    groups: defaultdict[tuple[int, str], list[Span]] = defaultdict(list)
    for span in line.spans:
        groups[span.rank, span.stream].append(span)
    order = {name: place for place, name in enumerate(STREAMS)}
    for rank, stream in sorted(groups, key=lambda key: (key[0], order.get(key[1], len(order)), key[1])):
        tracks: list[list[Span]] = []
        for span in sorted(groups[rank, stream], key=lambda span: span.start):
            free = next((track for track in tracks if track[-1].end <= span.start), None)
            if free is None:
                tracks.append([span])
            else:
                free.append(span)
        for count, track in enumerate(tracks):
            yield f"rank {rank} {stream}{f' {count + 1}' * (count > 0)}", track
