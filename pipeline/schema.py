"""What is stored: the columns of every table, and the key of a sequence.

A sequence is prompt ids + completion ids, the unit of scoring. Its key is a hash of exactly those ids and of where
the completion begins, so a cached row is either right or missing.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import pyarrow as pa

KEY_VERSION = 1
PREPARED_VERSION = 3
CACHE_VERSION = 1

TRAIN, HELD_OUT = "train", "held_out"
OK = "ok"
OK_IN_FLOAT32 = "ok: computed in float32"


class Sequence(NamedTuple):
    prompt_ids: np.ndarray
    completion_ids: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def key(self) -> bytes:
        return sequence_key(self.prompt_ids, self.completion_ids)


def sequence_key(prompt_ids: SequenceOf[int] | np.ndarray, completion_ids: SequenceOf[int] | np.ndarray) -> bytes:
    """blake2b-128 over (key version, number of prompt ids, all ids as little-endian int32)."""
    return key_of_bytes(
        np.asarray(prompt_ids, dtype="<i4").tobytes(), np.asarray(completion_ids, dtype="<i4").tobytes()
    )


def key_of_bytes(prompt: bytes, completion: bytes) -> bytes:
    """The same, of ids that are little-endian int32 already."""
    digest = _begun(prompt)
    digest.update(completion)
    return digest.digest()


def keys_of_prefixes(prompt: bytes, completion: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """The keys of the prompt with the first so many tokens of the completion, for each of these ascending numbers."""
    digest, at = _begun(prompt), 0
    for length in lengths:
        # No token is hashed twice, however many lengths there are.
        digest.update(completion[4 * at : 4 * length])
        at = length
        yield digest.copy().digest()


def _begun(prompt: bytes) -> "hashlib.blake2b":
    digest = hashlib.blake2b(struct.pack("<II", KEY_VERSION, len(prompt) // 4), digest_size=16)
    digest.update(prompt)
    return digest


KEY = pa.binary(16)
IDS = pa.list_(pa.int32())

_EXAMPLE = [
    ("example_id", pa.string()),  # hash of its keys, so it outlives reordering and appending
    ("split", pa.string()),  # train or held_out
    ("source", pa.string()),
    ("line", pa.int64()),
    ("prompt", pa.string()),  # as text, for SQL and people
]
_ENCODED = [
    ("boundary", pa.string()),  # exact: the prompt's ids are a prefix of the whole's; split: cut there by hand
    ("n_prompt", pa.int32()),
    ("cut_prompt", pa.int32()),  # tokens left out at its beginning
]

# What is cut off an answer is kept beside it (*_cut_ids; empty where nothing was cut). It is no part of the sequence or
# of its key. But an answer's tokens have the same log-probs whatever follows them, so where the cache holds a longer cut,
# or the whole, the shorter is a part of that; and the longer one's key takes the ids that are no longer there.

# One row per pair: a prompt with a chosen and a rejected answer.
PAIRS = pa.schema(
    [
        *_EXAMPLE,
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_score", pa.float64()),  # the data's own grades, where it has any
        ("rejected_score", pa.float64()),
        ("prompt_ids", IDS),  # as the model sees them
        ("chosen_ids", IDS),
        ("rejected_ids", IDS),
        ("chosen_key", KEY),
        ("rejected_key", KEY),
        *_ENCODED,
        ("n_chosen", pa.int32()),
        ("n_rejected", pa.int32()),
        ("cut_chosen", pa.int32()),  # tokens cut from its end
        ("cut_rejected", pa.int32()),
        ("chosen_cut_ids", IDS),  # these tokens
        ("rejected_cut_ids", IDS),
    ]
)

# One row per label: a prompt with one answer, which is good or not.
LABELS = pa.schema(
    [
        *_EXAMPLE,
        ("completion", pa.string()),
        ("label", pa.bool_()),
        ("prompt_ids", IDS),
        ("completion_ids", IDS),
        ("completion_key", KEY),
        *_ENCODED,
        ("n_completion", pa.int32()),
        ("cut_completion", pa.int32()),
        ("completion_cut_ids", IDS),
        ("kl_of", pa.string()),  # the example whose answer stands in for one that does not belong to the prompt
        ("kl_ids", IDS),
        ("kl_cut_ids", IDS),  # what was cut off it, for itself or for this prompt
        ("kl_key", KEY),
        ("n_kl", pa.int32()),
    ]
)
PREPARED = {"pairs": PAIRS, "labels": LABELS}
# The answers of an example, each of which makes a sequence with the prompt.
ANSWERS = {"pairs": ("chosen", "rejected"), "labels": ("completion", "kl")}

# One row per record that could not become an example.
QUARANTINE = pa.schema(
    [
        ("source", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("raw", pa.binary()),
    ]
)

# One row per scored sequence. Raw values only: nothing that a training argument could make stale.
CACHE = pa.schema(
    [
        ("key", KEY),
        ("n_prompt", pa.int32()),
        ("n_completion", pa.int32()),
        ("logp_sum", pa.float64()),
        ("logps", pa.list_(pa.float32())),
        ("numerics_id", pa.string()),
        ("status", pa.string()),  # ok, or why there is no value
    ]
)

# One row per example at each visit of a run. Rewards are derived from it, in SQL. A pair has no columns of a label and the other
# way round; a run without a reference has none of the reference's. A reference that moves is the one of that step. Log-probs are
# plain sums, however the loss weighed tokens.
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.float64()),
        ("split", pa.string()),
        ("example_id", pa.string()),
        ("chosen_logp", pa.float64()),
        ("rejected_logp", pa.float64()),
        ("ref_chosen_logp", pa.float64()),
        ("ref_rejected_logp", pa.float64()),
        ("completion_logp", pa.float64()),
        ("ref_completion_logp", pa.float64()),
        ("n_chosen", pa.int32()),
        ("n_rejected", pa.int32()),
        ("n_completion", pa.int32()),
        ("label", pa.bool_()),  # whether the answer is a desirable one
        ("loss", pa.float64()),
    ]
)

# The metrics of one step, under TRL's names; of labels, chosen are the desirable answers and rejected the undesirable ones.
# Beside them stand a loss's statistics, and `loss/NAME` of each term where there are several.
BATCH_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
METRICS = pa.schema(
    [("step", pa.int64()), ("epoch", pa.float64())]
    + [(name, pa.float64()) for name in (*BATCH_METRICS, "grad_norm", "learning_rate")]
    + [("num_tokens", pa.int64())]
    + [(f"eval_{name}", pa.float64()) for name in BATCH_METRICS]
)

# What went wrong along a run, one row per alert (alerts.py).
EVENTS = pa.schema(
    [
        ("step", pa.int64()),
        ("kind", pa.string()),
        ("severity", pa.string()),  # note, warning or error
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("seen", pa.string()),
        ("why", pa.string()),
        ("try", pa.string()),
    ]
)

# How fast each step was, and the most memory that the process had taken by then. Apart from METRICS, which are the same numbers
# each time that a run is made.
THROUGHPUT = pa.schema(
    [
        ("step", pa.int64()),
        ("seconds", pa.float64()),
        ("examples_per_second", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("peak_memory_bytes", pa.int64()),  # of the GPU's where there is one
        ("flops", pa.float64()),  # of the process that writes, as flops.py counts them
        ("mfu", pa.float64()),  # its share of what its GPU could do in bf16 at best; NULL where that is not known
    ]
)

SAMPLES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt", pa.string()),
        ("before", pa.string()),
        ("after", pa.string()),
        ("before_kind", pa.string()),
        ("after_kind", pa.string()),
    ]
)

# The held-out examples whose log-probs moved most the right way and the wrong way, one row per answer, token by token.
TOKENS = pa.schema(
    [
        ("example_id", pa.string()),
        ("gain", pa.float64()),  # nats, from before the first step to after the last
        ("answer", pa.string()),
        ("tokens", pa.list_(pa.string())),  # as text
        ("logps", pa.list_(pa.float32())),  # of the policy, after the last step
        ("ref_logps", pa.list_(pa.float32())),  # null where the run reads no reference, or the cache has sums only
    ]
)
