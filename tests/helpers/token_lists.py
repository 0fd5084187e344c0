"""Sums of answers from lists of their tokens' log-probs, as a step makes them from a forward."""

from collections.abc import Mapping, Sequence

import torch

from prefcache.pipeline.config import Tokens
from prefcache.pipeline.model.device import copy_together
from prefcache.pipeline.model.logprobs import Logps
from prefcache.pipeline.training import token_sums
from prefcache.pipeline.training.token_sums import Answers, Seed

TokenLists = Mapping[str, Sequence[torch.Tensor]]  # answer -> per example, its tokens' values


def answer_sums(policy: TokenLists, reference: TokenLists, tokens: Tokens, seed: Seed) -> dict[str, torch.Tensor]:
    answers, logps = _lay_out(policy)
    known = {name: [each.numpy() for each in lists] for name, lists in reference.items()}
    inputs = copy_together(answers.lay_out(tokens, seed, known), "cpu")
    return token_sums.answer_sums(logps, list(policy), inputs, tokens)


def wpo_weights(policy: TokenLists, squares: TokenLists) -> torch.Tensor:
    answers, logps = _lay_out(policy)
    logps = logps._replace(squares_N=_lay_out(squares)[1].values_N)
    inputs = copy_together(answers.lay_out(Tokens(), Seed(0, 0, []), {}), "cpu")
    return token_sums.wpo_weights(logps, list(policy), inputs, list(policy))


def _lay_out(lists: TokenLists) -> tuple[Answers, Logps]:
    """In the order of a row in which each example's answers share a prompt."""
    flat = [each for of_answer in lists.values() for each in of_answer]
    n = len(flat) // len(lists)
    order = [k * n + i for i in range(n) for k in range(len(lists))]
    counts = [len(flat[i]) for i in order]
    answers = Answers({name: [len(each) for each in of_answer] for name, of_answer in lists.items()}, order)
    return answers, Logps(torch.cat([flat[i] for i in order]), None, torch.tensor(counts), counts)
