"""What is done with what is too long: dropped, or cut, and then the row says by how much.

drop        to quarantine
keep_start  the ends of the answers are cut, and kept beside them; a prompt is never cut
keep_end    the oldest turns of the prompt are left out, at a turn boundary; an answer is never cut
"""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.config import Prepare
from pipeline.preparing.encoder import Tokens
from pipeline.preparing.example import Example, Unusable
from pipeline.preparing.templating import shorter_prompts


class Fitted(NamedTuple):
    tokens: Tokens
    example: Example  # as it was encoded: with keep_end, perhaps without its oldest turns
    cut_prompt: int
    cut_answers: tuple[list[int], ...]  # what was cut off each


def fit(example: Example, tokens: Tokens, prepare: Prepare, encode: Callable[[Example], Tokens]) -> Fitted:
    """The tokens within max_length and max_prompt_length, or Unusable. `encode` is for what has to be encoded anew."""
    if not tokens.prompt:
        raise Unusable("empty prompt", "no tokens after templating")
    if not all(tokens.answers):
        raise Unusable("empty answer", "no tokens after templating")
    problem = _problem(tokens, prepare)
    if problem is None:
        return Fitted(tokens, example, 0, tuple([] for _ in tokens.answers))
    if prepare.too_long == "keep_start" and problem.reason == "too long":
        room = prepare.max_length - len(tokens.prompt)
        answers = tuple(ids[:room] for ids in tokens.answers)
        cut = tuple(ids[room:] for ids in tokens.answers)
        return Fitted(tokens._replace(answers=answers), example, 0, cut)
    if prepare.too_long == "keep_end":
        return _without_oldest_turns(example, tokens, prepare, encode)
    raise problem


def _problem(tokens: Tokens, prepare: Prepare) -> Unusable | None:
    n_prompt, n_answer = len(tokens.prompt), max(map(len, tokens.answers))
    most = prepare.max_prompt_length
    if most and n_prompt > most:
        return Unusable("prompt too long", f"{n_prompt} tokens, prepare.max_prompt_length is {most}")
    if n_prompt >= prepare.max_length:
        return Unusable("prompt too long", f"{n_prompt} tokens, prepare.max_length is {prepare.max_length}")
    if n_prompt + n_answer > prepare.max_length:
        return Unusable("too long", f"{n_prompt} + {n_answer} tokens, prepare.max_length is {prepare.max_length}")
    return None


def _without_oldest_turns(
    example: Example, tokens: Tokens, prepare: Prepare, encode: Callable[[Example], Tokens]
) -> Fitted:
    """Leaves out as few turns as will do: found by halving, for a long conversation has many."""
    shorter = shorter_prompts(example)
    if not shorter:
        problem = _problem(tokens, prepare)
        assert problem is not None
        raise Unusable(problem.reason, f"{problem.detail}; the prompt is one turn, which is never cut")
    low, high, best = 0, len(shorter) - 1, None
    while low <= high:
        middle = (low + high) // 2
        try:
            tried = encode(shorter[middle])
            problem = _problem(tried, prepare)
        except Unusable as refused:  # a template may take one cut and not another
            problem = refused
        if problem is None:
            best, high = (middle, tried), middle - 1
        else:
            low = middle + 1
    if best is None:
        assert problem is not None
        raise Unusable(problem.reason, f"{problem.detail}; that is with the last turn alone")
    at, kept = best
    return Fitted(kept, shorter[at], len(tokens.prompt) - len(kept.prompt), tuple([] for _ in kept.answers))
