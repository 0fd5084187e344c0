"""What a preparation is made from: data, tokenizer, template and settings; and whether a stored one is up to date."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from prefcache.pipeline import identity
from prefcache.pipeline.config import Config, Prepare
from prefcache.pipeline.preparing.sources import DataSource
from prefcache.pipeline.preparing.tokenizer_fingerprint import explain_change, read_fingerprint
from prefcache.pipeline.schema import PREPARED_VERSION
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.freshness import Difference, Freshness, check_preparation
from prefcache.pipeline.stored.records import PreparedManifest

# They differ between folders with the same tokenizer, so they are compared by what the tokenizer does.
_TOKENIZER = ("tokenizer_id", "fingerprint")


def find_inputs(prepare: Prepare, model: Path, sources: list[DataSource]) -> dict[str, Any]:
    """Return all that the output depends on, except for the tokenizer's fingerprint, which takes seconds to compute."""
    template = Path(prepare.chat_template) if prepare.chat_template else None
    return {
        "version": PREPARED_VERSION,
        "data": [source.identity() for source in sources],
        "tokenizer_id": identity.tokenizer_id(model),
        "chat_template": artifact.checksum(template) if template and template.exists() else None,
        "config": prepare.model_dump(mode="json", exclude={"workers"})
        | {"data": [entry.model_dump(mode="json", exclude={"path"}) for entry in prepare.data]},
    }


def check_freshness(config: Config, model: Path, inputs: dict[str, Any], *, remember: bool = True) -> Freshness:
    """Compare these inputs with those of what is prepared."""
    freshness = check_preparation(config.prepared, inputs, ignore=_TOKENIZER)
    manifest = PreparedManifest.find(config.prepared) if freshness.is_fresh else None
    if manifest is None:
        return freshness
    recorded, out = manifest.inputs, Path(config.out)
    if not (reason := explain_change(recorded, inputs, model, out, remember=remember)):
        return freshness
    changed = Difference("tokenizer_id", recorded.tokenizer_id, inputs["tokenizer_id"], reason)
    if recorded.fingerprint and recorded.tokenizer_id == inputs["tokenizer_id"]:
        now = read_fingerprint(model, out, remember=remember)
        changed = Difference("fingerprint.ids", recorded.fingerprint.ids, now.ids, reason)
    return replace(freshness, differences=(changed,))
