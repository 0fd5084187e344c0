"""A part: one chunk of records, prepared by a worker on its own.

What a part holds depends on its records and the resolved config alone, so any process on any machine may prepare it, in
any order. A part is finished once its record is committed; an interrupted preparation continues with the missing ones.

    chunk -> records -> examples -> text -> ids -> within the length -> part-00007.arrow, and its quarantine
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.preparing import expand_rankings, part_table
from prefcache.pipeline.preparing.chat_template import ChatTemplate, TemplateLimit
from prefcache.pipeline.preparing.encoder import Encoder, ExampleText, ExampleTokens
from prefcache.pipeline.preparing.example import IMAGE_MARK, Example, Label, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.fast_tokenizer import FastTokenizerMismatch
from prefcache.pipeline.preparing.formats import get_format
from prefcache.pipeline.preparing.formats.prompt_images import count_markers
from prefcache.pipeline.preparing.garbage_collection import without_garbage_collection
from prefcache.pipeline.preparing.part_images import PartImages, tabulate_stamps
from prefcache.pipeline.preparing.pictures import PictureLoader, base_folder
from prefcache.pipeline.preparing.render_chat import ChatRenderer
from prefcache.pipeline.preparing.rendered_text import RenderedText
from prefcache.pipeline.preparing.resolved_config import ResolvedConfig, rename_columns
from prefcache.pipeline.preparing.sources import Chunk, Limits, Line, group_by_size
from prefcache.pipeline.preparing.template_cache import TemplateCacheMismatch
from prefcache.pipeline.preparing.truncation import TruncatedExample, truncate
from prefcache.pipeline.progress import counting
from prefcache.pipeline.schema import QUARANTINE
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.images import explain_changed_files
from prefcache.pipeline.stored.records import NewerError, PartRecord

if TYPE_CHECKING:
    from prefcache.pipeline.preparing.image_text import ImageText

T = TypeVar("T")
BATCH = 1024  # examples that the tokenizer encodes at once
_BATCH_BYTES = 8 << 20
CHARACTERS_PER_TOKEN = 512  # more than the longest token of any vocabulary
MOST_CHARACTERS = 4 << 20  # of a text that is to be cut: all of it has to be encoded to know where
_MOST_STRIKES = 3
_MOST_MOVED = 16  # characters


class LateImagesError(UsageError):
    """A record has images, and the first ones, by which the config was resolved, have none."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where}, has images, and the first records of all sources have none. Put one of them first.")
        self.where = where

    def __reduce__(self) -> Any:  # a worker process sends it
        return type(self), (self.where,)


@dataclass(frozen=True)
class PreparedPart:
    """The rows of a part and its quarantine; the other fields are those of PartRecord."""

    table: pa.Table
    quarantine: pa.Table
    records: int
    further: int
    quarantined: dict[str, int]
    first: dict[str, str]
    done: dict[str, int]
    fast_tokenizer: bool = False
    fast_tokenizer_unavailable: str = ""
    images: dict[str, Any] | None = None  # the entry of the file with its pictures
    image_files: pa.Table | None = None


class PartWorker:
    """Prepares parts. One per process: it holds the tokenizer and the compiled template."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        self.resolved = resolved
        template = resolved.template and ChatTemplate(
            resolved.template,
            resolved.tokenizer.special,
            resolved.prepare.date,
            tool_text=resolved.tool_template,
            mark_generation=resolved.prepare.train_on != "all",
        )
        self._rendered_text = RenderedText(template, resolved.tokenizer) if template else None
        self.encoder = Encoder(resolved.tokenizer, fast=resolved.fast_tokenizer)
        end_tokens = self.encoder.decoded_specials()
        self.renderer = ChatRenderer(template or None, resolved.prepare.train_on, end_tokens)
        self.image_text = self._load_image_text(resolved.image_processor) if resolved.image_processor else None
        self._pictures = PictureLoader(resolved.prepare.image_hosts)
        self._strikes = 0  # records of this part that were too much for the template
        self._readers = [get_format(source.format).bind(source.arguments) for source in resolved.source_formats]

    def _load_image_text(self, folder: Path) -> "ImageText":
        # Imported for data with images: it loads Pillow, and Transformers.
        from prefcache.pipeline import image_processor
        from prefcache.pipeline.preparing.image_text import ImageText

        return ImageText(image_processor.load(folder), self.encoder.tokenizer.encode_exactly)

    def task(self, folder: Path) -> Callable[..., PartRecord]:
        """Return the task of a process: prepare a part and commit it. A mismatch ends the fast tokenizer in all processes."""
        tokenizer = self.encoder.tokenizer

        def prepare_part(number: int, source: int, chunk: Chunk) -> PartRecord:
            if mismatch := find_mismatch(folder):
                tokenizer.refuse_fast(mismatch)
            part = self.prepare(source, chunk, images_file(folder, number))
            if tokenizer.fast_mismatch and not find_mismatch(folder):
                artifact.commit_bytes(mismatch_file(folder), tokenizer.fast_mismatch.encode(), durable=False)
            return commit_part(folder, number, source, part)

        return prepare_part

    def prepare(self, source: int, chunk: Chunk, images: Path | None = None) -> PreparedPart:
        """Prepare a chunk. Its pictures are written to the file `images`, since memory may not hold them all."""
        return self._redo_on_mismatch(lambda: self._prepare(source, list(chunk.lines()), images))

    def _prepare(self, source: int, lines: list[Line], images: Path | None) -> PreparedPart:
        kind, prepare = self.resolved.kind, self.resolved.prepare
        quarantine, done = Quarantine(), Counter[str]()
        batches: list[pa.RecordBatch] = []
        processor = self.image_text.processor if self.image_text else None
        with counting("tokenize", None, "examples") as counter, PartImages(processor, images) as part_images:
            for batch in self._tokenize_batches(lines, source, quarantine):
                read, rows = [line for line, _ in batch], [row for _, row in batch]
                split = prepare.source_splits[source]
                ids = [part_images.add(row.example.images) for row in rows]
                batches.append(part_table.build_batch(read, rows, ids, kind, prepare.held_out, split))
                done += self._count_events(rows)
                counter.add(len(batch))
        table = pa.Table.from_batches(batches, schema=part_table.SCHEMAS[kind]).combine_chunks()
        return PreparedPart(
            table,
            quarantine.table(),
            records=len(lines),
            further=len(table) + len(quarantine.rows) - len(lines),
            quarantined=dict(sorted(quarantine.reasons.items())),
            first=quarantine.first,
            done=dict(sorted((done + self.renderer.counts).items())),
            fast_tokenizer=self.encoder.tokenizer.is_fast,
            fast_tokenizer_unavailable=self.encoder.tokenizer.fast_unavailable,
            images=part_images.entry,
            image_files=tabulate_stamps(self._pictures.stamps) if self._pictures.stamps else None,
        )

    def _count_events(self, rows: Sequence[TruncatedExample]) -> Counter[str]:
        """Count what was done to examples, and what has to be said about them."""
        n_exact = sum(row.tokens.exact for row in rows)
        return Counter(
            {
                "exact": n_exact,
                "split": len(rows) - n_exact,
                "ended": sum(row.tokens.ended for row in rows),
                "cut_prompts": sum(row.cut_prompt > 0 for row in rows),
                "cut_answers": sum(any(row.cut_answers) for row in rows),
                "image_marks": sum(not row.example.images and count_markers(row.example.prompt) > 0 for row in rows),
                "plain_text": sum(self.puts_text_into_template(row.example) for row in rows),
            }
        )

    def repeat(self, source: int, chunk: Chunk) -> list[tuple[Line, TruncatedExample]]:
        """Return the examples of a chunk that was prepared before, with the messages that its rows do not have."""
        lines = list(chunk.lines())
        return self._redo_on_mismatch(
            lambda: list(chain.from_iterable(self._tokenize_batches(lines, source, Quarantine())))
        )

    def _redo_on_mismatch(self, work: Callable[[], T]) -> T:
        """Do the work; if a shortcut turns out to give something else than what it stands for, do it again without."""
        use_cache = True
        # Records form no cycles, and the search takes a tenth of the time on so many small objects.
        with without_garbage_collection():
            while True:
                self.renderer.reset(use_cache=use_cache)
                self.encoder.tokenizer.start_part()
                if self.image_text:
                    self.image_text.start_part()
                self._pictures.start_part()
                try:
                    return work()
                except TemplateCacheMismatch:
                    # The template depends on the texts in a way that the cache missed. Render each conversation by itself.
                    use_cache = False
                except FastTokenizerMismatch as error:
                    self.encoder.tokenizer.refuse_fast(str(error))

    # -- record -> examples -> text -> ids ---------------------------------------------------------------------------

    def read_examples(self, line: Line, source: int, quarantine: "Quarantine") -> list[Example]:
        prepare, columns = self.resolved.prepare, self.resolved.source_formats[source].columns
        try:
            if line.record is None:
                raise Unusable(line.reason, line.detail)
            record = rename_columns(line.record, columns) if columns else line.record
            return expand_rankings.expand(
                self._load_images(self._readers[source](record), line),
                pairing=prepare.pairing,
                ties=prepare.ties == "keep",
                as_labels=self.resolved.kind == "labels",
            )
        except Unusable as unusable:
            quarantine.n_unread += 1
            quarantine.add(line, unusable)
            return []

    def _load_images(self, example: Pair | Label | Ranking, line: Line) -> Pair | Label | Ranking:
        if not example.images:
            return example
        if self.image_text is None:
            raise LateImagesError(f"{line.source}, line {line.number}")
        return replace(example, images=self._pictures.load_all(example.images, base_folder(line.source)))

    def _tokenize_batches(
        self, lines: list[Line], source: int, quarantine: "Quarantine"
    ) -> Iterator[list[tuple[Line, TruncatedExample]]]:
        """Yield as many examples at a time as the tokenizer takes well at once, and no more text than memory does."""
        self._strikes = 0
        examples = ((line, example) for line in lines for example in self.read_examples(line, source, quarantine))
        for _, batch in group_by_size(examples, Limits(BATCH, _BATCH_BYTES), lambda item: _count_bytes(*item)):
            yield list(self.tokenize(batch, quarantine))

    def tokenize(
        self, examples: Iterable[tuple[Line, Example]], quarantine: "Quarantine"
    ) -> Iterator[tuple[Line, TruncatedExample]]:
        prepare = self.resolved.prepare
        rendered: list[tuple[Line, Example, ExampleText]] = []
        with ChatTemplate.limits():
            for line, example in examples:
                try:
                    expand_rankings.check(example, ties=prepare.ties == "keep")
                    rendered.append((line, example, self._render(example)))
                except (Unusable, TemplateLimit) as error:
                    quarantine.add(line, self._count_strike(error))
        expanded = list(self._expand_images(self.image_text, rendered, quarantine)) if self.image_text else rendered
        tokens = self.encoder.encode([text for _, _, text in expanded])
        for (line, example, _), ids in zip(expanded, tokens, strict=True):
            try:
                self._check_ids(example, ids)
                example, ids = self._move_border(example, ids)
                truncated = truncate(example, ids, prepare, self._encode_again)
                if isinstance(example, Pair) and prepare.ties != "keep":
                    chosen, rejected = truncated.tokens.answers
                    if chosen == rejected:
                        when = "after cutting" if any(truncated.cut_answers) else "after templating"
                        raise Unusable("chosen equals rejected", when)
                yield line, truncated
            except (Unusable, TemplateLimit) as error:
                quarantine.add(line, self._count_strike(error))

    def tokenize_one(self, example: Example) -> tuple[ExampleTokens, TruncatedExample]:
        """Return an example's ids in full, and as they are used."""
        with ChatTemplate.limits():
            expand_rankings.check(example, ties=self.resolved.prepare.ties == "keep")
        example, tokens = self._move_border(example, self._encode_again(example))
        return tokens, truncate(example, tokens, self.resolved.prepare, self._encode_again)

    def _move_border(self, example: Example, tokens: ExampleTokens) -> tuple[Example, ExampleTokens]:
        """Move the end of an implicit prompt back to where tokens of both texts end, if there is such a place near."""
        prompt = example.prompt
        if tokens.exact or self.resolved.template is not None or not isinstance(prompt, str):
            return example, tokens
        if not isinstance(example, Pair) or not example.implicit:
            return example, tokens
        for n in range(len(prompt) - 1, max(0, len(prompt) - _MOST_MOVED - 1), -1):
            chosen, rejected = (prompt[n:] + str(answer) for answer in example.answers)
            moved = replace(example, prompt=prompt[:n], chosen=chosen, rejected=rejected)
            found = self._encode_again(moved)
            if found.exact and prompt[:n].strip():
                return moved, found
        return example, tokens

    def puts_text_into_template(self, example: Example) -> bool:
        """Return whether plain text becomes a turn: a trainer that takes text as it is would compute something else."""
        return self.resolved.template is not None and not example.rendered and isinstance(example.prompt, str)

    def _count_strike(self, error: Unusable | TemplateLimit) -> Unusable:
        """Quarantine a record that is too much for the template. If record after record is, blame the template."""
        if isinstance(error, Unusable):
            return error
        self._strikes += 1
        if self._strikes > _MOST_STRIKES:
            raise error
        return Unusable("template takes too much", str(error))

    def _render(self, example: Example) -> ExampleText:
        # Spare the template, and the tokenizer, whose time can grow with the square of a word's length, an obviously
        # overlong text.
        n_prompt, n_marks = _measure(example.prompt)
        n_answers, n_answer_marks = zip(*map(_measure, example.answers), strict=True)
        n, prepare = max(n_prompt, *n_answers), self.resolved.prepare
        most = prepare.max_length * CHARACTERS_PER_TOKEN if prepare.too_long == "drop" else MOST_CHARACTERS
        if n > most:
            raise Unusable(
                "too long", "more characters than prepare.max_length tokens can have", n_found=n, n_limit=most
            )
        if n_marks != len(example.images) or any(n_answer_marks):
            raise Unusable("reserved characters", "U+FDD2, which marks an image")
        if self._rendered_text and not example.rendered:
            self._rendered_text.check(example.prompt, example.answers)
        if self.image_text:
            self.image_text.refuse_placeholders(example)
        return self.renderer.render(example)

    @staticmethod
    def _expand_images(
        image_text: "ImageText", rendered: list[tuple[Line, Example, ExampleText]], quarantine: "Quarantine"
    ) -> Iterator[tuple[Line, Example, ExampleText]]:
        # Not within the limits of a template, for which pictures would be too much.
        for line, example, text in rendered:
            try:
                yield line, example, image_text.expand(text, example.images)
            except Unusable as unusable:
                quarantine.add(line, unusable)

    def _check_ids(self, example: Example, tokens: ExampleTokens) -> None:
        if self.image_text:
            self.image_text.check_ids(tokens, example.images)

    def _encode_again(self, example: Example) -> ExampleTokens:
        with ChatTemplate.limits(), self.renderer.uncounted():
            text = self._render(example)
        if self.image_text:
            text = self.image_text.expand(text, example.images)
        tokens = self.encoder.encode([text])[0]
        self._check_ids(example, tokens)
        return tokens


def _count_bytes(line: Line, example: Example) -> int:
    """Count the memory of an example: its record, and its pictures as they came."""
    return len(line.raw) + sum(len(image.encoded) for image in example.images)


def _measure(turns: Turns) -> tuple[int, int]:
    """Count the characters, and the marks of pictures among them."""
    if isinstance(turns, str):
        return len(turns), turns.count(IMAGE_MARK)
    n_characters = n_marks = 0
    for turn in turns:
        if content := turn.get("content"):
            n_characters += len(content)
            n_marks += content.count(IMAGE_MARK)
    return n_characters, n_marks


class Quarantine:
    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # by reason, the line and detail of the first record with it
        self.n_unread = 0  # records of which no example could be made
        self.rows: list[dict[str, Any]] = []

    def add(self, line: Line, unusable: Unusable) -> None:
        # A lone surrogate in a key or a value can reach the detail; it must not keep the quarantine from being written.
        detail, description = (
            text.encode("utf-8", "backslashreplace").decode() for text in (unusable.detail, unusable.description)
        )
        self.reasons[unusable.reason] += 1
        self.first.setdefault(unusable.reason, f"line {line.number}{': ' if description else ''}{description}")
        self.rows.append(
            {
                "source": line.source,
                "line": line.number,
                "reason": unusable.reason,
                "detail": detail,
                "n_found": unusable.n_found,
                "n_limit": unusable.n_limit,
                "n_tokens": unusable.n_tokens,
                "raw": line.raw,
            }
        )

    def table(self) -> pa.Table:
        # Unreadable records are noticed before unusable ones.
        return pa.Table.from_pylist(sorted(self.rows, key=lambda row: row["line"]), schema=QUARANTINE)


# -- parts on disk ---------------------------------------------------------------------------------------------------


def table_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.arrow"


def record_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.json"


def images_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.images"


def mismatch_file(folder: Path) -> Path:
    return folder / "fast-tokenizer-mismatch.txt"


def find_mismatch(folder: Path) -> str:
    """Return where the fast tokenizer differed in a part; "" if it did not."""
    with contextlib.suppress(FileNotFoundError):
        return mismatch_file(folder).read_text(encoding="utf-8")
    return ""


def start_worker(resolved: ResolvedConfig, folder: Path) -> Callable[..., PartRecord]:
    """Return what a worker process does with a task: prepare a part and commit it. Only its record is sent back."""
    return PartWorker(resolved).task(folder)


def commit_part(folder: Path, number: int, source: int, part: PreparedPart) -> PartRecord:
    """Commit a part, its record last. Without waiting for the disk: a torn part is noticed, and prepared again."""
    path = table_file(folder, number)
    entries = {
        name: artifact.commit_file(file, artifact.arrow_stream(table), durable=False, rows=len(table))
        for name, file, table in (
            ("table", path, part.table),
            ("quarantine", path.with_suffix(".quarantine"), part.quarantine),
            ("image_files", path.with_suffix(".image-files"), part.image_files),
        )
        if table is not None
    }
    facts = {field.name: getattr(part, field.name) for field in fields(part) if field.name not in entries}
    record = PartRecord.make(**facts, source=source, **entries)
    record.commit(record_file(folder, number), durable=False)
    return record


def read_record(folder: Path, number: int) -> PartRecord | None:
    """Return the record of a part; None if it is missing or damaged, or a fast tokenizer that is wrong had a share in it."""
    path = record_file(folder, number)
    if not path.exists():
        return None
    try:
        record = PartRecord.read(path)
    except NewerError:
        raise
    except IntegrityError:
        return None
    return None if record.fast_tokenizer and find_mismatch(folder) else record


def find_finished(folder: Path, number: int) -> PartRecord | None:
    """Return the record of a part; None if the part is missing or damaged, or files of its pictures have changed since."""
    record = read_record(folder, number)
    if record is None or any(artifact.damage(folder, entry) for entry in record.files.values()):
        return None
    # Which files of pictures a part has read is known only once it is prepared.
    files = [record.image_files] if record.image_files else []
    is_current = explain_changed_files(folder, files, record_file(folder, number).stat().st_mtime_ns) is None
    return record if is_current else None
