"""What is stored: the columns of every table, and the key of a sequence.

A sequence is prompt ids + completion ids, with the images of its prompt: the unit of scoring. Its key is a hash of exactly
those and of where the completion begins, so a cached row is either right or missing. An image's id is a hash of its pixels
and of the processor that prepares them for the model.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

KEY_VERSION = 1
IMAGES_KEY_VERSION = 2  # of sequences with images; those without keep their keys
PREPARED_VERSION = 4
CACHE_VERSION = 1

TRAIN, HELD_OUT = "train", "held_out"
OK = "ok"
OK_IN_FLOAT32 = "ok: computed in float32"


class TokenSequence(NamedTuple):
    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    counted: np.ndarray | None = None  # positions of the completion tokens whose log-probs are wanted; None: all
    images: tuple[bytes, ...] = ()  # ids of the prompt's images, in their order

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt_ids, self.completion_ids])

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def counted_positions(self) -> np.ndarray:
        return np.arange(len(self.completion_ids)) if self.counted is None else self.counted

    @property
    def n_counted(self) -> int:
        return len(self.completion_ids) if self.counted is None else len(self.counted)

    @property
    def prompt(self) -> tuple[bytes, tuple[bytes, ...]]:
        """The prompt as a value: two sequences with equal ones have one prompt."""
        return self.prompt_ids.tobytes(), self.images

    def key(self) -> bytes:
        return sequence_key(self.prompt_ids, self.completion_ids, self.images)


def sequence_key(
    prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray, images: Sequence[bytes] = ()
) -> bytes:
    """blake2b-128 over (key version, number of prompt ids, all ids as little-endian int32).

    With images, their number and ids stand between the prompt's ids and the completion's.
    """
    return key_of_bytes(
        np.asarray(prompt_ids, dtype="<i4").tobytes(), np.asarray(completion_ids, dtype="<i4").tobytes(), images
    )


def key_of_bytes(prompt: bytes, completion: bytes, images: Sequence[bytes] = ()) -> bytes:
    """The same, of ids that are little-endian int32 already."""
    digest = _start_digest(prompt, images)
    digest.update(completion)
    return digest.digest()


def keys_of_prefixes(
    prompt: bytes, completion: bytes, lengths: Iterable[int], images: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """The keys of the prompt with the first n tokens of the completion, for each n of `lengths`, which ascend."""
    digest, at = _start_digest(prompt, images), 0
    for length in lengths:
        # No token is hashed twice, however many lengths there are.
        digest.update(completion[4 * at : 4 * length])
        at = length
        yield digest.copy().digest()


def _start_digest(prompt: bytes, images: Sequence[bytes]) -> "hashlib.blake2b":
    version = IMAGES_KEY_VERSION if images else KEY_VERSION
    digest = hashlib.blake2b(struct.pack("<II", version, len(prompt) // 4), digest_size=16)
    digest.update(prompt)
    if images:
        digest.update(struct.pack("<I", len(images)))
        digest.update(b"".join(images))
    return digest


def image_id(pixel_hash: bytes, processor_id: bytes, *, one_of_several: bool = False) -> bytes:
    """Name a picture as one processor prepares it: blake2b-128 over its pixels' hash and its processor's id.

    `one_of_several`: it shares its prompt with others, and the processor treats such a picture in another way.
    """
    return hashlib.blake2b(pixel_hash + processor_id + bytes([one_of_several]), digest_size=16).digest()


KEY = pa.binary(16)
IDS = pa.list_(pa.int32())
IMAGE_IDS = pa.list_(KEY)

_EXAMPLE = [
    ("example_id", pa.string()),  # hash of its keys, so it outlives reordering and appending
    ("split", pa.string()),  # train, held_out, or a set of prepare.held_out_data
    ("source", pa.string()),
    ("line", pa.int64()),
    ("prompt", pa.string()),  # as text, for SQL and people
]
_ENCODED = [
    ("boundary", pa.string()),  # exact: the prompt's ids are a prefix of the whole's; split: cut there by hand
    ("n_prompt", pa.int32()),
    ("cut_prompt", pa.int32()),  # tokens left out at its beginning
    ("images", IMAGE_IDS),  # of the prompt, in their order; empty if it has none
]

# What is cut off an answer is kept next to it (*_cut_ids; empty if nothing was cut), but is not part of the sequence or its key. An
# answer's tokens have the same log-probs whatever follows them, so if the cache holds a longer cut or the whole answer, the values
# of the shorter one are its beginning. These ids are needed to compute the key of the longer one.


@dataclass(frozen=True)
class DataColumn:
    """A number that the data gives an example, next to its texts; NULL where a record has none.

    An entry in DATA_COLUMNS is all that a column takes: `prepare` reads it from the records and stores it, losses may
    read it and are refused where the data lacks it, and the views `examples` and `pairs` show it.
    """

    name: str
    kinds: tuple[str, ...]  # pairs, labels
    remedy: str  # where a loss reads it and the data lacks it


_GRADES = "Data whose answers have grades gives it (prefcache formats)."
DATA_COLUMNS = (
    DataColumn("chosen_score", ("pairs",), _GRADES),
    DataColumn("rejected_score", ("pairs",), _GRADES),
)


def data_columns(kind: str) -> tuple[str, ...]:
    """Return the names of the data columns of pairs or labels."""
    return tuple(column.name for column in DATA_COLUMNS if kind in column.kinds)


# One row per pair: a prompt with a chosen and a rejected answer.
PAIRS = pa.schema(
    [
        *_EXAMPLE,
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        *((name, pa.float64()) for name in data_columns("pairs")),
        ("prompt_ids", IDS),  # as the model sees them
        ("chosen_ids", IDS),
        ("rejected_ids", IDS),
        ("chosen_key", KEY),
        ("rejected_key", KEY),
        *_ENCODED,
        ("n_chosen", pa.int32()),
        ("n_rejected", pa.int32()),
        ("n_chosen_counted", pa.int32()),  # tokens that losses and statistics see
        ("n_rejected_counted", pa.int32()),
        ("chosen_spans", IDS),  # which these are, see spans.py
        ("rejected_spans", IDS),
        ("n_common", pa.int32()),  # tokens with which both answers begin
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
        *((name, pa.float64()) for name in data_columns("labels")),
        ("prompt_ids", IDS),
        ("completion_ids", IDS),
        ("completion_key", KEY),
        *_ENCODED,
        ("n_completion", pa.int32()),
        ("n_completion_counted", pa.int32()),
        ("completion_spans", IDS),
        ("cut_completion", pa.int32()),
        ("completion_cut_ids", IDS),
        ("kl_of", pa.string()),  # the example whose answer stands in for one that does not belong to the prompt
        ("kl_ids", IDS),
        ("kl_cut_ids", IDS),  # what was cut off it, for itself or for this prompt
        ("kl_key", KEY),
        ("n_kl", pa.int32()),
        ("n_kl_counted", pa.int32()),
        ("kl_spans", IDS),
    ]
)
PREPARED = {"pairs": PAIRS, "labels": LABELS}
# The answers of an example, each of which makes a sequence with the prompt.
ANSWERS = {"pairs": ("chosen", "rejected"), "labels": ("completion", "kl")}

# One row per picture of the examples, stored once however many prompts have it.
IMAGES = pa.schema(
    [
        ("image", KEY),  # its id, as examples name it
        ("pixels", KEY),  # hash of its pixels
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("one_of_several", pa.bool_()),  # its processor treats it as a picture that shares its prompt with others
        ("n_tokens", pa.int32()),  # that stand for it in a prompt; NULL if an earlier version prepared it
        ("encoded", pa.large_binary()),  # the bytes as they came
    ]
)

# What a vision tower computed of each image, bit for bit; the store names the dtype.
FEATURES = pa.schema(
    [
        ("image", KEY),
        ("embeds", pa.large_binary()),  # [tokens, width], which replace the embeddings of the image's tokens
        ("deep", pa.large_binary()),  # [layers, tokens, width], which DeepStack adds in later layers
        ("n_tokens", pa.int32()),
        ("grid", pa.list_(pa.int32())),  # frames, rows and columns of patches
        ("n_tiles", pa.int32()),  # NULL if the tower does not cut pictures into tiles
        ("xxh3_64", pa.uint64()),  # over embeds, then deep
    ]
)


class StoredFeatures(NamedTuple):
    """A row of FEATURES: the values as bytes."""

    embeds: np.ndarray
    deep: np.ndarray | None
    n_tokens: int
    grid: tuple[int, ...] | None
    n_tiles: int | None


# The files that pictures were read from, with size and checksum, by which a later change is noticed.
IMAGE_FILES = pa.schema(
    [
        ("path", pa.string()),
        ("n_bytes", pa.int64()),  # NULL, like the checksum, if it could not be read
        ("xxh3_128", pa.string()),
    ]
)

# One row per record that could not become an example. What differs from record to record is in columns of its own, so that reasons
# and details can be counted.
QUARANTINE = pa.schema(
    [
        ("source", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("n_found", pa.int64()),  # what was counted: tokens, characters or answers, as the detail says
        ("n_limit", pa.int64()),  # how many there may be, or must be
        ("n_tokens", pa.int64()),  # of the prompt and the longest answer, of records that are too long
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

# One row per example at each visit of a run. Rewards are derived from it, in SQL. A pair has none of a label's columns and vice
# versa; a run without a reference has no ref_ columns. If the reference moves, they are those of the reference at that step.
# Log-probs are plain sums over the tokens that count, however the loss weighed them.
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
        ("n_chosen_counted", pa.int32()),
        ("n_rejected_counted", pa.int32()),
        ("n_completion_counted", pa.int32()),
        ("label", pa.bool_()),  # whether the answer is a desirable one
        ("loss", pa.float64()),
    ]
)

# The metrics of one step, under TRL's names; for labels, chosen means the desirable answers and rejected the undesirable ones. Next
# to them are a loss's statistics, and `loss/NAME` of each term where there are several.
BATCH_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
EVALUATION = "eval_"


def metric_prefix(split: str) -> str:
    """What follows eval_ in the names of a split's metrics: nothing for the held-out examples, NAME_ for other evaluation data."""
    return "" if split == HELD_OUT else f"{split}_"


METRICS = pa.schema(
    [("step", pa.int64()), ("epoch", pa.float64())]
    + [(name, pa.float64()) for name in (*BATCH_METRICS, "grad_norm", "learning_rate")]
    + [("num_tokens", pa.int64())]
    + [(f"{EVALUATION}{name}", pa.float64()) for name in BATCH_METRICS]
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

# How fast each step was, and the most memory that the process had taken by then. Kept apart from METRICS, whose numbers are the
# same each time a run is repeated.
THROUGHPUT = pa.schema(
    [
        ("step", pa.int64()),
        ("seconds", pa.float64()),
        ("examples_per_second", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("peak_memory_bytes", pa.int64()),  # of the GPU, if there is one
        ("flops", pa.float64()),  # of the process that writes, as flops.py counts them
        ("mfu", pa.float64()),  # its share of what its GPU could do in bf16 at best; NULL where that is not known
    ]
)

# Answers to the same prompts before and after a run.
OWN_PROMPT = "prompt-"  # how the names of the user's own prompts begin
SAMPLES = pa.schema(
    [
        ("example_id", pa.string()),  # of a prompt of train.samples_from: prompt-HASH, of its ids
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
        ("logps", pa.list_(pa.float32())),  # of the policy, after the last step; null for a token that does not count
        ("ref_logps", pa.list_(pa.float32())),  # null also where the run reads no reference, or the cache has sums only
    ]
)
