"""``weft plan``: check a plan, show it, compare it with another, draw it, keep it."""

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from weft.config.errors import ConfigError
from weft.config.load import to_yaml
from weft.config.resolve import Resolved, located
from weft.plan.check import check_run, executable
from weft.plan.diff import diff, moved
from weft.plan.forecast import deadlock, drawn, forecast
from weft.plan.layout import Plan, plan_of_run
from weft.plan.show import show, summary
from weft.plan.table import Table, bytes_words
from weft.spec.run import RunConfig

PER_NODE = 8  # ranks that the suggested torchrun command starts on one machine


@dataclass(frozen=True)
class Report:
    """What the verb says.

    Attributes:
        tables: in order.
        notes: lines after them.
        next: commands to go on with.
    """

    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    next: tuple[str, ...]


def fitting_plan(
    resolved: Resolved[RunConfig],
    ranks: int,
    to_run: bool = False,
    words: str = "",
    picture: Path | None = None,
) -> Plan:
    """The plan of a run on so many ranks.

    Args:
        resolved: the run.
        ranks: of the run.
        to_run: this version must be able to run it too.
        words: recipe, files and overrides as on the command line, for the command that draws a deadlock.
        picture: where to draw it instead.

    Raises:
        ConfigError: every reason why it does not fit, each with what set the value.
    """
    run = resolved.config
    problems = check_run(run, ranks)
    if not problems:
        plan = plan_of_run(run, ranks)
        problems = executable(plan) if to_run else []
        if not problems:
            return plan
    found = [located(problem, resolved.origins) for problem in problems]
    if wrong := [problem for problem in found if problem.path.startswith("plan.schedule")]:
        note = _drawn_cycle(run, ranks, words, picture)
        found = [problem for problem in found if problem not in wrong]
        found += [*wrong[:-1], replace(wrong[-1], message=f"{wrong[-1].message}{note}")]
    raise ConfigError(found)


def _drawn_cycle(run: RunConfig, ranks: int, words: str, picture: Path | None) -> str:
    """A line that says where the ranks that wait for each other are drawn, if there are such."""
    svg = deadlock(run, ranks)
    if not svg:
        return ""
    if not picture:
        return f"\ndraw them: weft plan {words} --ranks {ranks} --picture cycle.svg"
    _write(picture, svg)
    return f"\nthey are drawn in {picture}"


def plan_report(
    arguments: argparse.Namespace,
    resolved: Resolved[RunConfig],
    other: Resolved[RunConfig] | None,
    words: str,
) -> Report:
    """Do what the arguments ask for.

    Args:
        arguments: ``ranks``, ``show``, ``picture``, ``timeline``, ``save``, ``diff_ranks``.
        resolved: the run.
        other: the run whose plan to compare with.
        words: recipe, files and overrides as on the command line.
    """
    run = resolved.config
    plan = fitting_plan(resolved, arguments.ranks, words=words, picture=arguments.picture)
    tables = show(run, plan) if arguments.show else [summary(run, plan)]
    notes: list[str] = []
    if other:
        ranks = arguments.diff_ranks or arguments.ranks
        tables.append(_difference(run, plan, fitting_plan(other, ranks)))
    if arguments.picture:
        from weft.plan.picture import svg

        _write(arguments.picture, svg(plan))
        notes.append(f"drawn in {arguments.picture}")
    if arguments.timeline:
        _write(arguments.timeline, drawn(forecast(run, plan)))
        notes.append(f"timeline drawn in {arguments.timeline}")
    if arguments.save:
        _write(arguments.save, to_yaml(run.plan))
        notes.append(f"saved in {arguments.save}")
    missing = executable(plan)
    if missing:
        notes += ["planned, not run by this version:", *(f"  {problem}" for problem in missing)]
    return Report(tuple(tables), tuple(notes), _next(arguments, words, runs=not missing))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _difference(run: RunConfig, plan: Plan, other: Plan) -> Table:
    changes = diff(plan, other)
    if not changes:
        return Table("the other plan is the same", ("", "", ""), ())
    bytes_moved = moved(run.model, run.train.precision, plan, other)
    rows = [
        *changes,
        ("received by all ranks", "", bytes_words(bytes_moved.total)),
        (f"received by rank {bytes_moved.rank} (most)", "", bytes_words(bytes_moved.largest)),
    ]
    return Table("to the other plan", ("change", "this", "other"), tuple(rows))


def _next(arguments: argparse.Namespace, words: str, runs: bool) -> tuple[str, ...]:
    shown = () if arguments.show else (f"weft plan {words} --ranks {arguments.ranks} --show",)
    if not runs:
        return shown or (f"weft plan {words} --ranks {arguments.ranks} --picture plan.svg",)
    if arguments.save:
        kept = [word for word in shlex.split(words) if not word.startswith("plan.") and word[:5] != "plan="]
        words = shlex.join([*kept, f"plan={arguments.save}"])
    return (*shown, f"{launcher(arguments.ranks)} train {words}")


def launcher(ranks: int) -> str:
    """The command that starts so many ranks of ``weft``."""
    if ranks == 1:
        return "weft"
    if ranks <= PER_NODE or ranks % PER_NODE:
        return f"torchrun --nproc-per-node={ranks} -m weft"
    return f"torchrun --nnodes={ranks // PER_NODE} --nproc-per-node={PER_NODE} -m weft"
