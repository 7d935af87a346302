"""Numbers as people read them, the same on the terminal and in the report."""

import math


def short(value: float) -> str:
    """Three digits and a suffix: 1234567 is ``1.23M``, 999.6 is ``1.00k``, 0.0012 is ``0.0012``."""
    if not math.isfinite(value):
        return str(value)
    for power, suffix in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power * 0.9995:
            scaled = value / 10**power
            digits = max(0, 2 - math.floor(math.log10(abs(scaled) * 1.0005)))
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """``8.4 s``, ``4 min 12 s``, ``3 h 05 min``, ``2 d 04 h``."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def compared(value: float, baseline: float) -> str:
    """``value`` against ``baseline`` in words: ``21.3% lower``, ``4.0% higher``, ``equal``."""
    percent = 100.0 * (value / baseline - 1.0)
    if abs(percent) < 0.05:
        return "equal"
    return f"{abs(percent):.1f}% {'lower' if percent < 0 else 'higher'}"


def printable(text: str) -> str:
    """Text of a model without characters that steer a terminal; line ends and tabs stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


BASELINES = {"unigram": "unigram model", "zlib": "zlib -9", "lzma": "lzma -9e"}
