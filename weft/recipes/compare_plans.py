"""One batch of a recipe under two plans, and where they part."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console

from weft.config.errors import RunError
from weft.data.batch import Batch
from weft.data.corpus import build_corpus
from weft.data.order import Loader
from weft.recipes.compare_verb import Side
from weft.spec.data import TokenizerConfig
from weft.spec.run import RunConfig
from weft.train.bisect import LIMITS, Fault, Tally, bisect
from weft.train.trace import Step, Trace, run_plan

SEQUENCES = 2  # at least; one per reader
SHOWN = {"losses": "forward"}  # phases shown under the name of another


def compare_plans(
    config: RunConfig, sides: tuple[Side, Side], precision: str, mock: bool, words: Sequence[str]
) -> tuple[int, list[str]]:
    """Print how far two plans lie apart, unit by unit.

    Args:
        config: the run; of its settings model, data, seed and ``train.loss_chunk`` count.
        sides: the plans A and B.
        precision: ``fp64`` or ``fp32``, of both.
        mock: random tokens in place of the run's data.
        words: recipe, files and overrides as the user gave them.

    Returns:
        The exit status (0 they agree, 1 they differ) and the commands that come next.

    Raises:
        RunError: the ranks of a plan do not meet.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    samples = _read(config, max(SEQUENCES, *(side.readers for side in sides)), mock, console)
    step = Step(config.model, samples, precision, config.run.seed, config.train.loss_chunk)
    for name, side in zip("AB", sides, strict=True):
        console.print(f"plan {name}: {side.text} ({side.ranks} rank{'s' if side.ranks > 1 else ''})")
    if any(side.plan.decoder.store.level for side in sides):
        console.print("the store is not part of this: it changes where parameters rest, not what is computed")
    tokens, limit = sum(len(sample.tokens) for sample in samples), LIMITS[precision]
    console.print(f"{len(samples)} samples, {tokens:,} tokens, {precision}\n")
    tallies, fault = bisect(_run(sides[0], step), _run(sides[1], step), precision)
    console.print("\n".join(_table(tallies)))
    if fault is None:
        console.print(f"\nthey agree: no tensor differs by more than {limit:g} of its largest value")
    else:
        console.print("\n".join(_verdict(fault, tallies)))
    return int(fault is not None), _following(
        words, sides, fault, [*["--mock"] * mock, "--precision", precision]
    )


class _NotTokenized(Exception):
    """Reading the data would take slow work first."""


def _read(config: RunConfig, count: int, mock: bool, console: Console) -> list[Batch]:
    """The first samples of the run's order; random tokens if asked for or if the data is not tokenized."""
    data, cache = config.data, config.cache
    random = replace(data, source="mock", blend="", tokenizer=TokenizerConfig())

    def refuse(line: str) -> None:
        raise _NotTokenized

    try:
        corpus = build_corpus(random if mock else data, config.model.vocab_size, cache, refuse)
    except _NotTokenized:
        console.print("random tokens: the data is not tokenized yet ('weft data build' does it)")
        corpus = build_corpus(random, config.model.vocab_size, cache)
    loader = Loader(corpus.splits["train"], data.seq_length, config.model.depths, config.run.seed)
    return [loader.microbatch(sample, 1) for sample in range(count)]


def _run(side: Side, step: Step) -> Trace:
    try:
        return run_plan(side.plan, side.ranks, step)
    except (RuntimeError, TimeoutError) as error:
        raise RunError(f"--plan {side.text!r} does not come to its end: {error}") from error


def _table(tallies: Sequence[Tally]) -> Iterator[str]:
    """The largest difference of each unit in each phase."""
    columns = list(dict.fromkeys(_shown(tally) for tally in tallies))
    units: dict[str, dict[str, Tally]] = {}
    for tally in tallies:
        row = units.setdefault(tally.unit, {})
        worst = row.get(_shown(tally), tally)
        row[_shown(tally)] = max(worst, tally, key=lambda t: (t.differs, t.difference))
    yield f"{'unit':<18}" + "".join(f"{column:>18}" for column in columns)
    for unit, row in units.items():
        yield f"{unit:<18}" + "".join(f"{_cell(row.get(column)):>18}" for column in columns)


def _shown(tally: Tally) -> str:
    return SHOWN.get(tally.phase, tally.phase)


def _cell(tally: Tally | None) -> str:
    if tally is None:
        return "-"
    return f"{'DIFFERS  ' if tally.differs else ''}{tally.difference:.1e}"


def _verdict(fault: Fault, tallies: Sequence[Tally]) -> Iterator[str]:
    """What differs first, with all tensors of its unit."""
    at, (top, bottom, left, right) = fault.at, fault.box
    yield f"\n{at.unit}, {_shown(at)}:"
    for tally in tallies:
        if (tally.phase, tally.unit) == (at.phase, at.unit):
            yield f"  {tally.tensor:<28}{tally.difference:>10.1e}  {'DIFFERS' if tally.differs else 'ok'}"
    names = [" and ".join(map(str, ranks)) or "none" for ranks in fault.ranks]
    ranks = " and ".join(map(str, fault.spread))
    yield f"\nthey differ, first in {_shown(at)}: {at.unit}, {at.tensor}, rank {ranks or 'none'} of plan B"
    yield f"  largest at row {fault.row}, column {fault.column}: A {fault.values[0]:.9g} (rank {names[0]}),"
    yield f"  B {fault.values[1]:.9g} (rank {names[1]}, rows {top} to {bottom}, columns {left} to {right})"
    if len(fault.spread) > 1:
        yield "  these ranks are off alike: one of them may have spoiled a sum for the others"
    if fault.before:
        before = f"{fault.before.unit} {fault.before.tensor}"
        yield f"  what comes before agrees; nearest is {before}, to {fault.before.difference:.1e}"
    if fault.unseen:
        unseen = ", ".join(" ".join(name) for name in fault.unseen)
        yield f"  in between, and of one plan only: {unseen}"


def _following(
    words: Sequence[str], sides: tuple[Side, Side], fault: Fault | None, given: list[str]
) -> list[str]:
    """Train with plan B; or compare its axes one by one; or, of one axis, compare fewer tokens."""
    side = sides[1]
    if fault is None:
        train = ["weft", "train", *words, *side.settings]
        if side.ranks > 1:
            train[:1] = ["torchrun", f"--nproc-per-node={side.ranks}", "-m", "weft"]
        return [shlex.join(train)]
    sizes = {axis: getattr(side.plan.decoder, axis) for axis in ("dp", "tp", "tp_embed")}
    plans = [f"decoder.{axis}={size}" for axis, size in sizes.items() if size > 1]
    compare = ["weft", "compare", *words, *given]
    if len(plans) > 1:
        return [shlex.join([*compare, "--plan", "one", "--plan", plan]) for plan in plans]
    return [shlex.join([*compare, "data.seq_length=16", "--plan", sides[0].text, "--plan", side.text])]
