"""Every block of every guide runs, and shows what it says it shows."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from weft.recipes.cli import main

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guides").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language, its text and the line of the guide on which the text begins."""

    language: str
    text: str
    line: int


def blocks(guide: str) -> list[Block]:
    return [Block(m[1], m[2], guide.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(guide)]


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[dict]:
    """A module for the Python of one guide, known to those who look classes up by module."""
    module = types.ModuleType(f"guide_{request.node.callspec.id}")
    sys.modules[module.__name__] = module
    yield vars(module)
    del sys.modules[module.__name__]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guide(guide: Path, namespace: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(guide.read_text(encoding="utf-8"))
    assert any(block.language in ("python", "console") for block in found)
    shown = ""
    for block in found:
        place = f"{guide.name}:{block.line}"
        if block.language == "python":
            lines = "\n" * (block.line - 1)  # so that a traceback names the line of the guide
            code = compile(lines + block.text, str(guide), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            shown = printed.getvalue()
        elif block.language == "output":
            assert shown == block.text, place
        elif block.language == "console":
            for command, expected in sessions(block.text):
                check(command, expected, place)
        else:
            assert block.language in ("sh", "yaml", "text"), f"{place}: say what this block is"


def sessions(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command after ``$`` with the lines shown below it."""
    assert text.startswith("$ ")
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = part.replace("\\\n", "").splitlines()
        yield command, [line for line in shown if line.strip() not in ("", "...")]


def check(command: str, shown: list[str], place: str) -> None:
    """Run ``weft ...``: its output has the lines shown, in order; it fails only where an error is shown."""
    program, *arguments = shlex.split(command, comments=True)
    assert program == "weft", f"{place}: {command}"
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        status = main(arguments)
    output = [line.rstrip() for line in written.getvalue().splitlines()]
    assert bool(status) == any(line.startswith("weft: ") for line in shown), (place, command, output)
    rest = iter(output)
    for line in shown:
        assert line.rstrip() in rest, f"{place}: {command} does not show {line!r} there: {output}"


def test_the_package_alone_imports_no_torch():
    program = "import sys, weft; weft.__version__; print('torch' in sys.modules, hasattr(weft, 'starts'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
