"""What a run would be: every value with its origin, and what its model costs."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from weft.config.load import to_dict
from weft.config.resolve import Resolved, leaves
from weft.config.text import dump_value
from weft.plan.layout import Plan
from weft.plan.show import summary
from weft.plan.table import Table, as_text, bytes_words
from weft.spec.count import count, mean_context, state_bytes, training_flops_per_token
from weft.spec.run import RunConfig

Row = tuple[str, ...]


def show_run(resolved: Resolved[RunConfig], plan: Plan) -> None:
    """Print values, costs and the plan."""
    values = [(path, dump_value(v), resolved.origins[path]) for path, v in leaves(to_dict(resolved.config))]
    show_tables(
        [
            Table("", ("setting", "value", "from"), tuple(values)),
            Table("", ("cost", "value"), tuple(costs(resolved.config))),
            replace(summary(resolved.config, plan), head=("plan", "value")),
        ]
    )


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables: with colour on a terminal, as aligned text without heads elsewhere."""
    if not sys.stdout.isatty():
        sys.stdout.write(as_text(tables))
        return
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(markup=False, highlight=False)
    for i, table in enumerate(tables):
        grid = Grid(*table.head, box=None, pad_edge=False, header_style="bold", show_header=any(table.head))
        for line, row in enumerate(table.rows):
            faint = "dim" if row[-1] == "default" else ""
            grid.add_row(*row, style=_COLOURS[line % len(_COLOURS)] if table.picture else faint)
        console.print(*([""] if i else []), *([table.title] if table.title else []), grid, sep="\n")


_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")  # of the lines of a picture


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
        (
            "weights, gradients, moments",
            f"{bytes_words(state_bytes(model, train.precision))} in {train.precision}",
        ),
    ]
    if counts.mtp:
        rows.insert(1, ("parameters without MTP", f"{counts.main:,}"))
    return rows
