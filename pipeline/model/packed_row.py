"""A packed row: groups of sequences laid out one after another, without padding, each prompt once.

Shapes: T positions of the row, N counted tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefcache.pipeline.model.attention import Branch, CallIndices, Segments
from prefcache.pipeline.model.chunked_lm_head import score_hidden
from prefcache.pipeline.model.device import copy_together
from prefcache.pipeline.model.logprobs import Logps, RouterHook, make_logps, router_options
from prefcache.pipeline.schema import TokenSequence


@dataclass(frozen=True)
class Row:
    """prompt, answer, answer, ..., prompt, ...: each group has one prompt."""

    input_T: np.ndarray
    position_T: np.ndarray  # an answer's continue its prompt's
    source_N: np.ndarray  # where in the row each counted token is predicted
    target_N: np.ndarray
    counts: list[int]  # counted tokens of each sequence, in the order of the groups
    trunks: list[slice]  # each prompt with its first answer
    branches: list[Branch]  # each further answer


def lay_out(groups: Sequence[Sequence[TokenSequence]]) -> Row:
    """Lay groups out in one row. An answer's last token predicts nothing, so it is not an input."""
    inputs, positions, sources, trunks, branches = [], [], [], [], []
    end = 0
    for group in groups:
        n_prompt = len(group[0].prompt_ids)
        prompt = slice(end, end + n_prompt)
        inputs.append(group[0].prompt_ids)
        positions.append(np.arange(n_prompt))
        end = prompt.stop
        for i, sequence in enumerate(group):
            answer = slice(end, end + len(sequence.completion_ids) - 1)
            inputs.append(sequence.completion_ids[:-1])
            positions.append(np.arange(n_prompt, n_prompt + answer.stop - answer.start))
            # The prompt's last token predicts the first token of every answer.
            predicts = np.concatenate([[prompt.stop - 1], np.arange(answer.start, answer.stop)])
            sources.append(predicts[sequence.counted_positions])
            if i == 0:
                trunks.append(slice(prompt.start, answer.stop))
            elif answer.stop > answer.start:
                branches.append(Branch(prompt, answer))
            end = answer.stop
    sequences = [sequence for group in groups for sequence in group]
    return Row(
        input_T=np.concatenate(inputs).astype(np.int64),
        position_T=np.concatenate(positions),
        source_N=np.concatenate(sources),
        target_N=np.concatenate([each.completion_ids[each.counted_positions] for each in sequences]).astype(np.int64),
        counts=[each.n_counted for each in sequences],
        trunks=trunks,
        branches=branches,
    )


def row_logps(
    model: Any, row: Row, *, eager: bool = False, squares: bool = False, router_hook: RouterHook | None = None
) -> Logps:
    """Log-prob of each counted token of each sequence of a row, by a model on which `use_segments` was called."""
    segments = Segments(row.trunks, row.branches, eager)
    on_device = copy_together(
        {
            "input_T": row.input_T,
            "position_T": row.position_T,
            "source_N": row.source_N,
            "target_N": row.target_N,
            "lengths_S": np.array(row.counts),
            **segments.index_calls(),
        },
        next(model.parameters()).device,
    )
    out = model.get_decoder()(
        input_ids=on_device["input_T"].unsqueeze(0),
        position_ids=on_device["position_T"].unsqueeze(0),
        use_cache=False,
        segments=replace(segments, indices=CallIndices(*(on_device[name] for name in CallIndices._fields))),
        **router_options(router_hook),
    )
    if router_hook:
        router_hook([logits.flatten(0, -2) for logits in out.router_logits])
    hidden_ND = out.last_hidden_state[0, on_device["source_N"]]
    scores = score_hidden(model, hidden_ND, on_device["target_N"], squares)
    return make_logps(scores, on_device["lengths_S"], row.counts)
