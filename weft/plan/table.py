"""Tables of text: what verbs print."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows under a title and a head, which may be empty; lines of a ``picture`` differ in colour."""

    title: str
    head: Row
    rows: tuple[Row, ...]
    picture: bool = False


def bytes_words(count: int) -> str:
    """``512 B``, ``1.5 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def as_text(tables: Sequence[Table]) -> str:
    """Aligned columns, one table after another; a table without a title has no head and no indent."""
    return "\n\n".join("\n".join(_lines(table)) for table in tables) + "\n"


def _lines(table: Table) -> Iterator[str]:
    rows, indent = list(table.rows), ""
    if table.title:
        yield table.title
        rows, indent = [table.head] * any(table.head) + rows, "  "
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(table.head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield (indent + "  ".join(cells)).rstrip()
