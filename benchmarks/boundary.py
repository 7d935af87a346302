"""Writes docs/boundary.md: bytes between encoder and decoder in three ways, for published configurations.

python benchmarks/boundary.py
"""

from pathlib import Path

from weft.plan.runs import Holding, Run
from weft.plan.table import Table
from weft.plan.traffic import Axes, Boundary, compared

OUT = Path(__file__).parents[1] / "docs" / "boundary.md"
K = 1024
# Name; encoder; decoder; tokens of a sequence; part of them that are images; width of the decoder.
CASES = [
    ("1B + 7B, 64K", Axes(dp=32), Axes(2, 8, 1, 2), 64 * K, 0.75, 4096),
    ("1B + 7B, 128K", Axes(dp=64), Axes(2, 16, 1, 2), 128 * K, 0.5, 4096),
    ("1B + 7B, 32K", Axes(dp=16), Axes(2, 4, 1, 2), 32 * K, 0.75, 4096),
    ("1B + 14B, 64K", Axes(tp=2, dp=16), Axes(4, 4, 1, 2), 64 * K, 0.75, 5120),
    ("3B + 70B, 8K", Axes(dp=256), Axes(8, 1, 2, 16), 8 * K, 0.75, 8192),
    ("6B + 120B, 8K", Axes(tp=2, dp=128), Axes(8, 1, 4, 8), 8 * K, 0.5, 8192),
    ("6B + 120B, 16K, apart", Axes(tp=2, dp=4), Axes(8, 2, 4, 4, 8), 16 * K, 0.75, 8192),
    ("3 replicas to 2, apart", Axes(dp=3), Axes(2, 2, 1, 2, 3), 16 * K, 0.75, 4096),
    ("encoder cp=2 pp=2, apart", Axes(cp=2, pp=2, dp=2), Axes(2, 2, 2, 1, 8), 16 * K, 0.75, 4096),
]
ABOUT = """# Bytes between encoder and decoder

Written by `python benchmarks/boundary.py`. Layouts are tp/cp/pp/dp; "apart" is on ranks of its own,
everything else on shared ranks. Images of 1,024 rows are spread evenly over each sequence; elements are
bf16. The first seven configurations are published ones of heterogeneous training (arXiv 2605.27678), with
the widths of the decoder that their sizes usually have. Bytes are counted here, times are not measured.

- **B**: rows of encoder output in one microbatch of one decoder replica, in bytes. All other columns count
  what ranks receive in one microbatch of all decoder replicas: by all of them together, and (**rank**) by
  the one that receives most.
- **leader**: one rank of each encoder replica sends, one of each decoder replica receives all and
  broadcasts it to its stage. Gradients are summed over context-parallel ranks at that one, go back to one
  rank of the encoder replica, and are broadcast there.
- **gather**: every rank of a decoder replica gathers the rows of all its encoder replicas, in every stage.
  On the way back it needs nothing, as tensor parallelism has gathered all gradients on all ranks before,
  which is not counted. A formula only: the system that does it has no context parallelism here and, in its
  released form, no pipelines.
- **direct**: counted on the compiled route: a row goes from the rank that has it to the rank that consumes
  it, unless that is the same. No way of bringing every row where it is consumed takes fewer bytes, and the
  ledger of executed routes shows the same numbers (`tests/plan/test_traffic.py`).
- **-**: that way does not exist for these layouts.

What this does not show: with one rank per encoder replica its rows have to leave it in any case, so between
nodes the first hop is the same in all three ways; and these bytes are a small part of a step except in long
context. They cost memory, above all: the column **rank** is what a rank of the decoder must have room for.

"""


def images(tokens: int, part: float) -> Holding:
    """Images of 1,024 rows, evenly spread, so many that they are a part of all tokens."""
    number = int(tokens * part) // 1024
    return tuple(Run(tokens * i // number, 1024) for i in range(number))


def markdown(table: Table) -> str:
    """As a table of Markdown."""
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def boundaries() -> list[Boundary]:
    """The configurations."""
    return [
        Boundary(name, encoder, decoder, tokens, images(tokens, part), 2 * width)
        for name, encoder, decoder, tokens, part, width in CASES
    ]


def main() -> None:
    """Count, print, write."""
    tables = [compared(boundaries(), way) for way in ("forward", "backward")]
    text = ABOUT + "\n".join(f"## {table.title}\n\n{markdown(table)}" for table in tables)
    print(text)
    OUT.write_text(text)


if __name__ == "__main__":
    main()
