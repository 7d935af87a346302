"""Decode equals full, chunked prefill equals full, batches of different lengths equal single prompts."""

import pytest
import torch

from tests.tiny import make
from weft.config.errors import RunError
from weft.infer.cache import make_cache
from weft.infer.generate import Sampling, choose, cut, generate
from weft.ops.segments import Segments

CPU = torch.device("cpu")


@pytest.mark.parametrize("cuts", [[1] * 21, [7, 7, 7], [13, 8], [5, 1, 9, 1, 1, 4], [21]])
@pytest.mark.parametrize("pattern", ["ME*-", "M", "*", "MM**E"])
def test_pieces_equal_the_whole(pattern: str, cuts: list[int]) -> None:
    model = make(pattern=pattern, mtp_num_depths=0)
    tokens = torch.randint(0, 61, (21,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole = model.logits(tokens, Segments((21,)))
        cache = make_cache(model.config, 1, 21, torch.float64, torch.float64, CPU)
        parts = [model.logits(part, Segments((len(part),)), cache) for part in tokens.split(cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-10)


def test_sequences_of_a_batch_do_not_meet() -> None:
    model = make(pattern="ME*-", mtp_num_depths=0)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 61, (n,), generator=generator) for n in (9, 4, 17)]
    with torch.inference_mode():
        cache = make_cache(model.config, 3, 20, torch.float64, torch.float64, CPU)
        first = model.logits(
            torch.cat([r[:-2] for r in rows]), Segments(tuple(len(r) - 2 for r in rows)), cache
        )
        steps = [
            model.logits(torch.stack([r[i] for r in rows]), Segments((1, 1, 1)), cache) for i in (-2, -1)
        ]
        alone = [model.logits(r, Segments((len(r),))) for r in rows]
    torch.testing.assert_close(first, torch.cat([a[:-2] for a in alone]), rtol=0, atol=1e-10)
    for step, place in zip(steps, (-2, -1), strict=True):
        torch.testing.assert_close(step, torch.stack([a[place] for a in alone]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_does_not_depend_on_batch_or_chunk(chunk: int, temperature: float) -> None:
    model = make(pattern="ME*-", mtp_num_depths=0)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4]]
    settings = Sampling(max_new_tokens=12, temperature=temperature, top_p=0.9, seed=5, prefill_chunk=chunk)
    together = generate(model, prompts, settings)
    reference = generate(model, prompts, Sampling(**{**vars(settings), "prefill_chunk": 2048}))
    assert together == reference
    assert generate(model, prompts[:1], settings) == together[:1]


def test_greedy_equals_full_forward() -> None:
    model = make(pattern="ME*-", mtp_num_depths=0)
    (out,) = generate(model, [[5, 6, 7]], Sampling(max_new_tokens=10))
    text = [5, 6, 7]
    with torch.inference_mode():
        for token in out:
            assert model.logits(torch.tensor(text), Segments((len(text),)))[-1].argmax().item() == token
            text.append(token)


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    seen = {
        choose(logits, Sampling(temperature=1.0, top_p=0.6), [torch.Generator().manual_seed(s)]).item()
        for s in range(200)
    }
    assert seen == {0, 1}


def test_stops() -> None:
    model = make(pattern="ME*-", mtp_num_depths=0)
    (free,) = generate(model, [[5]], Sampling(max_new_tokens=12))
    (stopped,) = generate(model, [[5]], Sampling(max_new_tokens=12, stop_tokens=(free[3],)))
    assert stopped == free[: free.index(free[3]) + 1]
    letters = lambda ids: "".join(chr(65 + i % 26) for i in ids)  # noqa: E731
    word = letters(free)[2:4]
    (by_text,) = generate(model, [[5]], Sampling(max_new_tokens=12, stop=(word,)), letters)
    assert cut(letters(by_text), (word,)) == letters(free)[: letters(free).index(word)]


@pytest.mark.parametrize(("prompts", "message"), [([[]], "empty"), ([[61]], "0 to 60"), ([[-1]], "0 to 60")])
def test_bad_prompts(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(RunError, match=message):
        generate(make(), prompts, Sampling())


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_bad_sampling(changes: dict) -> None:
    with pytest.raises(RunError):
        Sampling(**changes)
