"""The reference cache inside TRL's trainers: no reference is loaded, and none is run.

    from trl import DPOConfig, DPOTrainer
    from prefcache.trl import CachedReference

    class Trainer(CachedReference, DPOTrainer):
        pass

    Trainer("Qwen/Qwen3-0.6B", args=DPOConfig(...), train_dataset=..., reference_cache="cache").train()

Values are looked up by the hash of the ids that TRL's own tokenization and collator give, so order, columns, truncation and padding of
the data do not matter. What the cache lacks is scored before the first step, and found the next time.

TRL asks for the reference's log-probs of a data set in `_precompute_ref_logps`, which this mixin overrides. The method is not public,
so a version of TRL that was not tested is refused.

Shapes: N sequences of a batch, T tokens of the longest.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

import prefcache
from prefcache.pipeline import identity, process_pool
from prefcache.pipeline.errors import DataError, IdentityError, UsageError
from prefcache.pipeline.stored.lookups import Logps
from prefcache.pipeline.stored.token_logps import ranges
from prefcache.reference_cache import ReferenceCache

TESTED_VERSIONS = ("1.16",)
_ROWS_AT_ONCE = 512


class _Answer(NamedTuple):
    """Where a collated batch has the sequences of an answer, and the column for their reference log-probs."""

    column: str
    prefix: str  # of input_ids, attention_mask and completion_mask
    part: int  # which of the equal parts of the batch
    n_parts: int


_PAIRS = (_Answer("ref_chosen_logps", "", 0, 2), _Answer("ref_rejected_logps", "", 1, 2))
_LABELS = (_Answer("ref_logps", "", 0, 1), _Answer("ref_KL_logps", "KL_", 0, 1))


class CachedReference:
    """Mixin for TRL's DPOTrainer and KTOTrainer, to be named before them.

    `reference_cache` is the folder of a cache, or what `prefcache.open_cache` returns, for a reference other than the model that the
    policy is loaded from. With `score_missing=False`, sequences that the cache lacks are refused instead of scored.
    """

    # Attributes of the trainer that this is mixed into.
    args: Any
    data_collator: Any
    ld_alpha: Any
    model: Any
    ref_model: Any
    state: Any

    def __init_subclass__(cls, **options: Any) -> None:
        from transformers import Trainer

        super().__init_subclass__(**options)
        before = cls.__mro__[1 : cls.__mro__.index(CachedReference)]
        # Such a trainer would load a reference, and never ask the cache.
        if other := next(
            (each for each in before if not issubclass(each, CachedReference) and issubclass(each, Trainer)), None
        ):
            raise UsageError(
                f"{cls.__name__} names {other.__name__} before CachedReference. Write "
                f"`class {cls.__name__}(CachedReference, {other.__name__})`."
            )

    def __init__(
        self,
        *arguments: Any,
        reference_cache: str | Path | ReferenceCache = "cache",
        score_missing: bool = True,
        **named: Any,
    ) -> None:
        _refuse_untested_version()
        self._answers = self._find_answers()
        given = _name_arguments(super().__init__, arguments, named)
        _refuse_unsupported(given)
        self._score_missing, self._is_start_checked = score_missing, False
        self._reference_cache, self._starts_at_reference = _open_reference(reference_cache, given)
        given["args"] = self._request_precompute(given.get("args"), given["model"])
        # TRL would hash the whole policy, and under FSDP load a reference, if there were none. DeepSpeed initializes what it is given.
        if given["args"].deepspeed_plugin is None:
            given["ref_model"] = _make_stand_in(self._reference_cache)
        super().__init__(**given)
        _drop_adapter_copy(self.model)
        # A trainer without a reference would refuse to evaluate further data after the first step.
        self.ref_model = self.ref_model or _make_stand_in(self._reference_cache)

    def _find_answers(self) -> tuple[_Answer, ...]:
        from trl import DPOTrainer, KTOTrainer

        for trainer, answers in ((DPOTrainer, _PAIRS), (KTOTrainer, _LABELS)):
            if isinstance(self, trainer):
                return answers
        raise UsageError(
            f"{type(self).__name__} is neither a DPOTrainer nor a KTOTrainer. Write `class Trainer(CachedReference, DPOTrainer)`."
        )

    def _request_precompute(self, args: Any, model: Any) -> Any:
        """A copy of the trainer's arguments that asks for precomputed log-probs."""
        from trl import DPOConfig, DPOTrainer, KTOConfig

        if args is None:
            kind, make = ("DPO", DPOConfig) if isinstance(self, DPOTrainer) else ("KTO", KTOConfig)
            args = make(f"{_name_of(model).rpartition('/')[2]}-{kind}")
        if args.sync_ref_model:
            raise UsageError(
                "sync_ref_model moves the reference, and no cached log-prob would be its. Leave it out, or train with "
                "prefcache's own trainer, which has train.moving_reference."
            )
        args = copy.copy(args)
        args.precompute_ref_log_probs = True
        return args

    # -- the reference's log-probs of a data set -----------------------------------------------------------------------

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Add the cached log-probs to a data set that TRL has tokenized."""
        from datasets import Dataset, concatenate_datasets

        if not isinstance(dataset, Dataset):
            raise UsageError(
                f"The {name} data is a stream ({type(dataset).__name__}), and what the cache lacks of it cannot be scored before the "
                "first step. Load it whole (streaming=False)."
            )
        sequences = self._collate_all(dataset)
        columns = self._sum(sequences, self._look_up(_Sequences.join(list(sequences.values())), name))
        kept = dataset.remove_columns([column for column in columns if column in dataset.column_names])
        return concatenate_datasets([kept, Dataset.from_dict(columns)], axis=1)

    def _collate_all(self, dataset: Any) -> dict[str, "_Sequences"]:
        """The sequences of each answer, as TRL's collator cuts and joins them."""
        parts: dict[str, list[_Sequences]] = {}
        rows = dataset.select_columns(self._collated_columns(dataset)).with_format(None)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            examples = [dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True)]
            batch = self.data_collator(examples)
            for answer in self._answers:
                if f"{answer.prefix}input_ids" in batch:
                    parts.setdefault(answer.column, []).append(_Sequences.from_batch(batch, answer))
        return {column: _Sequences.join(each) for column, each in parts.items()}

    def _collated_columns(self, dataset: Any) -> list[str]:
        """The columns that the trainer passes to its collator, without log-probs of an earlier time."""
        names = list(dataset.column_names)
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()  # type: ignore[attr-defined]
            names = [name for name in names if name in {*self._signature_columns, "label"}]  # type: ignore[attr-defined]
        return [name for name in names if name not in {answer.column for answer in self._answers}]

    def _look_up(self, sequences: "_Sequences", name: str) -> Logps:
        """Look up all sequences that have a completion. Score what the cache lacks, or refuse it."""
        scored, cache = sequences.with_tokens(), self._reference_cache
        found = cache.logps(*scored, per_token=self._weighs_tails)
        if (n := int(found.missing.sum())) and not self._score_missing:
            raise UsageError(
                f"{cache.folder} lacks {n:,} of {len(found):,} sequences of the {name} data. Leave score_missing at True, or score them "
                "first (prefcache score CONFIG, with the template and the lengths that TRL uses)."
            )
        if n:
            cache.score(*scored.filter(found.missing))
            found = cache.logps(*scored, per_token=self._weighs_tails)
        if n_failed := int(found.failed.sum()):
            raise DataError(
                f"The reference has no finite log-prob for {n_failed:,} of {len(found):,} sequences of the {name} data. Leave those "
                f"rows out; `prefcache verify {cache.folder}` counts them."
            )
        return found

    @property
    def _weighs_tails(self) -> bool:
        """Whether tokens beyond the length of the pair's shorter answer count `ld_alpha` (LD-DPO)."""
        return getattr(self, "ld_alpha", None) is not None

    def _sum(self, sequences: dict[str, "_Sequences"], found: Logps) -> dict[str, np.ndarray]:
        """The column of each answer. A completion that was cut off as a whole has no tokens to sum."""
        lengths = [each.lengths for each in sequences.values()]
        sum_N: np.ndarray = np.zeros(sum(map(len, lengths)))
        if found.tokens is None:
            sum_N[np.concatenate(lengths) > 0] = found.sums
        else:
            length_N, shared_N = np.concatenate(lengths), np.tile(np.minimum(*lengths), len(lengths))
            position = ranges(np.zeros_like(length_N), length_N)
            weights = np.where(position < np.repeat(shared_N, length_N), 1.0, self.ld_alpha)
            of_sequence = np.repeat(np.arange(len(length_N)), length_N)
            sum_N = np.bincount(of_sequence, found.tokens.flatten().to_numpy() * weights, len(length_N))
        return dict(zip(sequences, np.split(sum_N, np.cumsum([len(each) for each in lengths])[:-1]), strict=True))

    # -- the first step ------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        """Compute TRL's loss; in the first step, compare the policy's log-probs with the cached ones."""
        compute = super().compute_loss  # type: ignore[misc]
        if self._is_start_checked or not self.model.training or self.state.global_step:
            return compute(model, inputs, *arguments, **named)
        with _seen_logps(model) as seen:
            loss = compute(model, inputs, *arguments, **named)
        if seen and self.args.disable_dropout:
            self._check_start(seen[0], inputs)
        else:
            reason = "dropout is on" if seen else "the loss asks the model for no log-probs"
            self._reference_cache.progress.say(f"trl: {reason}, so the first step was not compared with the cache")
        # Only now: after a refusal, another call of train() is refused as well.
        self._is_start_checked = True
        return loss

    def _check_start(self, token_logps_NT: Any, inputs: Any) -> None:
        """Refuse a cache whose values are not the policy's before its first update."""
        import torch

        from prefcache.pipeline.training.start_check import start_tolerance

        n_tokens_N = inputs["completion_mask"][:, 1:].sum(1)
        weights_NT = self._token_weights(inputs["completion_mask"][:, 1:])
        policy_N = (token_logps_NT[:, -weights_NT.shape[1] :] * weights_NT).sum(1)
        cached_N = torch.cat([inputs[each.column] for each in self._answers if not each.prefix])
        worst = float(((policy_N - cached_N).abs() / n_tokens_N.clamp(min=1)).max())
        tolerance = start_tolerance(self._dtypes())
        found = (
            f"the policy starts within {worst:.1e} nats per token of the cached reference ({len(policy_N)} sequences)"
        )
        if not worst <= tolerance and self._starts_at_reference:
            raise IdentityError(
                f"The policy is loaded from {self._reference_cache.config.model}, yet its log-probs differ from the cached ones by "
                f"{worst:.3g} nats per token at the start; {tolerance} is rounding. Its weights are not those of that model: name the "
                "reference (reference_cache=prefcache.open_cache(FOLDER, model=MODEL)), or load the policy from its folder."
            )
        self._reference_cache.progress.say(f"trl: {found}")

    def _token_weights(self, mask_NT: Any) -> Any:
        if not self._weighs_tails:
            return mask_NT
        shared = mask_NT.sum(1).reshape(2, -1).amin(0).repeat(2)
        return mask_NT.where(mask_NT.cumsum(1) <= shared[:, None], mask_NT * self.ld_alpha)

    def _dtypes(self) -> list[str]:
        """The dtypes in which the policy and the cached rows were computed."""
        args = self.args
        arithmetic = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(self.model.dtype).rpartition(".")[2]
        return [arithmetic, *map(identity.coarsest_dtype, self._reference_cache.stored_numerics)]


# -- before TRL's own start ----------------------------------------------------------------------------------------------


def _refuse_untested_version() -> None:
    installed = version("trl")
    if not installed.startswith(tuple(f"{known}." for known in TESTED_VERSIONS)):
        raise UsageError(
            f"TRL {installed} is installed, and prefcache.trl was tested with {' and '.join(TESTED_VERSIONS)}. Install one of those "
            f"(pip install 'trl=={TESTED_VERSIONS[-1]}.*')."
        )


def _name_arguments(init: Callable[..., None], arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a trainer, also where a class of the user's passes them on as **kwargs."""
    signature = inspect.signature(init)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*arguments, **named).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(f"The trainer's __init__ takes *{name}. Pass its arguments by name (model=..., args=...).")
        given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    if given.get("model") is None:
        raise UsageError("No policy was given. Pass its folder, hub id or the loaded model: model=MODEL.")
    return given


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    if given.get("ref_model") is not None:
        raise UsageError(
            "ref_model is a loaded model, in whose place the cache is used. Leave it out, and name what it is loaded from: "
            'reference_cache=prefcache.open_cache("cache", model=MODEL).'
        )
    data = given.get("train_dataset")
    if data is not None and {"image", "images"} & next(iter(data), {}).keys():
        raise UsageError(
            "The data has images, for which TRL takes no log-probs that were computed before. Train with prefcache (prefcache guide "
            "images), or with TRL alone."
        )


def _open_reference(cache: str | Path | ReferenceCache, given: Mapping[str, Any]) -> tuple[ReferenceCache, bool]:
    """The cache, and whether its reference is what the policy is loaded from."""
    model = given["model"]
    if isinstance(cache, ReferenceCache):
        return cache, _is_same_place(cache, model)
    if getattr(model, "peft_config", None):
        raise UsageError(
            "The policy is a PEFT model already, so its reference may be its adapter or its base model. Say which: "
            'reference_cache=prefcache.open_cache("cache", model=BASE, adapter=FOLDER), or without adapter.'
        )
    if given.get("quantization_config") is not None or getattr(model, "is_quantized", False):
        raise UsageError(
            "The policy is quantized, and so is TRL's reference. Say how: reference_cache=prefcache.open_cache("
            '"cache", model=MODEL, score={"quantization": "4bit"}), or without quantization for the reference as saved.'
        )
    revision = (getattr(given.get("args"), "model_init_kwargs", None) or {}).get("revision")
    is_main = process_pool.rank_and_world()[0] == 0
    return prefcache.open_cache(cache, model=_name_of(model), revision=revision, quiet=not is_main), True


def _name_of(model: Any) -> str:
    """The folder or hub id that a model was loaded from."""
    name = _place_of(model)
    if not name:
        raise UsageError(
            "The policy was not loaded from a folder or the hub, so its reference has no name. Name one: "
            'reference_cache=prefcache.open_cache("cache", model=MODEL).'
        )
    return name


def _place_of(model: Any) -> str:
    return model if isinstance(model, str) else str(model.config._name_or_path)


def _is_same_place(cache: ReferenceCache, model: Any) -> bool:
    name = _place_of(model)
    has_adapter = bool(getattr(model, "peft_config", None))
    is_same = cache.config.model == name or Path(cache.config.model).resolve() == Path(name).resolve()
    return is_same and cache.config.adapter is None and not has_adapter


def _make_stand_in(cache: ReferenceCache) -> Any:
    """Make a module in the reference's place that has no weights and cannot be run."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from transformers import AutoConfig

    class NoReference(FSDPModule, torch.nn.Module):
        """TRL shards a reference under FSDP unless it is sharded already, as this claims to be."""

        def __new__(cls, config: Any) -> "NoReference":
            return object.__new__(cls)  # that of FSDPModule makes a module of another class

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

        def to(self, *arguments: Any, **named: Any) -> Any:
            return self  # there is nothing to move

        def forward(self, *arguments: Any, **named: Any) -> Any:
            raise AssertionError("the reference is cached, and must not be run")

    return NoReference(AutoConfig.from_pretrained(cache.reference.folder, trust_remote_code=False))


def _drop_adapter_copy(model: Any) -> None:
    """Delete the frozen copy of the policy's adapter that TRL keeps as its reference."""
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")


# -- sequences -----------------------------------------------------------------------------------------------------------


class _Sequences(NamedTuple):
    """Sequences of one answer, in the order of the data."""

    prompts: pa.Array
    completions: pa.Array

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], answer: _Answer) -> "_Sequences":
        """Split collated rows at the beginning of their completions."""
        names = ("input_ids", "attention_mask", "completion_mask")
        ids_NT, is_token_NT, is_completion_NT = (
            batch[f"{answer.prefix}{name}"].chunk(answer.n_parts)[answer.part].numpy() for name in names
        )
        is_token_NT, is_completion_NT = (
            is_token_NT.astype(bool),
            is_completion_NT.astype(bool) & is_token_NT.astype(bool),
        )
        # A first token has no log-prob, also where truncation left nothing of the prompt.
        is_completion_NT[np.arange(len(ids_NT)), is_token_NT.argmax(1)] = False
        starts_again = is_token_NT[:, 1:] & is_completion_NT[:, :-1] & ~is_completion_NT[:, 1:]
        if starts_again.any():
            raise UsageError(
                "The collator's completion_mask leaves out tokens in the middle of a completion, and the cache has log-probs of "
                "whole completions. Use TRL's own collator."
            )
        return cls(*(_lists(ids_NT, where) for where in (is_token_NT & ~is_completion_NT, is_completion_NT)))

    @classmethod
    def join(cls, parts: "list[_Sequences]") -> "_Sequences":
        return cls(*(pa.concat_arrays([part[i] for part in parts]) for i in range(2)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each completion."""
        lengths: np.ndarray = self.completions.value_lengths().to_numpy()
        return lengths

    def with_tokens(self) -> "_Sequences":
        """Leave out those whose completion was cut off as a whole."""
        return self.filter(self.lengths > 0)

    def filter(self, mask: np.ndarray) -> "_Sequences":
        return _Sequences(*(lists.filter(pa.array(mask)) for lists in self))


def _lists(ids_NT: np.ndarray, where_NT: np.ndarray) -> pa.Array:
    # Large lists: all completions of a data set may have more tokens than int32 counts.
    offsets = np.concatenate([[0], np.cumsum(where_NT.sum(1))]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids_NT[where_NT].astype(np.int32)))


@contextmanager
def _seen_logps(model: Any) -> Iterator[list[Any]]:
    """Collect the log-probs of each forward of the policy that has gradients."""
    import torch

    seen: list[Any] = []

    def look(module: Any, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled() and getattr(output, "log_probs", None) is not None:
            seen.append(output.log_probs.detach())

    handle = model.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
