"""What a preparation is made from: data, tokenizer, template and settings; and whether a stored one is up to date."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefcache.pipeline import identity
from prefcache.pipeline.config import Config, Prepare, Source
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.preparing import record_outcomes
from prefcache.pipeline.preparing.sources import DataSource
from prefcache.pipeline.preparing.tokenizer_fingerprint import explain_change, read_fingerprint
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import PREPARED_VERSION
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.freshness import Difference, Freshness, check_preparation, find_differences
from prefcache.pipeline.stored.images import explain_changed_files
from prefcache.pipeline.stored.memos import TokenizersMemo
from prefcache.pipeline.stored.records import PreparedInputs, PreparedManifest
from prefcache.pipeline.tokenizer import PROCESSOR_CONFIGS

if TYPE_CHECKING:
    from prefcache.pipeline.image_processor import ImageProcessor

# They differ between folders with the same tokenizer, so they are compared by what the tokenizer does.
_TOKENIZER = ("tokenizer_id", "fingerprint")
_PROCESSOR = "processor_id"


def find_inputs(prepare: Prepare, model: Path, sources: list[DataSource]) -> PreparedInputs:
    """Return what the output depends on, except for two things: the tokenizer's fingerprint, which takes seconds to compute, and
    the id of the image processor, since only reading the data shows whether there are images.
    """
    return PreparedInputs(
        data=[source.identity() for source in sources],
        tokenizer_id=identity.tokenizer_id(model),
        **{"version": PREPARED_VERSION, **_find_settings(prepare)},
    )


def _find_settings(prepare: Prepare) -> dict[str, Any]:
    template = Path(prepare.chat_template) if prepare.chat_template else None
    sets = {name: _dump_sources(entries) for name, entries in prepare.held_out_data.items()}
    # Settings that earlier versions did not have are recorded where they are used: what was prepared before stays fresh.
    newer: dict[str, Any] = {"held_out_data": sets, "image_hosts": list(prepare.image_hosts)}
    return {
        "chat_template": artifact.checksum(template) if template and template.exists() else None,
        "config": prepare.model_dump(mode="json", exclude={*Prepare.NEUTRAL, *newer})
        | {"data": _dump_sources(prepare.data)}
        | {name: value for name, value in newer.items() if value},
    }


def _dump_sources(entries: Sequence[Source]) -> list[dict[str, Any]]:
    return [entry.model_dump(mode="json", exclude={"path"}) for entry in entries]


def check_freshness(config: Config, model: Path, inputs: PreparedInputs, *, remember: bool = True) -> Freshness:
    """Compare these inputs with those of what is prepared."""
    freshness = check_preparation(config.prepared, inputs.facts(), ignore=(*_TOKENIZER, _PROCESSOR))
    manifest = PreparedManifest.find(config.prepared) if freshness.is_fresh else None
    if manifest is None:
        return freshness
    recorded, out = manifest.inputs, Path(config.out)
    if not (reason := explain_change(recorded, inputs, model, out, remember=remember)):
        return replace(freshness, differences=tuple(_find_changed_images(config, manifest, model, remember=remember)))
    changed = Difference("tokenizer_id", recorded.tokenizer_id, inputs.tokenizer_id, reason)
    if recorded.fingerprint and recorded.tokenizer_id == inputs.tokenizer_id:
        now = read_fingerprint(model, out, remember=remember)
        changed = Difference("fingerprint.ids", recorded.fingerprint.ids, now.ids, reason)
    return replace(freshness, differences=(changed,))


# -- what later stages notice ----------------------------------------------------------------------------------------


def explain_if_stale(config: Config) -> str | None:
    """Explain in a sentence that settings or data differ from those that were prepared; None if nothing shows it.

    It takes milliseconds: only files that were touched since are read, and data sets of the hub are not looked at.
    """
    try:
        manifest = PreparedManifest.find(config.prepared)
    except PrefcacheError:
        manifest = None  # the stage that reads it says what is wrong
    if manifest is None:
        return None
    recorded = manifest.inputs
    settings = _find_settings(config.prepare)
    stored = {name: recorded.facts().get(name) for name in settings}
    differences = find_differences(stored, settings)
    if len(recorded.data) == len(config.prepare.sources):
        differences += tuple(_find_changed_data(config, recorded.data))
    with contextlib.suppress(PrefcacheError):  # the stage that needs the model says what is wrong
        model = identity.find_reference(config, weights=False).tokenizer if recorded.processor_id else Path()
        differences += tuple(_find_changed_images(config, manifest, model, remember=False))
    freshness = Freshness("preparation", config.prepared, differences=differences)
    if freshness.is_fresh:
        return None
    return freshness.explain()


def warn_if_stale(config: Config, progress: Progress) -> None:
    """Warn, in a command that uses what was prepared as it is."""
    if reason := explain_if_stale(config):
        progress.warn(f"{reason}. It is used as it is; prefcache prepare CONFIG makes it again")


def _find_changed_images(
    config: Config, manifest: PreparedManifest, model: Path, *, remember: bool
) -> Iterator[Difference]:
    prepared_at = (config.prepared / artifact.MANIFEST).stat().st_mtime_ns
    if reason := explain_changed_files(config.prepared, manifest.image_files, prepared_at):
        yield Difference("images", None, None, reason)
    if recorded := manifest.inputs.processor_id:
        now = read_processor_id(model, Path(config.out), remember=remember)
        if now != recorded:
            yield Difference(_PROCESSOR, recorded, now, "the settings of the model's image processor have changed")


def read_processor_id(
    folder: Path, experiment: Path, loaded: "ImageProcessor | None" = None, *, remember: bool = True
) -> str:
    """Return the id of a model's image processor, which is loaded only if the experiment has no memo of it."""
    path = TokenizersMemo.path(experiment)
    settings = identity.hash_bytes(identity.find_processor(folder), PROCESSOR_CONFIGS)
    stamp = f"{identity.tokenizer_stamp(folder)}, {settings}"
    memo = TokenizersMemo.recall(path) or TokenizersMemo()
    if stamp not in memo.processors:
        memo = memo.with_another_processor(stamp, (loaded or _load_processor(folder)).id.hex())
        if remember:
            memo.remember(path)
    return memo.processors[stamp]


def _load_processor(folder: Path) -> "ImageProcessor":
    # Imported where there are images: it loads Pillow, and Transformers.
    from prefcache.pipeline import image_processor

    return image_processor.load(folder)


def _find_changed_data(config: Config, recorded: list[list[dict[str, Any]]]) -> Iterator[Difference]:
    prepared_at = (config.prepared / artifact.MANIFEST).stat().st_mtime_ns
    for number, (entry, stored) in enumerate(zip(config.prepare.sources, recorded, strict=True)):
        if any("file" not in each for each in stored):
            continue
        try:
            source = record_outcomes.reopen_source(entry, Path(config.out))
        except PrefcacheError:
            continue  # data that is gone is no longer needed
        checksums = {each["file"]: each["xxh3_128"] for each in stored}
        files = {source.display_name(file): file for file in source.files}
        for name in sorted(checksums.keys() | files.keys()):
            what = f"data.{number}.{name}"
            if name not in files or name not in checksums:
                yield Difference(
                    what, name in checksums, name in files, f"{name} was {'added' if name in files else 'left out'}"
                )
                continue
            stat = files[name].stat()
            # The change time also shows files that were moved here with an older time.
            is_touched = max(stat.st_mtime_ns, stat.st_ctime_ns) > prepared_at
            if is_touched and (now := artifact.checksum(files[name])) != checksums[name]:
                yield Difference(what, checksums[name], now, f"{name} has changed")
