"""A reference's log-probs, looked up by token ids, and scored where the cache lacks them.

The key of a value is the hash of the very ids, so it does not matter where a sequence comes from or what order it is in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prefcache.command_results import ScoreResult
from prefcache.pipeline import config_file, identity, process_pool
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import IDS, IMAGE_IDS, KEY
from prefcache.pipeline.scoring import refusals
from prefcache.pipeline.scoring.engines import find_engine, refuse_unused
from prefcache.pipeline.scoring.scorer import Scorer, Share, follow, plan_after_repairs, sample_slots
from prefcache.pipeline.stored.cache import Cache, find_folder
from prefcache.pipeline.stored.cache_writer import CacheWriter, create_cache
from prefcache.pipeline.stored.gguf_conversion import convert_models
from prefcache.pipeline.stored.id_lists import read_sequences, sequence_keys
from prefcache.pipeline.stored.lookups import Logps, look_up
from prefcache.pipeline.stored.mirror import open_root
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.prepared import Sequences, sequence_table
from prefcache.pipeline.stored.records import REFERENCE_FILE
from prefcache.pipeline.stored.scoring_plan import Plan, plan_scoring


class ReferenceCache:
    """The cached log-probs of one reference model.

    In a `with` block, the model stays loaded between calls of `score`, until the block ends.
    """

    def __init__(self, config: Config, progress: Progress) -> None:
        refuse_unused(config.score)
        self.config, self.progress = config, progress
        root = open_root(config.cache)
        with progress:
            convert_models(config, progress)
            self.reference = identity.find_reference(config)
            # The hashes of the weights are remembered only where a cache exists: a mere lookup creates nothing.
            self._described = identify(self.reference, root, remember=root.is_dir())
            self._cache = self._open()
        self._numerics: dict[str, str] | None = None
        self._scorer: Scorer | None = None
        self._keeps_model = False

    @classmethod
    def open(
        cls,
        cache: str | Path,
        model: str | Path,
        adapter: str | Path | None,
        revision: str | None,
        score: Mapping[str, Any],
        allowed_signers: str | Path | None,
        progress: Progress,
    ) -> "ReferenceCache":
        tree = {"model": model, "adapter": adapter, "revision": revision, "score": score}
        tree |= {"allowed_signers": allowed_signers}
        if not isinstance(cache, str | Path) or Path(cache).is_file():
            raise UsageError(f"open_cache: cache is {cache!r}; expected a folder.")
        # Neither data nor a place for an experiment is needed here.
        unused = {"out": ".", "prepare": {"data": ["-"]}}
        config = config_file.from_tree(config_file.to_plain(tree | unused | {"cache": cache}), source="open_cache: ")
        if config.score.ray is not None:
            raise UsageError("open_cache: score.ray starts its own processes; score with `prefcache score CONFIG`.")
        return cls(config, progress)

    def __enter__(self) -> "ReferenceCache":
        self._keeps_model = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, if one is loaded. Lookups still work."""
        self._keeps_model = False
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None

    @property
    def model_id(self) -> str:
        return str(self._described["model_id"])

    @property
    def folder(self) -> Path:
        return self._cache.folder

    @property
    def numerics(self) -> dict[str, str]:
        """How this engine computes what it scores."""
        if self._numerics is None:
            self._numerics = find_engine(self.config.score.engine).numerics(self.reference, self.config.score)
        return self._numerics

    @property
    def stored_numerics(self) -> list[dict[str, str]]:
        """How the rows that lookups serve were computed."""
        known = self._cache.numerics()
        return [known[name] for name in self._accepted_for_lookups() if name in known]

    def __len__(self) -> int:
        """The number of rows in the cache."""
        return sum(record.rows for record in self._cache.records)

    def __repr__(self) -> str:
        return f"<ReferenceCache {self._cache.place}: {len(self):,} sequences of {self.config.model}>"

    # -- lookups -----------------------------------------------------------------------------------------------------

    def logps(self, prompt_ids: Any, completion_ids: Any, *, per_token: bool = False) -> Logps:
        """Look up the log-prob of each completion after its prompt.

        Both are lists with one list (or array) of token ids per sequence, or Arrow columns of such lists. A missing sequence
        is no error: `missing` says which.
        """
        return self._look_up(sequence_keys(read_sequences(prompt_ids, completion_ids)), per_token)

    def logps_of_keys(self, keys: pa.Array | pa.ChunkedArray, *, per_token: bool = False) -> Logps:
        """Look up by keys, as prepared data has them (chosen_key, rejected_key, completion_key)."""
        column = pa.chunked_array([keys]) if isinstance(keys, pa.Array) else keys
        if column.type != KEY:
            raise UsageError(f"The keys have the type {column.type}; expected {KEY}, as in prepared data.")
        return self._look_up(column, per_token)

    def _look_up(self, keys: pa.ChunkedArray, per_token: bool) -> Logps:
        self._cache = self._open()
        return look_up(self._cache, keys, self._accepted_for_lookups(), per_token=per_token)

    def _open(self) -> Cache:
        """The cache as it is on disk now; an empty one if it does not exist yet."""
        root = self.config.cache_folder
        folder = find_folder(root, self.config.model, self.model_id)
        if (folder / REFERENCE_FILE).is_file():
            return Cache(folder, self.model_id, allowed_signers=self.config.signers_file)
        return Cache.preview(root, self.config.model, self._described, self.config.signers_file)

    def _accepted(self) -> list[str]:
        return [identity.numerics_id(self.numerics), *self.config.score.accept_numerics]

    def _accepted_for_lookups(self) -> list[str]:
        """The numerics whose rows are served. Where all rows have the same, those: nothing can be mixed then."""
        known = list(self._cache.numerics())
        return known if len(known) == 1 else self._accepted()

    # -- scoring -----------------------------------------------------------------------------------------------------

    def score(self, prompt_ids: Any, completion_ids: Any) -> ScoreResult:
        """Score the sequences that the cache lacks, by the engine and with the check of `prefcache score`.

        Started by torchrun or accelerate, the processes share the work, and each returns when all of it is done.
        """
        with self.progress:
            return self._score(read_sequences(prompt_ids, completion_ids))

    def _score(self, sequences: pa.Table) -> ScoreResult:
        examples = _as_examples(sequences)
        table = sequence_table(examples)
        self._cache = create_cache(
            self.config.cache_folder, self.config.model, self._described, self.config.signers_file
        )
        plan = plan_after_repairs(self._cache, table, self._accepted(), self.config.score, self.progress)
        refusals.refuse_mixed_numerics(self._cache, plan, self.numerics, self.config.score)
        before, share = plan, Share(0, 0)
        if plan.n_missing:
            CacheWriter(self._cache).refuse_read_only()
            numerics_id = identity.numerics_id(self.numerics)
            refusals.refuse_unsigned(self._cache, plan, Sequences(examples), numerics_id, self.config.score)
            refusals.refuse_unfit(self.reference.folder, table, examples)
            scorer = self._load(Sequences(examples), plan)
            try:
                share = follow(scorer.run(plan, *process_pool.rank_and_world()), plan, self.progress)
            finally:
                if not self._keeps_model:
                    self.close()
            self._cache = self._open()
            plan = plan_scoring(self._cache, table, self._accepted(), self.config.score.tokens_per_shard)
            refusals.refuse_unscored(self._cache, plan)
        return ScoreResult(
            cache=self._cache.place,
            sequences=plan.n_sequences,
            cached_before=before.n_hits,
            scored=share.n_sequences,
            tokens=share.n_tokens,
            scored_by_others=before.n_missing - share.n_sequences,
            failed=plan.n_failed,
            parity=self._cache.worst_parity(self._accepted()),
            changed=bool(before.n_missing),
        )

    def _load(self, sequences: Sequences, plan: Plan) -> Scorer:
        """Load the engine and check it; a model that is kept loaded was checked before."""
        if self._scorer is not None:
            self._scorer.turn_to(self._cache, sequences)
            return self._scorer
        score = self.config.score
        scorer = Scorer(score, self.reference, self.numerics, self._cache, sequences, self.progress)
        try:
            scorer.check(sample_slots(plan, sequences, score.parity_sample))
        except BaseException:
            scorer.close()
            raise
        self._scorer = scorer
        return scorer


def _as_examples(sequences: pa.Table) -> pa.Table:
    """The sequences as examples with one answer each, which a scorer reads."""
    n, none = len(sequences), pa.nulls(len(sequences), IDS)
    return pa.table(
        {
            "prompt_ids": sequences["prompt_ids"],
            "images": pa.nulls(n, IMAGE_IDS),
            "n_prompt": _lengths(sequences["prompt_ids"]),
            "completion_ids": sequences["completion_ids"],
            "n_completion": _lengths(sequences["completion_ids"]),
            "completion_key": sequence_keys(sequences),
            "kl_ids": none,
            "n_kl": pa.nulls(n, pa.int32()),
            "kl_key": pa.nulls(n, KEY),
        }
    )


def _lengths(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(pc.list_value_length(lists), pa.int32())
