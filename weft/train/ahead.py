"""What a step reads, made ready before it: lengths of all ranks' samples, and what encoders need of them.

With encoders, the lengths of a step are exchanged and its media are read while the step before runs; what
goes wrong with them is raised when the step's turn comes, on all ranks alike.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import NamedTuple

from weft.config.errors import DataError, WeftError
from weft.data.batch import Batch
from weft.parallel.together import on_every
from weft.plan.plans import stage_of
from weft.plan.schedule import Graph
from weft.train.encode import Fetch, Inputs, fetched, groups_of
from weft.train.objective import Taken, take
from weft.train.team import Team


class Ready(NamedTuple):
    """A step's data.

    Attributes:
        taken: of the decoder.
        inputs: of encoders.
    """

    taken: Taken
    inputs: Inputs


class _Coming(NamedTuple):
    taken: Taken
    inputs: "Future[Inputs] | Inputs"


class Ahead:
    """Data of steps, one after the other.

    Args:
        team: what is here.
        graph: of the schedule, which says how many microbatches encoders take at a time.
        vocab: tokens of the decoder's vocabulary.
        fetch: reads media.
        learns: whether each step must have a target.
    """

    def __init__(
        self, team: Team, graph: Graph, vocab: int, fetch: Fetch | None, learns: bool = True
    ) -> None:
        self.team, self.vocab, self._read, self._learns = team, vocab, fetch, learns
        self._every = {name: graph.size(stage_of(name, 0)) for name in team.modules.encoders}
        self._pool = ThreadPoolExecutor(1, "weft-media") if fetch and team.modules.encoders else None
        self._coming: _Coming | WeftError | None = None

    def next(self, steps: Iterator[Iterable[Batch]], more: bool = True) -> Ready:
        """The next step's data; ``more``: begin with those of the step after it.

        Raises:
            DataError: on every rank, if the data of one cannot be used.
        """
        coming = self._coming or self._begin(steps)
        self._coming = self._begin(steps) if more and self._every else None
        if isinstance(coming, WeftError):
            raise coming
        return Ready(coming.taken, self._arrived(coming))

    def _begin(self, steps: Iterator[Iterable[Batch]]) -> "_Coming | WeftError":
        """Exchange lengths, and start to read."""
        try:
            taken = take(chain.from_iterable(islice(steps, 1)), self.vocab, self.team, self._learns)
        except WeftError as error:
            return error
        inputs = groups_of(self.team, self._every, taken.tables)
        if self._pool is None or self._read is None:
            return _Coming(taken, inputs)
        return _Coming(taken, self._pool.submit(fetched, self.team, inputs, self._read))

    def _arrived(self, coming: _Coming) -> Inputs:
        """Wait for what is read; an error on one rank is one on all of them."""
        inputs = coming.inputs
        if not isinstance(inputs, Future):
            return inputs
        found: list[Inputs] = []

        def wait() -> None:
            try:
                found.append(inputs.result())
            except WeftError:
                raise
            except Exception as error:
                raise DataError(f"reading media failed: {error!r}") from error

        on_every(self.team.comm, wait)
        return found[0]
