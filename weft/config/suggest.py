"""Nearest known names, for messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """At most three known names like ``name``, best first: alike by letters, else one inside the other."""
    names = list(known)
    likeness = {k: difflib.SequenceMatcher(None, name.lower(), k.lower()).ratio() for k in names}
    best = max(likeness.values(), default=0.0)
    alike = [k for k in names if likeness[k] >= max(0.6, best - 0.05)]
    inside = [k for k in names if min(len(k), len(name)) > 2 and (k in name or name in k)]
    return sorted(alike or inside, key=lambda k: -likeness[k])[:3]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean a or b?``, or nothing when no known name is near."""
    names = nearest(name, known)
    return f"; did you mean {' or '.join(names)}?" if names else ""
