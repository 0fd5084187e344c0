"""A hash of the ids that a tokenizer gives fixed texts: the same files may give other ids in another software version.

Encoding them means loading the tokenizer, which takes seconds; so the result is remembered in the experiment's folder, by
a hash of the files and the versions of the software.
"""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefcache.pipeline import identity, older_ids
from prefcache.pipeline.preparing import tokenizer_facts
from prefcache.pipeline.preparing.encoder import Encoder, ExampleText
from prefcache.pipeline.preparing.garbage_collection import without_garbage_collection
from prefcache.pipeline.preparing.probe_texts import PROBES
from prefcache.pipeline.stored.memos import TokenizersMemo
from prefcache.pipeline.stored.records import Fingerprint, PreparedInputs


def read_fingerprint(
    folder: Path, experiment: Path, loaded: Encoder | None = None, *, remember: bool = True
) -> Fingerprint:
    """Return the fingerprint of a folder's tokenizer, which is loaded only if the experiment has no memo of it."""
    path, stamp = TokenizersMemo.path(experiment), identity.tokenizer_stamp(folder)
    memo = TokenizersMemo.recall(path) or TokenizersMemo()
    if stamp not in memo.encoded:
        memo = memo.with_another(stamp, _encode(loaded or Encoder(tokenizer_facts.load_facts(folder))))
        if remember:
            memo.remember(path)
    return memo.encoded[stamp]


@without_garbage_collection()
def _encode(encoder: Encoder) -> Fingerprint:
    facts = encoder.facts
    specials = sorted({*facts.special.values(), *encoder.decoded_specials()})
    # Each special token on its own, within a text, and all in a row.
    texts = [*PROBES, *specials, *(f"a {token} b" for token in specials), "".join(specials)]
    plain = encoder.encode([ExampleText("A question", (" and its answer.",), plain=True)])
    ids = {"texts": encoder.ids(texts), "plain": [list(each) for each in plain], "specials": specials}
    loads = None  # for a tokenizer run in Python
    if facts.backend is not None:
        # A hash of all that encoding and templates depend on, however it is saved. Truncation and padding are not used
        # here, and training loops leave theirs behind.
        backend = json.loads(facts.backend) | {"truncation": None, "padding": None}
        loads = _hash(asdict(facts) | {"folder": None, "backend": backend})
    return Fingerprint(ids=_hash(ids), loads=loads)


def _hash(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()[:32]


def explain_change(
    recorded: PreparedInputs, inputs: PreparedInputs, folder: Path, experiment: Path, *, remember: bool = True
) -> str | None:
    """Explain why a preparation's ids may differ from those that its tokenizer gives now; None if they cannot."""
    then = recorded.fingerprint
    if then is None:
        # Prepared before there were fingerprints.
        is_same = recorded.tokenizer_id == older_ids.older_tokenizer_id(folder)
        return None if is_same else "its tokenizer has changed"
    now = read_fingerprint(folder, experiment, remember=remember)
    has_same_files = recorded.tokenizer_id == inputs.tokenizer_id
    if then.ids != now.ids and has_same_files:
        versions = identity.versions(["transformers", "tokenizers"])
        software = ", ".join(f"{name} {version}" for name, version in versions.items())
        return f"its tokenizer gives other ids in these versions ({software})"
    loads_same = then.loads is not None and then.loads == now.loads
    is_same = then.ids == now.ids and (has_same_files or loads_same)
    return None if is_same else "its tokenizer has changed"
