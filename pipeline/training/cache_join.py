"""The examples of a run: prepared data joined with the cache, without examples that lack what the objective reads."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from prefcache.pipeline.errors import DataError
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.schema import TRAIN
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.counted_logps import CountedLogps, counted_sums, wrong_length
from prefcache.pipeline.stored.prepared import CountedTokens, IdLists, Prepared
from prefcache.pipeline.stored.scored import retract_if_damaged
from prefcache.pipeline.stored.token_logps import token_logps
from prefcache.pipeline.training.bco_density_ratio import density_ratios
from prefcache.pipeline.training.dataset import Examples, SplitData
from prefcache.pipeline.training.objective import WITHOUT_GRADIENT, Objective
from prefcache.pipeline.training.run_inputs import RunSetup
from prefcache.pipeline.training.selection import Selection


def load_examples(setup: RunSetup, progress: Progress) -> dict[str, Examples]:
    """Return the examples of each split; report those that are left out, and refuse to train on none."""
    with working("join data and cache"), retract_if_damaged(setup.config.scored) if setup.scored else nullcontext():
        examples = join_cache(
            setup.objective,
            setup.prepared,
            setup.cache,
            setup.scored.accepted_numerics if setup.scored else (),
            density_ratio=setup.config.train.density_ratio,
            selection=setup.selection,
        )
    for split, each in examples.items():
        for column, n in each.left_out.items():
            is_reference = column.startswith("ref_")
            reason = "the reference has no finite log-prob for them" if is_reference else f"they have no {column}"
            progress.warn(f"{n:,} {split} examples are left out: {reason}")
    train = examples[TRAIN]
    for note in train.notes:
        progress.say(note)
    if train.missing_kind:
        progress.warn(
            f"none of the {len(train):,} labels to train on is {train.missing_kind}: nothing holds the policy against the other "
            "kind, and margins and accuracies are not logged"
        )
    if not len(train):
        missing = ", ".join(train.left_out)
        remedy = f"none has {missing}; see the warnings above" if missing else "lower prepare.held_out, or add data"
        raise DataError(f"{setup.prepared.folder} has no example to train on: {remedy}.")
    return examples


@dataclass
class _ReferenceLogps:
    """The reference's log-probs of one answer in one split."""

    split: str
    answer: str
    keys: pa.ChunkedArray
    counted: CountedTokens
    whole_sums: np.ma.MaskedArray
    sums: np.ma.MaskedArray  # of the tokens that count
    is_read_by_loss: bool  # else only the selection reads it
    tokens: CountedLogps | None = None

    @property
    def column(self) -> dict[str, np.ndarray]:
        return {f"ref_{self.answer}_logp": np.ma.filled(self.sums, np.nan)}

    @property
    def selection_columns(self) -> dict[str, np.ndarray]:
        return {**self.column, f"ref_{self.answer}_logp_all": np.ma.filled(self.whole_sums, np.nan)}


def join_cache(
    objective: Objective,
    prepared: Prepared,
    cache: Cache | None,
    accepted: Sequence[str],
    *,
    density_ratio: bool,
    selection: Selection | None = None,
) -> dict[str, Examples]:
    """Return each split's examples that have all that the objective reads; of the training split, those selected.

    Without a cache, every answer counts as scored.
    """
    tables = {split: prepared.table(split) for split in prepared.manifest.splits}
    columns = {split: _data_columns(objective, table) for split, table in tables.items()}
    if "density_ratio" in objective.columns:
        for split, ratios in _density_ratios(tables, density_ratio).items():
            columns[split]["density_ratio"] = ratios
    reference = _read_reference(objective, selection, tables, cache, accepted)
    for logps in reference:
        if logps.is_read_by_loss:
            columns[logps.split] |= logps.column

    optional = objective.without_gradient
    answers = [name for name in objective.visited if name not in optional]
    splits = {}
    for split, table in tables.items():
        tokens = {r.answer: r.tokens for r in reference if r.split == split and r.tokens is not None}
        splits[split] = SplitData(table, columns[split], answers, optional, objective.answers, tokens)
    choice = None
    if selection:
        # With train.reference_free the loss sees zeros, and the selection the reference as it is.
        seen = {
            name: values
            for logps in reference
            if logps.split == TRAIN
            for name, values in logps.selection_columns.items()
        }
        choice = selection.choose(tables[TRAIN], seen, splits[TRAIN].complete_rows)
    return {split: Examples(data, choice if split == TRAIN else None) for split, data in splits.items()}


def _data_columns(objective: Objective, table: pa.Table) -> dict[str, np.ndarray]:
    """What the prepared data gives: columns that the objective reads, and lengths, which a run's table always has."""
    columns: dict[str, np.ndarray] = {}
    lengths = (f"n_{answer}_counted" for answer in objective.visited if answer not in WITHOUT_GRADIENT)
    for name in dict.fromkeys([*lengths, *objective.columns]):
        if name.startswith("ref_") and not objective.reference_answers:
            columns[name] = np.zeros(len(table))  # train.reference_free
        elif not name.endswith("_logp") and name != "density_ratio":
            columns[name] = table[name].to_numpy().astype(np.float64)
    return columns


def _density_ratios(tables: Mapping[str, pa.Table], is_wanted: bool) -> dict[str, np.ndarray]:
    """Fit the ratios on the training split, so that an evaluation weighs prompts as training does."""
    if not is_wanted:
        return {split: np.ones(len(table)) for split, table in tables.items()}
    prompts = []
    for table in tables.values():  # first that of the training split
        ids = IdLists(table["prompt_ids"])
        prompts += [ids[row] for row in range(len(table))]
    ratios = density_ratios(prompts, tables[TRAIN]["label"].to_numpy())
    ends = np.cumsum([len(table) for table in tables.values()])
    return dict(zip(tables, np.split(ratios, ends[:-1]), strict=True))


def _read_reference(
    objective: Objective,
    selection: Selection | None,
    tables: Mapping[str, pa.Table],
    cache: Cache | None,
    accepted: Sequence[str],
) -> list[_ReferenceLogps]:
    columns = [(split, answer) for split in tables for answer in objective.reference_answers]
    by_selection = selection.reference_answers if selection else ()
    columns += [(TRAIN, answer) for answer in by_selection if answer not in objective.reference_answers]
    if not columns or cache is None:
        return []
    # In one call, so that the cache is read a single time.
    keys = [tables[split][f"{answer}_key"] for split, answer in columns]
    counted = [CountedTokens(tables[split], answer) for split, answer in columns]
    whole_sums = cache.logps(keys, accepted)
    sums = counted_sums(cache, keys, counted, whole_sums, accepted)
    reference = [
        _ReferenceLogps(split, answer, *logps, is_read_by_loss=answer in objective.reference_answers)
        for (split, answer), logps in zip(columns, zip(keys, counted, whole_sums, sums, strict=True), strict=True)
    ]
    if objective.reads_tokens:
        by_loss = [logps for logps in reference if logps.is_read_by_loss]
        keys, whole_sums = [logps.keys for logps in by_loss], [logps.whole_sums for logps in by_loss]
        for logps, tokens in zip(by_loss, token_logps(cache, keys, whole_sums, accepted), strict=True):
            if ((tokens.lengths != 0) & (tokens.lengths != logps.counted.n_all)).any():
                raise wrong_length(cache)
            logps.tokens = CountedLogps(tokens, logps.counted)
    return reference
