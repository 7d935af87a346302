"""The part of the report that shows where each module lay."""

from html import escape

from weft.train.record import Record
from weft.train.units import printable


def plan_section(record: Record) -> str:
    """Heading and table; empty for a run whose summary has no plan."""
    plan = record.summary.get("plan") or {}
    head, rows = plan.get("head") or [], plan.get("rows") or []
    if not rows:
        return ""
    used = [at for at in range(len(head)) if any(str(row[at]) for row in rows)]  # columns that say something
    names = "".join(f"<th>{_html(head[at])}</th>" for at in used)
    lines = "".join("<tr>" + "".join(f"<td>{_html(row[at])}</td>" for at in used) + "</tr>" for row in rows)
    ranks = plan.get("ranks")
    note = f"<figcaption>On {_html(ranks)} rank{'s' * (ranks != 1)}.</figcaption>"
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<h2>Plan</h2><div class="card">{table}{note}</div>'


def _html(value: object) -> str:
    return escape(printable(str(value)))
