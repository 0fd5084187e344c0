"""A part: one chunk of records, prepared by itself.

What a part holds depends on its records and the recipe alone, so any process on any machine may make it, in any order.
A part is finished when its record is there; an interrupted preparation goes on with those that are missing.

    chunk -> records -> examples -> text -> ids -> within the length -> part-00007.arrow, and its quarantine
"""

import contextlib
import gc
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import IntegrityError
from pipeline.preparing import examples
from pipeline.preparing.chat_template import ChatTemplate, TemplateLimit
from pipeline.preparing.encoder import Encoder, Text, Tokens
from pipeline.preparing.example import Example, Pair, Turns, Unusable, plain_text
from pipeline.preparing.formats import get_format
from pipeline.preparing.lengths import Fitted, fit
from pipeline.preparing.recipe import Recipe, renamed
from pipeline.preparing.sources import Chunk, Line
from pipeline.preparing.templating import FrameMismatch, Templater
from pipeline.schema import ANSWERS, HELD_OUT, LABELS, PAIRS, QUARANTINE, TRAIN, key_of_bytes
from pipeline.stored import artifact

BATCH = 1024
_BATCH_BYTES = 8 << 20
CHARACTERS_PER_TOKEN = 512  # more than any vocabulary's longest
MOST_CHARACTERS = 4 << 20  # of a text that is to be cut: to know where, all of it has to be encoded
_STRIKES = 3

# Beside what is stored in the end: by what shares and mismatched answers are chosen. whole_id is what example_id would
# be if no answer were cut. So the same are chosen whatever the length, and what was scored at another one is of use.
_WHOLE = pa.field("whole_id", pa.uint64())
_HASHES = ("prompt_hash", "text_hash", "ids_hash")
_KL = ("kl_of", "kl_ids", "kl_cut_ids", "kl_key", "n_kl")
SCHEMAS = {
    "pairs": PAIRS.append(_WHOLE),
    "labels": pa.schema(
        [field for field in LABELS if field.name not in _KL]
        + [_WHOLE, *(pa.field(name, pa.uint64()) for name in _HASHES)]
    ),
}


@dataclass(frozen=True)
class Made:
    table: pa.Table
    quarantine: pa.Table
    facts: dict[str, Any]


class Maker:
    """Makes parts. One per process: it holds the tokenizer and the compiled template."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        prepare = recipe.prepare
        template = recipe.template and ChatTemplate(
            recipe.template, recipe.tokenizer.special, prepare.date, tool_text=recipe.tool_template
        )
        self.templater = Templater(template or None)
        self.encoder = Encoder(recipe.tokenizer)
        self._strikes = 0  # records of this part that were too much for the template
        self._readers = [get_format(reading.format).bind(reading.arguments) for reading in recipe.readings]

    def make(self, source: int, chunk: Chunk) -> Made:
        with _no_collection():
            return self._make_or_again(source, chunk)

    def _make_or_again(self, source: int, chunk: Chunk) -> Made:
        for self.templater.use_frames in (True, False):
            try:
                return self._make(source, chunk)
            except FrameMismatch:
                continue
        raise AssertionError("without frames nothing can mismatch")

    def _make(self, source: int, chunk: Chunk) -> Made:
        self.templater.start_over()
        bad, columns, lines = (
            Quarantine(),
            _Columns(self.recipe.kind, self.recipe.prepare.held_out),
            list(chunk.lines()),
        )
        n_examples = self._strikes = 0
        for batch in _batches(item for line in lines for item in self.examples(line, source, bad)):
            n_examples += len(batch)
            for line, fitted in self.fitted(batch, bad):
                columns.add(line, fitted)
            columns.pack()
        facts = {
            "records": len(lines),
            "further": n_examples + bad.n_unread - len(lines),
            "quarantined": dict(sorted(bad.reasons.items())),
            "first": bad.first,
            "done": dict(sorted((columns.done + self.templater.counts).items())),
        }
        return Made(columns.table(), bad.table(), facts)

    # -- record -> examples -> text -> ids ---------------------------------------------------------------------------

    def examples(self, line: Line, source: int, bad: "Quarantine") -> list[tuple[Line, Example]]:
        prepare, reading = self.recipe.prepare, self.recipe.readings[source]
        ties = prepare.ties == "keep"
        try:
            if line.record is None:
                raise Unusable(line.reason, line.detail)
            record = renamed(line.record, reading.columns) if reading.columns else line.record
            found = self._readers[source](record)
            expanded = examples.expand(
                found, pairing=prepare.pairing, ties=ties, as_labels=self.recipe.kind == "labels"
            )
        except Unusable as unusable:
            bad.unread(line, unusable)
            return []
        return [(line, example) for example in expanded]

    def fitted(self, read: Iterable[tuple[Line, Example]], bad: "Quarantine") -> Iterator[tuple[Line, Fitted]]:
        rendered: list[tuple[Line, Example, Text]] = []
        with ChatTemplate.limits():
            for line, example in read:
                try:
                    examples.check(example, ties=self.recipe.prepare.ties == "keep")
                    rendered.append((line, example, self._text(example)))
                except (Unusable, TemplateLimit) as error:
                    bad.add(line, self._unusable(error))
        tokens = self.encoder.encode([text for _, _, text in rendered])
        for (line, example, _), ids in zip(rendered, tokens, strict=True):
            try:
                fitted = fit(example, ids, self.recipe.prepare, self._encode_one)
                if isinstance(example, Pair) and self.recipe.prepare.ties != "keep":
                    _check_differ(fitted)
                yield line, fitted
            except (Unusable, TemplateLimit) as error:
                bad.add(line, self._unusable(error))

    def _unusable(self, error: Unusable | TemplateLimit) -> Unusable:
        """A record may be too much for a template. Where record after record is, the template is to blame."""
        if isinstance(error, Unusable):
            return error
        self._strikes += 1
        if self._strikes > _STRIKES:
            raise error
        return Unusable("template takes too much", str(error))

    def one(self, example: Example) -> tuple[Tokens, Fitted]:
        """An example's ids in full, and as they are used."""
        with ChatTemplate.limits():
            examples.check(example, ties=self.recipe.prepare.ties == "keep")
        tokens = self._encode_one(example)
        return tokens, fit(example, tokens, self.recipe.prepare, self._encode_one)

    def _text(self, example: Example) -> Text:
        # Spare the template, and the tokenizer, whose time can grow with the square of a word, what is too long at sight.
        n, most = max(map(_n_characters, (example.prompt, *example.answers))), self.recipe.prepare.max_length
        if n > (most * CHARACTERS_PER_TOKEN if self.recipe.prepare.too_long == "drop" else MOST_CHARACTERS):
            raise Unusable("too long", f"{n:,} characters, prepare.max_length is {most} tokens")
        return self.templater.render(example)

    def _encode_one(self, example: Example) -> Tokens:
        counted = self.templater.counts.copy()  # when it was rendered first
        with ChatTemplate.limits():
            text = self._text(example)
        self.templater.counts = counted
        return self.encoder.encode([text])[0]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cycles: records make none, and are so many small objects that it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _n_characters(turns: Turns) -> int:
    return len(turns) if isinstance(turns, str) else sum(len(turn.get("content") or "") for turn in turns)


def _batches(items: Iterable[tuple[Line, Example]]) -> Iterator[list[tuple[Line, Example]]]:
    """As many examples as one batch of the tokenizer takes well, and no more text than memory does."""
    batch: list[tuple[Line, Example]] = []
    size = 0
    for line, example in items:
        if batch and (len(batch) == BATCH or size + len(line.raw) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((line, example))
        size += len(line.raw)
    if batch:
        yield batch


def _check_differ(fitted: Fitted) -> None:
    chosen, rejected = fitted.tokens.answers
    if chosen == rejected:
        raise Unusable("chosen equals rejected", "after cutting" if any(fitted.cut_answers) else "after templating")


class Quarantine:
    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> line and detail of a record with it
        self.n_unread = 0
        self.rows: list[dict[str, Any]] = []

    def unread(self, line: Line, unusable: Unusable) -> None:
        """A record of which no example could be made."""
        self.n_unread += 1
        self.add(line, unusable)

    def add(self, line: Line, unusable: Unusable) -> None:
        # A lone surrogate in a key or a value can reach the detail; it must not keep the quarantine from being written.
        detail = unusable.detail.encode("utf-8", "backslashreplace").decode()
        self.reasons[unusable.reason] += 1
        self.first.setdefault(unusable.reason, f"line {line.number}{': ' if detail else ''}{detail}")
        self.rows.append(
            {"source": line.source, "line": line.number, "reason": unusable.reason, "detail": detail, "raw": line.raw}
        )

    def table(self) -> pa.Table:
        # What cannot be read is found out before what cannot be used.
        return pa.Table.from_pylist(sorted(self.rows, key=lambda row: row["line"]), schema=QUARANTINE)


# -- rows as columns -------------------------------------------------------------------------------------------------


class _Columns:
    """Rows on their way into Arrow. Ids become bytes at once: as Python numbers they would take ten times the memory."""

    def __init__(self, kind: str, held_out: float) -> None:
        self._schema, self._held_out = SCHEMAS[kind], held_out
        self._answers = ANSWERS["pairs"] if kind == "pairs" else ANSWERS["labels"][:1]
        self._values: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._batches: list[pa.RecordBatch] = []
        self.done: Counter[str] = Counter()

    def add(self, line: Line, fitted: Fitted) -> None:
        example, tokens, values = fitted.example, fitted.tokens, self._values
        prompt = plain_text(example.prompt)
        prompt_ids = array("i", tokens.prompt).tobytes()
        values["split"].append(HELD_OUT if _fraction(prompt) < self._held_out else TRAIN)
        values["source"].append(line.source)
        values["line"].append(line.number)
        values["prompt"].append(prompt)
        values["prompt_ids"].append(prompt_ids)
        values["boundary"].append("exact" if tokens.exact else "split")
        values["n_prompt"].append(len(tokens.prompt))
        values["cut_prompt"].append(fitted.cut_prompt)
        self._add_answers(prompt_ids, fitted, b"" if isinstance(example, Pair) else bytes([example.label]))
        if isinstance(example, Pair):
            values["chosen"].append(plain_text(example.chosen))
            values["rejected"].append(plain_text(example.rejected))
            values["chosen_score"].append(example.chosen_score)
            values["rejected_score"].append(example.rejected_score)
        else:
            completion = plain_text(example.completion)
            values["completion"].append(completion)
            values["label"].append(example.label)
            values["prompt_hash"].append(_number(prompt_ids))
            values["text_hash"].append(_number(completion.encode()))
            values["ids_hash"].append(_number(values["completion_ids"][-1]))
        self._count(fitted)

    def _add_answers(self, prompt_ids: bytes, fitted: Fitted, label: bytes) -> None:
        keys, whole, values = b"", b"", self._values
        for name, ids, cut in zip(self._answers, fitted.tokens.answers, fitted.cut_answers, strict=True):
            answer, cut_off = array("i", ids).tobytes(), array("i", cut).tobytes()
            key = key_of_bytes(prompt_ids, answer)
            keys += key
            whole += key_of_bytes(prompt_ids, answer + cut_off) if cut else key
            values[f"{name}_ids"].append(answer)
            values[f"{name}_key"].append(key)
            values[f"n_{name}"].append(len(ids))
            values[f"cut_{name}"].append(len(cut))
            values[f"{name}_cut_ids"].append(cut_off)
        values["example_id"].append(_hash(keys + label).hex())
        values["whole_id"].append(_number(whole + label))

    def _count(self, fitted: Fitted) -> None:
        self.done["exact" if fitted.tokens.exact else "split"] += 1
        if fitted.tokens.ended:
            self.done["ended"] += 1
        if fitted.cut_prompt:
            self.done["cut_prompts"] += 1
        if any(fitted.cut_answers):
            self.done["cut_answers"] += 1

    def pack(self) -> None:
        columns = [
            _id_lists(self._values[field.name])
            if pa.types.is_list(field.type)
            else pa.array(self._values[field.name], type=field.type)
            for field in self._schema
        ]
        self._batches.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        for values in self._values.values():
            values.clear()

    def table(self) -> pa.Table:
        return pa.Table.from_batches(self._batches, schema=self._schema).combine_chunks()


def _id_lists(rows: list[bytes]) -> pa.ListArray:
    offsets = array("i", [0])
    for ids in rows:
        offsets.append(offsets[-1] + len(ids) // 4)
    values = pa.Array.from_buffers(pa.int32(), offsets[-1], [None, pa.py_buffer(b"".join(rows))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _fraction(prompt: str) -> float:
    """Where a prompt falls in [0, 1): by its text alone, so it never changes sides when data is added.

    Spaces and composed characters do not count: prompts that differ in them alone may be one to the model.
    """
    text = " ".join(unicodedata.normalize("NFC", prompt).split())
    return _number(text.encode()) / 2**64


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _number(data: bytes) -> int:
    return int.from_bytes(_hash(data), "big")


# -- parts on disk ---------------------------------------------------------------------------------------------------


def table_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.arrow"


def record_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.json"


def start(recipe: Recipe, folder: Path) -> Callable[..., dict[str, Any]]:
    """What a worker does with a task: a part, made and committed. Only its record goes back."""
    maker = Maker(recipe)
    return lambda number, source, chunk: write(folder, number, source, maker.make(source, chunk))


def write(folder: Path, number: int, source: int, made: Made) -> dict[str, Any]:
    """Commit a part; its record last. The disk is not waited for: a part that was torn is noticed, and made again."""
    path = table_file(folder, number)
    entries = {
        name: artifact.commit_file(file, artifact.arrow_stream(table), durable=False, rows=len(table))
        for name, file, table in (
            ("table", path, made.table),
            ("quarantine", path.with_suffix(".quarantine"), made.quarantine),
        )
    }
    record = {**made.facts, "source": source, **entries}
    artifact.commit_bytes(record_file(folder, number), artifact.seal(record), durable=False)
    return record


def finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a part that is there and undamaged."""
    path = record_file(folder, number)
    if not path.exists():
        return None
    try:
        record = artifact.unseal(path)
    except IntegrityError:
        return None
    return None if any(artifact.damage(folder, record[name]) for name in ("table", "quarantine")) else record
