"""The command ``weft``. A verb imports torch only after its settings have been found right."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from weft import __version__
from weft.config import env
from weft.config.errors import ConfigError, Problem, WeftError
from weft.config.resolve import Resolved, file_layer, override_layer, resolve
from weft.recipes.compare_verb import EXAMPLE as PLANS_EXAMPLE
from weft.recipes.compare_verb import add_arguments, parse_sides
from weft.recipes.registry import RECIPES, build
from weft.spec.run import RunConfig

Verb = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 1 it failed, 2 the command or configuration is wrong."""
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        return arguments.verb(arguments)
    except WeftError as error:
        if env.wants_traceback():
            raise
        print(f"weft: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("weft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a path that cannot be read or written, a full disk
        if env.wants_traceback():
            raise
        print(f"weft: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    """Arguments; ``section.name=value`` may stand anywhere after the recipe."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:
        arguments.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(
            f"unknown arguments: {' '.join(rest)}; 'weft {arguments.name} --help' shows those there are"
        )
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="weft",
        description="Train hybrid mixture-of-experts models, from one laptop up.",
        epilog="example: weft train stdlib_lm\n'weft VERB --help' explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"weft {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, dest="name")
    for add in (_train, _plan, _generate, _import, _export, _compare, _data, _report):
        add(verbs)
    return parser


Verbs = argparse._SubParsersAction


def _verb(verbs: Verbs, name: str, run: Verb, about: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(verb=run)
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML file over the recipe"
    )
    parser.add_argument(
        "overrides", metavar="section.name=value", nargs="*", help="settings over recipe and files"
    )


def _files(arguments: argparse.Namespace) -> list[str]:
    return [word for path in arguments.config for word in ("--config", path)]


def resolve_run(arguments: argparse.Namespace, overrides: Sequence[str] = ()) -> Resolved[RunConfig]:
    """The run that recipe, files and overrides describe."""
    base = build(arguments.recipe)
    layers = [file_layer(path) for path in arguments.config]
    layers.append(override_layer(RunConfig, [*arguments.overrides, *overrides]))
    return resolve(base, layers, f"recipe {arguments.recipe}")


def _refuse_missing(config: RunConfig) -> None:
    """Stop where data is named that is not there or cannot be used."""
    from weft.data.multimodal import check_multimodal, is_multimodal
    from weft.data.preflight import check_sources

    check = check_multimodal if is_multimodal(config.data, config.encoders) else check_sources
    wrong = [problem.under("data") for problem in check(config.data, config.model.vocab_size)]
    if wrong:
        raise ConfigError(wrong)


def _words(arguments: argparse.Namespace) -> str:
    return shlex.join([arguments.recipe, *_files(arguments), *arguments.overrides])


def _next(*lines: str) -> None:
    if env.rank() == 0:
        print("\n".join(["", "next:", *(f"  {line}" for line in lines)]))


def _train(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from weft.recipes.plan_verb import fitting_plan, launcher

        resolved = resolve_run(arguments)
        plan = fitting_plan(resolved, env.world_size(), to_run=True, words=_words(arguments))
        _refuse_missing(resolved.config)
        if arguments.dry_run:
            from weft.recipes.show import show_run

            show_run(resolved, plan)
            _next(f"{launcher(plan.world)} train {_words(arguments)}")
            return 0
        from weft.train.run import train

        where = train(resolved.config, resolved.origins)
        write = () if resolved.config.encoders else (f"weft generate {where} --prompt 'def '",)
        _next(*write, f"open {where / 'report.html'}")
        return 0

    example = "weft train stdlib_lm train.train_iters=100 optimizer.lr=2e-3"
    parser = _verb(verbs, "train", run, "train the model of a recipe", example)
    _settings(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show every value, its origin and the cost; do nothing"
    )


def _plan(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from weft.recipes.plan_verb import plan_report
        from weft.recipes.show import show_tables

        arguments.ranks = arguments.ranks or env.world_size()
        other = None
        if arguments.diff or arguments.diff_ranks:
            changes = [word if "=" in word else f"plan={word}" for word in arguments.diff]
            other = resolve_run(arguments, changes)
        report = plan_report(arguments, resolve_run(arguments), other, _words(arguments))
        show_tables(report.tables)
        print(*report.notes, sep="\n", end="\n" * bool(report.notes))
        _next(*report.next)
        return 0

    example = (
        "weft plan nemotron3_super_pretrain --ranks 64 plan.decoder.tp=8 plan.decoder.store.level=3 --show"
    )
    parser = _verb(
        verbs, "plan", run, "check where each part of a model runs, and show who holds what", example
    )
    _settings(parser)
    add = parser.add_argument
    add("--ranks", metavar="N", type=_positive, help="ranks of the run; default: WORLD_SIZE or 1")
    add("--show", action="store_true", help="grids, groups, the cut of every parameter, stages, memory")
    add(
        "--diff",
        metavar="FILE|section.name=value",
        action="append",
        default=[],
        help="compare with another plan: what changes, and the bytes that ranks receive; repeatable",
    )
    add("--diff-ranks", metavar="N", type=_positive, help="ranks of the other plan; default: the same")
    add(
        "--picture",
        metavar="FILE.svg",
        type=Path,
        help="draw both grids, or the deadlock of a schedule",
    )
    add("--timeline", metavar="FILE.svg", type=Path, help="draw when each stage would run, by its FLOPs")
    add("--save", metavar="FILE.yaml", type=Path, help="write the plan; plan=FILE.yaml uses it")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def _generate(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from weft.infer.command import generate_text
        from weft.infer.generate import Sampling

        sampling = Sampling(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop=tuple(arguments.stop),
        )
        results = generate_text(arguments.ckpt, arguments.prompt, arguments.token_ids, sampling)
        for result in results:
            known = result.text is not None
            print(f"{result.prompt}{result.text}" if known else ",".join(map(str, result.tokens)))
        _next(f"weft export {arguments.ckpt} HF_DIR")
        return 0

    example = "weft generate runs/stdlib_lm --prompt 'def main(' --temperature 0.8"
    parser = _verb(verbs, "generate", run, "continue prompts with a trained model", example)
    parser.add_argument("ckpt", metavar="CKPT", type=Path, help="run or step directory")
    _prompts(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the most likely token"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw from this much probability"
    )
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws")


def _prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="repeatable")
    parser.add_argument(
        "--token-ids",
        metavar="1,2,3",
        type=_ids,
        action="append",
        default=[],
        help="a prompt as token ids; repeatable",
    )


def _ids(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, such as 1,2,3, not {text!r}")
    return [int(word) for word in words]


def _import(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from weft.checkpoint.hf import import_hf

        import_hf(arguments.hf_dir, arguments.ckpt)
        _next(f"weft compare {arguments.hf_dir} {arguments.ckpt} --token-ids 1,2,3")
        return 0

    example = "weft import NVIDIA-Nemotron-3-Nano-4B checkpoints/nano_4b"
    parser = _verb(verbs, "import", run, "make a checkpoint of a Hugging Face model directory", example)
    parser.add_argument(
        "hf_dir", metavar="HF_DIR", type=Path, help="directory with config.json and *.safetensors"
    )
    parser.add_argument("ckpt", metavar="CKPT", type=Path, help="directory to write")


def _export(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from weft.checkpoint.hf import export_hf

        export_hf(arguments.ckpt, arguments.hf_dir)
        _next(f"weft compare {arguments.hf_dir} {arguments.ckpt} --token-ids 1,2,3")
        return 0

    example = "weft export runs/stdlib_lm exported"
    parser = _verb(verbs, "export", run, "write a checkpoint as a Hugging Face model directory", example)
    parser.add_argument("ckpt", metavar="CKPT", type=Path, help="run or step directory")
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path, help="directory to write")


def _compare(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        if arguments.plan:
            return _compare_plans(arguments)
        if len(arguments.overrides) != 1:
            raise ConfigError([Problem("compare", "name HF_DIR and CKPT, or a recipe and two --plan")])
        if not arguments.prompt and not arguments.token_ids:
            raise ConfigError(
                [Problem("compare", "nothing to compare on; give --prompt TEXT or --token-ids 1,2,3")]
            )
        from weft.infer.compare import compare

        hf_dir, ckpt = Path(arguments.recipe), Path(arguments.overrides[0])
        return compare(hf_dir, ckpt, arguments.token_ids, arguments.prompt)

    example = f"weft compare runs/stdlib_lm/export runs/stdlib_lm --token-ids 1,2,3\n  {PLANS_EXAMPLE}"
    about = (
        "run a Hugging Face model and a checkpoint on the same tokens, or a recipe under two plans; exit "
        "status 0 only if they agree"
    )
    parser = _verb(verbs, "compare", run, about, example)
    parser.add_argument(
        "recipe", metavar="HF_DIR|RECIPE", help="directory that transformers can load; a recipe with --plan"
    )
    parser.add_argument(
        "overrides",
        metavar="CKPT|section.name=value",
        nargs="*",
        help="run or step directory; settings over recipe and files with --plan",
    )
    _prompts(parser)
    add_arguments(parser)


def _compare_plans(arguments: argparse.Namespace) -> int:
    config = resolve_run(arguments).config
    sides = parse_sides(arguments.plan, config)
    if not arguments.mock:
        _refuse_missing(config)
    from weft.recipes.compare_plans import compare_plans

    words = shlex.split(_words(arguments))
    status, following = compare_plans(config, sides, arguments.precision, arguments.mock, words)
    _next(*following)
    return status


def _data(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        config = resolve_run(arguments).config
        _refuse_missing(config)
        from weft.data.corpus import build_corpus

        corpus = build_corpus(config.data, config.model.vocab_size, config.cache, print)
        words = _words(arguments)
        if arguments.action == "build":
            for split in corpus.splits.values():
                print(f"{split.name}: {split.documents:,} documents, {split.tokens:,} tokens")
            _next(f"weft data inspect {words}", f"weft train {words}")
        else:
            from weft.data.inspect import describe

            print(describe(corpus, config.data.seq_length, config.run.seed))
            _next(f"weft train {words}")
        return 0

    example = "weft data build stdlib_lm\n  weft data inspect stdlib_lm data.seq_length=256"
    parser = _verb(
        verbs, "data", run, "tokenize the data of a recipe, or show what training would read", example
    )
    parser.add_argument(
        "action", choices=("build", "inspect"), help="build: tokenize and index; inspect: show"
    )
    _settings(parser)


def _report(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from weft.train.report import write_report

        write_report(arguments.run_dir)
        _next(f"open {arguments.run_dir / 'report.html'}")
        return 0

    example = "weft report runs/stdlib_lm"
    parser = _verb(verbs, "report", run, "write report.html of a run again, also while it trains", example)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run directory")
