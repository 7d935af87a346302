"""Pictures of timelines: well-formed, true to the spans, and bounded in size."""

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict

import pytest

from weft.plan.gantt import svg
from weft.plan.perfetto import perfetto
from weft.plan.pipelines import SPLIT, compute
from weft.plan.placing import complete
from weft.plan.schedule import COMPUTE, Action, action
from weft.plan.simulate import simulate
from weft.plan.timeline import Span, Timeline

SECONDS = {
    "F": 1e-3,
    "B": 1e-3,
    "W": 1e-3,
    "STEP": 1e-3,
    "GATHER": 3e-4,
    "REDUCE": 3e-4,
    "OUT": 2e-4,
    "IN": 2e-4,
}


def line_of(kind, ranks, virtual, microbatches, slower=1.0, **settings):
    graph, lists = compute(kind, ranks, virtual, microbatches)
    schedule = complete(graph, lists, split=kind in SPLIT, **settings)
    return simulate(schedule, lambda done: slower * SECONDS[done.op], lambda post: 2e-4)


def test_every_box_has_its_place_title_and_number():
    line = line_of("interleaved", 2, 2, 4, level=3, gather="stage", resident=3)
    text = svg({"executed <1>": line.shifted(70.0), "simulated": line})
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    boxes = {}
    for box in root.iter(f"{space}rect"):
        title = box.find(f"{space}title")
        if title is not None and "rank" not in title.text:
            boxes[title.text.split()[0], box.get("x"), box.get("y")] = float(box.get("width"))
    seen = Counter(name for name, *_ in boxes)
    assert seen == Counter(str(span.action) for span in 2 * line.spans if span.end > span.start)
    first = next(span for span in line.spans if span.action == action("F(0,0)"))
    wide = (1200 - 62 - 14) / line.makespan
    x = f"{62 + wide * first.start:.1f}"
    assert [width for (name, at, _), width in boxes.items() if (name, at) == ("F(0,0)", x)] == pytest.approx(
        [wide * 1e-3 - 0.6] * 2, abs=0.06
    )
    numbers = [node.text for node in root.iter(f"{space}text") if re.fullmatch(r"\d+", node.text or "")]
    assert numbers.count("3") >= 2 * 2 * 2 * 2  # F and B of both stages, on both ranks, in both panels
    assert "executed &lt;1&gt;" in text
    assert "lighter: later stages" in text


def test_large_pictures_are_small_files():
    for ranks, microbatches in ((64, 64), (8, 400)):
        spans = [
            Span(rank, "compute", Action(op, str(rank), i), rank + i + part, rank + i + part + 0.3)
            for rank in range(ranks)
            for i in range(microbatches)
            for op, part in (("F", 0.0), ("B", 0.3), ("W", 0.6))
        ]
        line = Timeline(tuple(spans))
        text = svg({"executed": line, "simulated": line})
        ET.fromstring(text)
        assert len(text) < 2_000_000
        assert text.count("<path") > 2 * 3 * ranks


def test_nothing_and_moments():
    ET.fromstring(svg({"empty": Timeline(())}))
    ET.fromstring(svg({"moment": Timeline((Span(0, "compute", action("F(0,0)"), 5.0, 5.0),))}))


def test_trace_events():
    line = line_of("zbv", 3, 2, 6)
    trace = json.loads(json.dumps(perfetto({"executed": line.shifted(9.0), "simulated": line})))
    events = trace["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["executed", "simulated"]
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == 2 * len(line.spans)
    busy = sum(e["dur"] for e in slices if e["cat"] in COMPUTE and e["pid"] == 1)
    assert busy == pytest.approx(1e6 * sum(line.busy.values()))
    tracks = defaultdict(list)
    for e in slices:
        tracks[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    for spans in tracks.values():  # within a track nothing overlaps
        spans.sort()
        assert all(end <= start + 1e-6 for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    arrows = defaultdict(list)
    for e in events:
        if e["ph"] in "sf":
            arrows[e["id"]].append((e["ph"], e["pid"]))
    posts = sum(span.stream == "send" for span in line.spans)
    assert len(arrows) == 2 * posts
    assert all(
        sorted(ph for ph, _ in ends) == ["f", "s"] and len(dict(ends)) == 2 for ends in arrows.values()
    )
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} >= {
        "rank 0 compute",
        "rank 2 send",
    }
