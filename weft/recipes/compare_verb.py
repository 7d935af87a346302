"""The settings of ``weft compare RECIPE --plan A --plan B``, read before torch is."""

import argparse
import shlex
from dataclasses import dataclass, replace

from weft.config.errors import ConfigError, Problem
from weft.config.load import to_dict
from weft.config.resolve import leaves, override_layer, resolve
from weft.config.text import dump_value
from weft.plan.check import check, executable, idle
from weft.plan.layout import plan_of
from weft.plan.plans import plans_of
from weft.spec.layout import PlanConfig
from weft.spec.modules import Modules
from weft.spec.run import RunConfig

EXAMPLE = 'weft compare stdlib_lm --plan one --plan "ranks=4 decoder.tp=2 decoder.dp=2"'


@dataclass(frozen=True)
class Side:
    """One of the two plans: what the user wrote, and what it means."""

    text: str
    plan: PlanConfig
    ranks: int

    @property
    def readers(self) -> int:
        """Ranks that read different samples."""
        return plan_of(self.plan, self.ranks).dense.readers

    @property
    def settings(self) -> list[str]:
        """What the plan changes, as overrides of a run."""
        usual = dict(leaves(to_dict(PlanConfig())))
        found = leaves(to_dict(self.plan))
        return [f"plan.{path}={dump_value(value)}" for path, value in found if usual.get(path) != value]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that go with a recipe."""
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        action="append",
        default=[],
        help="twice: a YAML file with a plan, 'one' (one process), or settings such as "
        '"ranks=4 decoder.tp=2"; ranks run as threads of this process',
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML file over the recipe"
    )
    parser.add_argument(
        "--precision", choices=("fp64", "fp32"), default="fp64", help="of both plans; default: %(default)s"
    )
    parser.add_argument("--mock", action="store_true", help="random tokens in place of the recipe's data")


def parse_sides(texts: list[str], run: RunConfig) -> tuple[Side, Side]:
    """The two plans.

    Raises:
        ConfigError: not two plans, or one that does not fit the ranks or the model, or cannot be run.
    """
    if len(texts) != 2:
        found = f"{len(texts)} given, but two are compared, for example {EXAMPLE}"
        raise ConfigError([Problem("--plan", found)])
    return parse_side(texts[0], run), parse_side(texts[1], run)


def parse_side(text: str, run: RunConfig) -> Side:
    """A plan from ``one``, a YAML file, settings, or a file and settings over it.

    ``ranks=N`` says on how many ranks; without it, as many as the sizes of the axes need.

    Raises:
        ConfigError: settings that are no plan, or a plan that does not fit or cannot be run.
    """
    words = [word for word in shlex.split(text) if word != "one"]
    counts = [word.removeprefix("ranks=") for word in words if word.startswith("ranks=")]
    settings = [_setting(word) for word in words if not word.startswith("ranks=")]
    base = replace(run, plan=PlanConfig())
    plan = resolve(base, [override_layer(RunConfig, settings)], "default").config.plan
    sizes = plan.decoder
    ranks = sizes.pp * max(1, sizes.dp) * sizes.cp * sizes.tp * sizes.tp_embed
    if counts:
        ranks = int(counts[-1]) if counts[-1].isdecimal() else 0
    problems = [Problem("ranks", f"{counts[-1]!r} is not a number of ranks, such as 4")] if not ranks else []
    problems = problems or check(run.model, plan, ranks)
    if not problems:
        plans = plans_of(plan, ranks, Modules(run.model))
        problems = idle(plans) or executable(plans.decoder)
    if problems:
        raise ConfigError(Problem(p.path, f"{p.message} (--plan {text!r})") for p in problems)
    return Side(text, plan, ranks)


def _setting(word: str) -> str:
    """``decoder.tp=2`` or a file, as an override of a run."""
    if "=" not in word:
        return f"plan={word}"
    return word if word.startswith("plan.") else f"plan.{word}"
