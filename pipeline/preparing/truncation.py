"""What is done with an example that is too long: it is dropped, or cut, and then its row says by how much.

drop        to quarantine
keep_start  the ends of the answers are cut, and stored in columns of their own; a prompt is never cut
keep_end    the oldest turns of the prompt are left out, at a turn boundary; an answer is never cut
"""

from collections.abc import Callable
from typing import NamedTuple

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.preparing.encoder import ExampleTokens
from prefcache.pipeline.preparing.example import Example, Unusable
from prefcache.pipeline.preparing.render_chat import shorter_prompts
from prefcache.pipeline.preparing.token_ids import Ids, to_ids
from prefcache.pipeline.spans import clip_spans

Encode = Callable[[Example], ExampleTokens]


class TruncatedExample(NamedTuple):
    tokens: ExampleTokens
    example: Example  # as it was encoded: with keep_end, perhaps without its oldest turns
    cut_prompt: int
    cut_answers: tuple[Ids, ...]  # what was cut off each


def truncate(example: Example, tokens: ExampleTokens, prepare: Prepare, encode: Encode) -> TruncatedExample:
    """Fit the tokens into max_length and max_prompt_length, or raise Unusable. `encode` encodes a shorter example."""
    if not tokens.prompt:
        raise Unusable("empty prompt", "no tokens after templating")
    if not all(tokens.answers):
        raise Unusable("empty answer", "no tokens after templating")
    if not all(tokens.spans):
        raise Unusable(
            "nothing counts", f"no token of an answer is one that prepare.train_on: {prepare.train_on} counts"
        )
    excess = _find_excess(tokens, prepare)
    if excess is None:
        return TruncatedExample(tokens, example, 0, tuple(to_ids([]) for _ in tokens.answers))
    if prepare.too_long == "keep_start" and excess.reason == "too long":
        room = prepare.max_length - len(tokens.prompt)
        kept = tokens._replace(
            answers=tuple(ids[:room] for ids in tokens.answers),
            spans=tuple(clip_spans(spans, room) for spans in tokens.spans),
        )
        if not all(kept.spans):
            raise Unusable("nothing counts", f"within prepare.max_length ({prepare.max_length})")
        return TruncatedExample(kept, example, 0, tuple(ids[room:] for ids in tokens.answers))
    if prepare.too_long == "keep_end":
        return _drop_oldest_turns(example, tokens, prepare, encode, excess)
    raise excess


def _find_excess(tokens: ExampleTokens, prepare: Prepare) -> Unusable | None:
    n_prompt, n_answer = len(tokens.prompt), max(map(len, tokens.answers))
    most = prepare.max_prompt_length
    n_tokens = n_prompt + n_answer
    if most and n_prompt > most:
        detail = "tokens in the prompt, against prepare.max_prompt_length"
        return Unusable("prompt too long", detail, n_found=n_prompt, n_limit=most, n_tokens=n_tokens)
    if n_prompt >= prepare.max_length:
        detail = "tokens in the prompt, against prepare.max_length"
        return Unusable("prompt too long", detail, n_found=n_prompt, n_limit=prepare.max_length, n_tokens=n_tokens)
    if n_tokens > prepare.max_length:
        detail = "tokens in prompt and answer, against prepare.max_length"
        return Unusable("too long", detail, n_found=n_tokens, n_limit=prepare.max_length, n_tokens=n_tokens)
    return None


def _explain(excess: Unusable, why: str) -> Unusable:
    return Unusable(
        excess.reason,
        f"{why}; {excess.detail}",
        n_found=excess.n_found,
        n_limit=excess.n_limit,
        n_tokens=excess.n_tokens,
    )


def _drop_oldest_turns(
    example: Example, tokens: ExampleTokens, prepare: Prepare, encode: Encode, excess: Unusable
) -> TruncatedExample:
    """Leave out as few turns as possible, found by bisection, because a long conversation has many."""
    shorter = shorter_prompts(example)
    if not shorter:
        raise _explain(excess, "the prompt is one turn, which is never cut")
    low, high, best = 0, len(shorter) - 1, None
    while low <= high:
        middle = (low + high) // 2
        problem: Unusable | None
        try:
            kept = encode(shorter[middle])
            problem = _find_excess(kept, prepare)
        except Unusable as refused:  # a template may accept one cut and not another
            problem = refused
        if problem is None:
            best, high = (shorter[middle], kept), middle - 1
        else:
            low, excess = middle + 1, problem
    if best is None:
        raise _explain(excess, "even with the last turn alone")
    shortened, kept = best
    n_cut = len(tokens.prompt) - len(kept.prompt)
    return TruncatedExample(kept, shortened, n_cut, tuple(to_ids([]) for _ in kept.answers))
