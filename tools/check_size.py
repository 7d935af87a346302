"""Size budgets: code lines per file, lines per function and code lines per package (``[tool.size]``)."""

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("weft", "tests", "tools", "benchmarks")
NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str, tree: ast.Module) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            lines -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return len(lines)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def faults(budget: dict) -> Iterator[str]:
    """What is over its budget, one line each."""
    packages: Counter[str] = Counter()
    for path in sorted(path for place in PLACES for path in (ROOT / place).rglob("*.py")):
        name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        size = code_lines(text, tree)
        if name.parts[0] == "weft" and len(name.parts) > 2:
            packages[name.parts[1]] += size
        if size > budget["file"]:
            yield f"{name}: {size} code lines; a file has at most {budget['file']}"
        if path.name in NAMES:
            yield f"{name}: name a file for what it holds"
        yield from (f"{name}:{fault}" for fault in long_functions(tree, budget["function"]))
    yield from (
        f"weft/{package}: {size} code lines; its budget is {budget['packages'][package]}"
        for package, size in packages.items()
        if size > budget["packages"].get(package, size)
    )
    if "--show" in sys.argv:
        print("\n".join(f"{package:12} {size:6}" for package, size in sorted(packages.items())))
        print(f"{'all':12} {packages.total():6}")


def long_functions(tree: ast.Module, most: int) -> Iterator[str]:
    """Functions of more lines than ``most``, docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if length > most:
                yield f"{node.lineno}: {node.name} has {length} lines; a function has at most {most}"


def main() -> int:
    """Print faults; the exit status is 1 if there are any."""
    budget = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["size"]
    found = list(faults(budget))
    print("\n".join(found) if found else "sizes are within their budgets")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
