"""A text sample of the trained model, for the report."""

from weft.data.tokenizer import Tokenizer
from weft.infer.generate import Sampling, generate
from weft.models.hybrid import HybridLM
from weft.spec.run import RunConfig

PROMPTS = {"stdlib": "def read_lines(path, encoding=None):\n    "}


def sample(model: HybridLM, tokenizer: Tokenizer | None, config: RunConfig) -> dict[str, str]:
    """A continuation at temperature 0.7; code corpora start from a function's first line."""
    if tokenizer is None:
        return {}
    prompt = PROMPTS.get(config.data.source, "")
    settings = Sampling(
        max_new_tokens=160, temperature=0.7, top_p=0.95, seed=config.run.seed, stop_tokens=(tokenizer.eos_id,)
    )
    (continuation,) = generate(model, [[tokenizer.bos_id, *tokenizer.encode(prompt)]], settings)
    return {"prompt": prompt, "text": tokenizer.decode(continuation)}
