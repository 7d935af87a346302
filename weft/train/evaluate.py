"""Evaluation in bits per byte, and of answers."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from weft.data.batch import Batch, empty
from weft.parallel.executor import Executor
from weft.plan.step import evaluation_of
from weft.train.ahead import Ahead
from weft.train.encode import Fetch
from weft.train.passes import Answer, Reading
from weft.train.team import Team


class Document(NamedTuple):
    """What a model answers in a document.

    Attributes:
        sample: where the document is.
        number: among the documents of the sample that have targets.
        best: the most likely token at each target, given the right ones before it.
        targets: the right ones.
    """

    sample: int
    number: int
    best: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """A split, or part of it, as a model sees it.

    Attributes:
        loss: nats per token.
        tokens: targets.
        documents: that have targets, where their answers were asked for.
    """

    loss: float
    tokens: int
    documents: tuple[Document, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of the documents in which the most likely token is right at every target."""
        return sum(d.best == d.targets for d in self.documents) / max(1, len(self.documents))

    def bits_per_byte(self, tokens: int, text_bytes: int) -> float | None:
        """Bits per byte of a split with ``tokens`` targets and ``text_bytes`` bytes; None without bytes.

        Exact when the evaluation read the whole split; otherwise the split's mean bytes per token are taken.
        """
        return self.loss * tokens / math.log(2) / text_bytes if text_bytes else None


@torch.no_grad()
def evaluate(
    team: Team, batches: Iterable[Batch], chunk: int, fetch: Fetch | None = None, graded: bool = False
) -> Evaluation:
    """Mean next-token loss over the batches of all readers.

    Readers may have different numbers of batches: who has none left goes on with empty ones.

    Args:
        team: what is here.
        batches: of this rank's reader; ignored where nothing of the decoder is.
        chunk: tokens whose logits exist at a time.
        fetch: reads what encoders need.
        graded: also compare each document's most likely tokens with its targets.

    Raises:
        DataError: on every rank, if the batches of one cannot be used.
    """
    schedule = evaluation_of(team.plans, team.modules, team.plans.decoder.schedule)
    work = Reading(team, schedule.graph, chunk, graded)
    executor = Executor(schedule, team.seat, work, team.device)
    ahead = Ahead(team, schedule.graph, team.modules.decoder.vocab_size, fetch, learns=False)
    mine = iter(batches if team.decoder else ())
    leads = team.decoder is not None and team.decoder.mesh.leads
    tokens = 0
    while True:
        read = list(islice(mine, schedule.microbatches))
        if not any(team.comm.gather_objects(bool(read))):
            break
        lacks = schedule.microbatches - len(read) if team.decoder else 0
        read += [empty(team.modules.decoder.depths + 1) for _ in range(lacks)]
        taken, inputs = ahead.next(iter([read]), more=False)
        work.read(taken.batches, taken.tables, inputs)
        executor.run()
        tokens += sum(batch.targets[0] for batch in read) * leads
    sums = torch.stack([work.nats, work.nats.new_tensor(tokens)])
    nats, count = team.comm.all_reduce(sums).tolist()
    return Evaluation(nats / max(1.0, count), int(count), _documents(team, work))


def _documents(team: Team, work: Reading) -> tuple[Document, ...]:
    """Every document that has targets, of all readers, in the order of samples."""
    found: dict[tuple[int, int], list[Answer]] = {}
    for own in team.comm.gather_objects(work.answers):
        for answer in (Answer(*fields) for fields in own):
            found.setdefault((answer.sample, answer.document), []).append(answer)
    documents: list[Document] = []
    count: Counter[int] = Counter()
    for (sample, _), answers in sorted(found.items()):
        answers.sort(key=lambda answer: answer.place)
        best, targets = (tuple(answer[field] for answer in answers) for field in (3, 4))
        documents.append(Document(sample, count[sample], best, targets))
        count[sample] += 1
    return tuple(documents)
