"""What an engine returns, looked at before anything is learnt from it: a broken engine must not become a bad model."""

from itertools import chain

import numpy

from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.types import Completion, EngineError
from fastrl.engine.base import Engine, Request, Sampling

MOST = 0.5  # of the completions: then the engine is broken. Fewer are left to the guard, which takes no step on them


def sample_checked(
    engine: Engine, requests: list[Request], sampling: Sampling, num_tokens: int
) -> list[list[Completion]]:
    """engine.sample(requests, sampling); num_tokens: ids of the vocabulary.

    Raises EngineError for an engine that fails or returns what cannot be: other counts than asked for, ids outside the
    vocabulary, more tokens than allowed, log-probabilities that are missing or not finite in most completions.
    """
    name = type(engine).__name__
    try:
        sampled = engine.sample(requests, sampling)
    except (ValueError, EngineError):
        raise  # they say what they are
    except Exception as error:
        if means_out_of_memory(error):
            raise
        raise EngineError(f"{name} failed while it sampled: {type(error).__name__}: {error}") from error
    wrong = fault(sampled, [len(r.seeds) for r in requests], sampling.max_new_tokens, num_tokens)
    if wrong:
        raise EngineError(f"{name} returned {wrong}; the weights are those of the last update")
    return sampled


def fault(sampled: list[list[Completion]], counts: list[int], max_new_tokens: int, num_tokens: int) -> str:
    """What is wrong with completions that were asked for, or an empty string. No Python per token."""
    given = [len(completions) for completions in sampled]
    if given != counts:
        at = next((i for i, (a, b) in enumerate(zip(given, counts, strict=False)) if a != b), None)
        if at is None:
            return f"completions of {len(given)} requests, asked for {len(counts)}"
        return f"{given[at]} completions of request {at}, asked for {counts[at]}"
    flat = [completion for completions in sampled for completion in completions]
    lengths = [len(c.token_ids) for c in flat]
    if max(lengths, default=0) > max_new_tokens:
        return f"{max(lengths)} tokens in a completion, at most {max_new_tokens} were allowed"
    if lengths != [len(c.rollout_logprobs) for c in flat]:
        return "another number of log-probabilities than of tokens in a completion"
    reasons = {c.finish_reason for c in flat} - {"stop", "length"}
    if reasons:
        return f"a completion that ended by {reasons.pop()!r}, expected stop or length"
    try:
        ids = numpy.array(list(chain.from_iterable(c.token_ids for c in flat)), dtype=numpy.int64)
        logprobs = numpy.array(list(chain.from_iterable(c.rollout_logprobs for c in flat)), dtype=numpy.float64)
    except (TypeError, ValueError, OverflowError) as error:
        return f"tokens or log-probabilities that are not numbers ({error})"
    outside = ids[(ids < 0) | (ids >= num_tokens)]
    if len(outside):
        return f"{len(outside)} token ids outside the vocabulary of {num_tokens}, the first of them {outside[0]}"
    missing = ~numpy.isfinite(logprobs)
    rows = len(set(numpy.repeat(numpy.arange(len(flat)), lengths)[missing].tolist()))
    if rows > MOST * len(flat):
        return f"log-probabilities that are missing or not finite in {rows} of {len(flat)} completions"
    return ""
