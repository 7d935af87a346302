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
from weft.data.preflight import check_sources
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
    for add in (_train, _generate, _import, _export, _compare, _data, _report):
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


def resolve_run(arguments: argparse.Namespace) -> Resolved[RunConfig]:
    """The run that recipe, files and overrides describe."""
    base = build(arguments.recipe)
    layers = [file_layer(path) for path in arguments.config]
    layers.append(override_layer(RunConfig, arguments.overrides))
    resolved = resolve(base, layers, f"recipe {arguments.recipe}")
    config = resolved.config
    wrong = [problem.under("data") for problem in check_sources(config.data, config.model.vocab_size)]
    if wrong:
        raise ConfigError(wrong)
    return resolved


def _next(*lines: str) -> None:
    if env.rank() == 0:
        print("\n".join(["", "next:", *(f"  {line}" for line in lines)]))


def _train(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        resolved = resolve_run(arguments)
        if arguments.dry_run:
            from weft.recipes.show import show_run

            show_run(resolved)
            _next(shlex.join(["weft", "train", arguments.recipe, *_files(arguments), *arguments.overrides]))
            return 0
        from weft.train.run import train

        where = train(resolved.config, resolved.origins)
        _next(f"weft generate {where} --prompt 'def '", f"open {where / 'report.html'}")
        return 0

    example = "weft train stdlib_lm train.train_iters=100 optimizer.lr=2e-3"
    parser = _verb(verbs, "train", run, "train the model of a recipe", example)
    _settings(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show every value, its origin and the cost; do nothing"
    )


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
        if not arguments.prompt and not arguments.token_ids:
            raise ConfigError(
                [Problem("compare", "nothing to compare on; give --prompt TEXT or --token-ids 1,2,3")]
            )
        from weft.infer.compare import compare

        return compare(arguments.hf_dir, arguments.ckpt, arguments.token_ids, arguments.prompt)

    example = "weft compare runs/stdlib_lm/export runs/stdlib_lm --token-ids 1,2,3"
    about = "run a Hugging Face model and a checkpoint on the same tokens; exit status 0 only if they agree"
    parser = _verb(verbs, "compare", run, about, example)
    parser.add_argument("hf_dir", metavar="HF_DIR", type=Path, help="directory that transformers can load")
    parser.add_argument("ckpt", metavar="CKPT", type=Path, help="run or step directory")
    _prompts(parser)


def _data(verbs: Verbs) -> None:
    def run(arguments: argparse.Namespace) -> int:
        config = resolve_run(arguments).config
        from weft.data.corpus import build_corpus

        corpus = build_corpus(config.data, config.model.vocab_size, config.cache, print)
        words = shlex.join([arguments.recipe, *_files(arguments), *arguments.overrides])
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
