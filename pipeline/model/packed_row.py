"""A packed row: groups of sequences laid out one after another, without padding, each group as a tree.

What several sequences of a group begin with, the prompt at least, is computed once for all of them: the sequence that comes first
is whole, and each further one branches off where its ids begin to differ. A position sees its own path alone, which is its
sequence up to it. Tokens that sequences share are also predicted once.

Shapes: T positions of the row, N counted tokens of all sequences, M their distinct predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefcache.pipeline.model.attention import Branch, CallIndices, Segments
from prefcache.pipeline.model.chunked_lm_head import score_hidden
from prefcache.pipeline.model.device import copy_together
from prefcache.pipeline.model.logprobs import Logps, RouterHook, make_logps, router_options
from prefcache.pipeline.model.packing import order_tree
from prefcache.pipeline.model.vision import ImageFeatures, Positions, Vision
from prefcache.pipeline.schema import TokenSequence


@dataclass(frozen=True)
class Row:
    input_T: np.ndarray
    position_T: np.ndarray  # in the sequence: a branch continues what it branches off. [3, T] with M-RoPE
    source_M: np.ndarray  # where in the row each prediction is made
    target_M: np.ndarray
    place_N: np.ndarray | None  # the prediction of each counted token; None: they are the predictions, in this order
    counts: list[int]  # counted tokens of each sequence, in the order of the groups
    branches: list[Branch]  # that make up the row
    images: list[ImageFeatures]  # of the prompts, one after another
    image_I: np.ndarray  # where in the row their tokens are


def lay_out(groups: Sequence[Sequence[TokenSequence]], vision: Vision | None = None) -> Row:
    """Lay groups out in one row. A sequence's last token predicts nothing, so it is not an input."""
    inputs, positions, branches, sources = [], [], [], list[np.ndarray]()
    images, places = _ImagesOfRow(vision, groups), [np.empty(0, np.int64)]
    end = 0
    for group in groups:
        position_of = images.positions(group[0])
        places.append(end + images.places(group[0]))
        path: tuple[slice, ...] = ()
        by_place: dict[int, np.ndarray] = {}
        for i, n_shared in order_tree(group):
            input_ids, path = group[i].ids[:-1], _cut(path, n_shared)
            if len(input_ids) > n_shared:
                own = slice(end, end + len(input_ids) - n_shared)
                inputs.append(input_ids[n_shared:])
                positions.append(position_of(n_shared, len(input_ids)))
                branches.append(Branch(path, own, () if path else images.blocks(group[i])))
                path, end = (*path, own), own.stop
            in_row = np.concatenate([np.arange(span.start, span.stop) for span in path])
            # An answer's first token is predicted by the prompt's last.
            by_place[i] = in_row[len(group[i].prompt_ids) - 1 + group[i].counted_positions]
        sources += [by_place[i] for i in range(len(group))]
    sequences = [sequence for group in groups for sequence in group]
    source_N = np.concatenate(sources)
    target_N = np.concatenate([each.completion_ids[each.counted_positions] for each in sequences]).astype(np.int64)
    _, first_M, place_N = np.unique(source_N << 32 | target_N, return_index=True, return_inverse=True)
    is_shared = len(first_M) < len(source_N)
    return Row(
        input_T=np.concatenate(inputs).astype(np.int64),
        position_T=np.concatenate(positions, -1),
        source_M=source_N[first_M] if is_shared else source_N,
        target_M=target_N[first_M] if is_shared else target_N,
        place_N=place_N if is_shared else None,
        counts=[each.n_counted for each in sequences],
        branches=branches,
        images=images.features,
        image_I=np.concatenate(places),
    )


class _ImagesOfRow:
    """The images of a row's prompts. The features of each are computed once, however many of the prompts have it."""

    def __init__(self, vision: Vision | None, groups: Sequence[Sequence[TokenSequence]]) -> None:
        self._vision = vision
        named = [image for group in groups for image in group[0].images]
        self.features = vision.features(named) if vision else []
        self._features = dict(zip(named, self.features, strict=True)) if vision else {}

    def places(self, sequence: TokenSequence) -> np.ndarray:
        return np.empty(0, np.int64) if self._vision is None else self._vision.image_places(sequence)

    def blocks(self, sequence: TokenSequence) -> tuple[slice, ...]:
        return () if self._vision is None else tuple(self._vision.blocks(sequence))

    def positions(self, sequence: TokenSequence) -> Positions:
        """Return a function that gives the position ids of tokens begin:end, for any answer to this sequence's prompt."""
        if self._vision is None:
            return np.arange
        return self._vision.positions(sequence, [self._features[image].grid or () for image in sequence.images])


def _cut(path: tuple[slice, ...], n: int) -> tuple[slice, ...]:
    """The first `n` positions of a path."""
    kept: list[slice] = []
    for span in path:
        if n > 0:
            kept.append(slice(span.start, min(span.stop, span.start + n)))
        n -= span.stop - span.start
    return tuple(kept)


def row_logps(
    model: Any,
    row: Row,
    *,
    vision: Vision | None = None,
    eager: bool = False,
    squares: bool = False,
    router_hook: RouterHook | None = None,
) -> Logps:
    """Log-prob of each counted token of each sequence of a row, by a model on which `use_segments` was called."""
    segments = Segments(row.branches, eager)
    arrays = {
        "input_T": row.input_T,
        "position_T": row.position_T,
        "source_M": row.source_M,
        "target_M": row.target_M,
        "lengths_S": np.array(row.counts),
        **({} if row.place_N is None else {"place_N": row.place_N}),
        **({"image_I": row.image_I} if row.images else {}),
        **segments.index_calls(),
    }
    on_device = copy_together(arrays, next(model.parameters()).device)
    if vision is None or not row.images:
        inputs: dict[str, Any] = {"input_ids": on_device["input_T"].unsqueeze(0)}
    else:
        inputs = vision.embed(on_device["input_T"], on_device["image_I"], row.images)
    out = model.get_decoder()(
        **inputs,
        position_ids=on_device["position_T"].unsqueeze(-2),
        use_cache=False,
        segments=replace(segments, indices=CallIndices(*(on_device[name] for name in CallIndices._fields))),
        **router_options(router_hook),
    )
    if router_hook:
        router_hook([logits.flatten(0, -2) for logits in out.router_logits])
    hidden_MD = out.last_hidden_state[0, on_device["source_M"]]
    scores = score_hidden(model, hidden_MD, on_device["target_M"], squares)
    if row.place_N is not None:
        scores = tuple(values_M[on_device["place_N"]] for values_M in scores)
    return make_logps(scores, on_device["lengths_S"], row.counts)
