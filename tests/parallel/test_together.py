"""An error on one rank is the same error on all, on threads; values travel as JSON."""

from collections.abc import Callable
from pathlib import Path

import pytest

from weft.config.errors import CheckpointError, ConfigError, DataError, Problem, RunError, WeftError
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.threads import run_threads
from weft.parallel.together import on_chief, on_every


def caught(ranks: int, work: Callable[[Comm], object]) -> list[Exception]:
    """What each rank raises."""

    def attempt(comm: Comm) -> Exception:
        with pytest.raises(Exception) as info:  # noqa: PT011 - the caller looks at it
            work(comm)
        return info.value

    return run_threads(ranks, attempt, timeout=20)


@pytest.mark.parametrize("ranks", [1, 3])
def test_only_the_chief_works_and_all_have_its_value(ranks: int) -> None:
    workers: list[int] = []

    def work(comm: Comm) -> object:
        def value() -> object:
            workers.append(comm.rank)
            return {"path": "x", "steps": (1, 2)}

        return on_chief(comm, value)

    assert run_threads(ranks, work) == [{"path": "x", "steps": [1, 2]}] * ranks
    assert workers == [0]


@pytest.mark.parametrize("kind", [DataError, CheckpointError, RunError])
def test_an_error_of_the_chief_is_raised_everywhere(kind: type[WeftError]) -> None:
    def work(comm: Comm) -> None:
        def fail() -> None:
            raise kind(f"rank {comm.rank} says no")

        on_chief(comm, fail)

    errors = caught(3, work)
    assert [type(error) for error in errors] == [kind] * 3
    assert {str(error) for error in errors} == {"rank 0 says no"}


def test_other_errors_of_the_chief_reach_the_others_as_run_errors(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    first, second = caught(2, lambda comm: on_chief(comm, missing.read_text))
    assert isinstance(first, FileNotFoundError)
    assert isinstance(second, RunError)
    assert str(second) == f"{missing}: No such file or directory"

    def settings() -> None:
        raise ConfigError([Problem("run.dir", "is wrong")])

    first, second = caught(2, lambda comm: on_chief(comm, settings))
    assert isinstance(first, ConfigError)
    assert str(first) == str(second)


def test_every_rank_gives_its_value() -> None:
    assert (
        run_threads(3, lambda comm: on_every(comm, lambda: (comm.rank, "a")))
        == [[[0, "a"], [1, "a"], [2, "a"]]] * 3
    )


def test_all_failures_are_told_by_all() -> None:
    def work(comm: Comm) -> None:
        def fail() -> int:
            if comm.rank == 1:
                raise DataError("no such sample")
            if comm.rank == 2:
                raise KeyError("x")
            return 5

        on_every(comm, fail)

    errors = caught(3, work)
    assert [type(error) for error in errors] == [DataError] * 3
    assert {str(error) for error in errors} == {"rank 1: no such sample\nrank 2: KeyError('x')"}
    assert isinstance(errors[2].__cause__, KeyError)


def test_alone_an_error_is_raised_as_it_is() -> None:
    error = KeyError("x")

    def fail() -> None:
        raise error

    for together in (on_every, on_chief):
        with pytest.raises(KeyError) as info:
            together(SingleComm(), fail)
        assert info.value is error


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_not_json_does_not_travel(ranks: int) -> None:
    for error in caught(ranks, lambda comm: comm.gather_objects(object())):
        assert isinstance(error, TypeError)


def test_exact_floats_travel() -> None:
    value = [0.1 + 0.2, 1e-300, float("inf"), 2**70, None, True, "\ud800"]
    assert run_threads(2, lambda comm: comm.gather_objects(value)) == [[value, value]] * 2
