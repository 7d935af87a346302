"""What a run would be: every value with its origin, and what its model costs."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from weft.config.load import to_dict
from weft.config.resolve import Resolved, leaves
from weft.config.text import dump_value
from weft.spec.count import count, mean_context, state_bytes, training_flops_per_token
from weft.spec.run import RunConfig

Row = tuple[str, ...]


def show_run(resolved: Resolved[RunConfig]) -> None:
    """Print values and costs: tables on a terminal, aligned lines without colour elsewhere."""
    console = Console(markup=False, highlight=False)
    values = [(path, dump_value(v), resolved.origins[path]) for path, v in leaves(to_dict(resolved.config))]
    _table(("setting", "value", "from"), values, console)
    console.print()
    _table(("cost", "value"), costs(resolved.config), console)


def costs(config: RunConfig) -> list[Row]:
    """Name and value of everything that the spec alone can say about the size of a run."""
    model, train = config.model, config.train
    counts = count(model)
    context = mean_context((config.data.seq_length,))
    flops = training_flops_per_token(model, context)
    tokens = train.global_batch_size * config.data.seq_length
    rows = [
        ("parameters", f"{counts.total:,}"),
        ("active parameters", f"{counts.active:,}"),
        ("training FLOPs per token", f"{flops:.4g} ({context:g} keys per token on average)"),
        ("tokens per step", f"{tokens:,}"),
        ("tokens of the run", f"{tokens * train.train_iters:,}"),
        ("training FLOPs of the run", f"{flops * tokens * train.train_iters:.4g}"),
        ("weights, gradients, moments", f"{_size(state_bytes(model, train.precision))} in {train.precision}"),
    ]
    if counts.mtp:
        rows.insert(1, ("parameters without MTP", f"{counts.main:,}"))
    return rows


def _size(count_of_bytes: int) -> str:
    size = float(count_of_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _table(head: Row, rows: Sequence[Row], console: Console) -> None:
    if not console.is_terminal:
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            console.file.write("  ".join(cells).rstrip() + "\n")
        return
    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row, style="dim" if row[-1] == "default" else "")
    console.print(table)
