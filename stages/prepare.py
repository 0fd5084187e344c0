"""prepare: preference data in, exact token ids out, nothing lost on the way."""

import unicodedata
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline import artifact, identity, prepared, sources
from pipeline.config import Config, Prepare
from pipeline.errors import DataError
from pipeline.example import Example, Unusable, plain_text
from pipeline.formats import Format, get_format
from pipeline.progress import Progress
from pipeline.schema import HELD_OUT, PREPARED_VERSION, TRAIN, sequence_key
from pipeline.templating import Rendered, Templater, Tokens

BATCH = 1024
CHARACTERS_PER_TOKEN = 512  # more than any vocabulary's longest


def run(config: Config, progress: Progress) -> dict[str, Any]:
    model = identity.find_model(config.model)
    files = sources.check(config.prepare.data)
    inputs = _inputs(config.prepare, model, files)
    if prepared.is_current(config.prepared, inputs):
        progress.say(f"prepare: nothing to do, {config.prepared} is what this data and config give")
        manifest = prepared.Prepared(config.prepared).manifest
        artifact.touch_manifest(config.prepared)
        return _summary(config, manifest, changed=False)

    templater = Templater(model, config.prepare.template, config.prepare.chat_template)
    writer = prepared.Writer(config.prepared, _short(inputs), config.prepare.rows_per_shard)
    n_records = _prepare(files, templater, config.prepare, writer, progress)
    _refuse_bad_data(n_records, writer, config)
    manifest = writer.commit(_facts(inputs, n_records, writer, templater))
    _tell_make(config, model, files)
    return _summary(config, manifest, changed=True)


def _inputs(prepare: Prepare, model: Path, files: list[Path]) -> dict[str, Any]:
    """All that the output depends on."""
    template = Path(prepare.chat_template) if prepare.chat_template else None
    return {
        "version": PREPARED_VERSION,
        "data": [{"file": str(file), "xxh3_128": artifact.checksum(file)} for file in files],
        "tokenizer_id": identity.tokenizer_id(model),
        "chat_template": artifact.checksum(template) if template and template.exists() else None,
        "config": prepare.model_dump(mode="json", exclude={"data"}),
    }


def _short(inputs: dict[str, Any]) -> str:
    return artifact.checksum_bytes(artifact.canonical_json(inputs))[:8]


# -- one pass over the records ---------------------------------------------------------------------------------------


def _prepare(
    files: list[Path], templater: Templater, prepare: Prepare, writer: prepared.Writer, progress: Progress
) -> int:
    n_records, data_format = 0, get_format(prepare.format)
    with progress.count("prepare", None, "records") as counter:
        for lines in _batches(files):
            usable = _render(lines, data_format, templater, prepare.max_length, writer)
            tokens = templater.encode([rendered for _, _, rendered in usable])
            for (line, example, _), ids in zip(usable, tokens, strict=True):
                _keep_or_quarantine(line, example, ids, prepare, writer)
            n_records += len(lines)
            counter.add(len(lines))
    return n_records


def _batches(files: list[Path]) -> Iterator[tuple[sources.Line, ...]]:
    every_line = (line for file in files for line in sources.read(file))
    while batch := tuple(islice(every_line, BATCH)):
        yield batch


def _render(
    lines: Iterable[sources.Line], data_format: Format, templater: Templater, most_tokens: int, writer: prepared.Writer
) -> list[tuple[sources.Line, Example, Rendered]]:
    usable = []
    for line in lines:
        try:
            if line.record is None:
                raise Unusable(line.reason, line.detail)
            example = data_format.read(line.record)
            rendered = templater.render(example)
            _check_size(rendered, most_tokens)
            usable.append((line, example, rendered))
        except Unusable as unusable:
            writer.quarantine(_quarantined(line, unusable))
    return usable


def _check_size(rendered: Rendered, most_tokens: int) -> None:
    """Spare the tokenizer, whose time can grow with the square of a word, what is too long at first sight."""
    n_characters = max(map(len, rendered))
    if n_characters > most_tokens * CHARACTERS_PER_TOKEN:
        raise Unusable("too long", f"{n_characters} characters, prepare.max_length is {most_tokens} tokens")


def _keep_or_quarantine(
    line: sources.Line, example: Example, tokens: Tokens, prepare: Prepare, writer: prepared.Writer
) -> None:
    try:
        _check_lengths(tokens, prepare)
        writer.add(_row(line, example, tokens, prepare.held_out))
    except Unusable as unusable:
        writer.quarantine(_quarantined(line, unusable))


def _check_lengths(tokens: Tokens, prepare: Prepare) -> None:
    if not tokens.prompt:
        raise Unusable("empty prompt", "no tokens after templating")
    if not tokens.chosen or not tokens.rejected:
        raise Unusable("empty answer", "no tokens after templating")
    if tokens.chosen == tokens.rejected:
        raise Unusable("chosen equals rejected", "after templating")
    n_prompt, n_answer = len(tokens.prompt), max(len(tokens.chosen), len(tokens.rejected))
    if prepare.max_prompt_length and n_prompt > prepare.max_prompt_length:
        raise Unusable(
            "prompt too long", f"{n_prompt} tokens, prepare.max_prompt_length is {prepare.max_prompt_length}"
        )
    if n_prompt >= prepare.max_length:
        raise Unusable("prompt too long", f"{n_prompt} tokens, prepare.max_length is {prepare.max_length}")
    if n_prompt + n_answer > prepare.max_length:
        raise Unusable("too long", f"{n_prompt} + {n_answer} tokens, prepare.max_length is {prepare.max_length}")


def _row(line: sources.Line, example: Example, tokens: Tokens, held_out: float) -> dict[str, Any]:
    prompt = plain_text(example.prompt)
    chosen_key = sequence_key(tokens.prompt, tokens.chosen)
    rejected_key = sequence_key(tokens.prompt, tokens.rejected)
    return {
        "example_id": blake2b(chosen_key + rejected_key, digest_size=8).hexdigest(),
        "split": HELD_OUT if _fraction(prompt) < held_out else TRAIN,
        "source": line.source,
        "line": line.number,
        "prompt": prompt,
        "chosen": plain_text(example.chosen),
        "rejected": plain_text(example.rejected),
        "prompt_ids": tokens.prompt,
        "chosen_ids": tokens.chosen,
        "rejected_ids": tokens.rejected,
        "chosen_key": chosen_key,
        "rejected_key": rejected_key,
        "boundary": tokens.boundary,
        "n_prompt": len(tokens.prompt),
        "n_chosen": len(tokens.chosen),
        "n_rejected": len(tokens.rejected),
    }


def _fraction(prompt: str) -> float:
    """Where a prompt falls in [0, 1): by its text alone, so it never changes sides when data is added.

    Spaces and composed characters do not count: prompts that differ in them alone may be one to the model.
    """
    text = " ".join(unicodedata.normalize("NFC", prompt).split())
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _quarantined(line: sources.Line, unusable: Unusable) -> dict[str, Any]:
    # A lone surrogate in a key or a value can reach the detail; it must not keep the quarantine from being written.
    detail = unusable.detail.encode("utf-8", "backslashreplace").decode()
    return {
        "source": line.source,
        "line": line.number,
        "reason": unusable.reason,
        "detail": detail,
        "raw": line.raw,
    }


# -- what is said about it -------------------------------------------------------------------------------------------


def _refuse_bad_data(n_records: int, writer: prepared.Writer, config: Config) -> None:
    share = writer.n_quarantined / n_records if n_records else 1.0
    if n_records > writer.n_quarantined and share <= config.prepare.max_quarantine:
        return
    if not n_records:
        raise DataError(f"{', '.join(config.prepare.data)}: no records, only blank lines.")
    writer.commit_quarantine()
    reasons = "; ".join(
        f"{n} {reason}" + (f": {writer.first[reason]}" if writer.first[reason] else "")
        for reason, n in writer.reasons.most_common()
    )
    raise DataError(
        f"{writer.n_quarantined} of {n_records} records cannot be used ({reasons}); prepare.max_quarantine allows "
        f"{config.prepare.max_quarantine:.0%}. Each is in {config.prepared / prepared.QUARANTINE_FILE} with its line and "
        "reason. Mend the data, or raise the threshold."
    )


def _facts(inputs: dict[str, Any], n_records: int, writer: prepared.Writer, templater: Templater) -> dict[str, Any]:
    return {
        "inputs": inputs,
        "records": n_records,
        "examples": n_records - writer.n_quarantined,
        "quarantined": dict(sorted(writer.reasons.items())),
        "duplicates": writer.duplicates,
        "boundaries": dict(sorted(writer.boundaries.items())),
        "template": templater.text,
    }


def _summary(config: Config, manifest: dict[str, Any], *, changed: bool) -> dict[str, Any]:
    counts = {
        split: sum(shard["rows"] for shard in manifest["shards"] if shard["split"] == split)
        for split in (TRAIN, HELD_OUT)
    }
    assert sum(counts.values()) + sum(manifest["quarantined"].values()) == manifest["records"]
    return {
        "prepared": str(config.prepared),
        "changed": changed,
        "records": manifest["records"],
        **counts,
        "quarantined": manifest["quarantined"],
        "duplicates": manifest["duplicates"],
        "boundaries": manifest["boundaries"],
    }


def _tell_make(config: Config, model: Path, files: list[Path]) -> None:
    tokenizer = [path for path in (model / "tokenizer.json", model / "tokenizer_config.json") if path.exists()]
    artifact.commit_make_inputs(config.prepared, [*files, *tokenizer])
