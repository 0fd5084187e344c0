"""The account of a conversion: the config, and for every key of the file what it became, why it is ignored, or what differs."""

import contextlib
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefcache.pipeline.config_file import validate
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.foreign_programs import LLAMAFACTORY, Program
from prefcache.pipeline.training.objective import Objective

UNKNOWN = "not known here"
_OFF: tuple[Any, ...] = (False, 0, None, "", [], {})  # values that ask for nothing


@dataclass
class Converted:
    program: Program
    given: Mapping[str, Any]  # what the file says, without nulls
    defaults: Mapping[str, Any] = field(default_factory=dict)  # the program's, where a result depends on them
    config: dict[str, Any] = field(default_factory=dict)  # a tree, as in its YAML
    became: dict[str, str] = field(default_factory=dict)  # theirs -> our key and value
    ignored: dict[str, str] = field(default_factory=dict)  # theirs -> why it has no meaning here
    differs: dict[str, str] = field(default_factory=dict)  # theirs -> what will differ

    def get(self, theirs: str, default: Any = None) -> Any:
        """Return what the file says, or else the program's default."""
        return self.given.get(theirs, self.defaults.get(theirs, default))

    def number(self, theirs: str, default: float | None = None) -> float:
        return self._as_number(theirs, self.get(theirs, default))

    def numbers(self, theirs: str) -> list[float]:
        value = self.get(theirs) or []
        return [self._as_number(theirs, each) for each in (value if isinstance(value, list) else [value])]

    def _as_number(self, theirs: str, value: Any) -> float:
        with contextlib.suppress(ValueError):
            value = float(value) if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._unexpected(theirs, value, "a number")
        return value

    def text(self, theirs: str) -> str | None:
        value = self.get(theirs)
        if isinstance(value, Mapping | list):
            raise self._unexpected(theirs, value, "a word")
        return None if value is None else str(value)

    def names(self, theirs: str) -> list[str]:
        """Return a list of names, or those that commas separate."""
        value = self.get(theirs) or []
        if isinstance(value, Mapping) or (
            isinstance(value, list) and any(isinstance(each, Mapping | list) for each in value)
        ):
            raise self._unexpected(theirs, value, "names")
        names = value if isinstance(value, list) else str(value).split(",")
        return [str(name).strip() for name in names]

    def mappings(self, theirs: str) -> list[Mapping[str, Any]]:
        """Return a mapping, or a list of them, as a list."""
        value = self.get(theirs) or []
        entries = [value] if isinstance(value, Mapping) else value
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise self._unexpected(theirs, value, "a mapping or a list of mappings")
        return entries

    def _unexpected(self, theirs: str, value: Any, expected: str) -> UsageError:
        return UsageError(f"{theirs}: found {value!r}, expected {expected}, as in {self.program.name}.")

    def __contains__(self, theirs: str) -> bool:
        return theirs in self.given or theirs in self.defaults

    def put(self, theirs: str, ours: str, value: Any) -> None:
        tree = self.config
        *sections, last = ours.split(".")
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[last] = value
        is_default = theirs not in self.given and theirs in self.defaults
        self.became[f"{theirs} (default)" if is_default else theirs] = f"{ours}: {value}"

    def put_same(self, names: Mapping[str, str]) -> None:
        """Take values over as they are: {theirs: ours}."""
        for theirs, ours in names.items():
            if theirs in self and not self.is_explained(theirs):
                self.put(theirs, ours, self.get(theirs))

    def note(self, theirs: Iterable[str], became: str) -> None:
        """Record what keys of the file became together with others."""
        self.became |= {key: became for key in theirs if key in self.given}

    def is_explained(self, theirs: str) -> bool:
        return theirs in self.became or theirs in self.ignored or theirs in self.differs

    def explain_rest(
        self,
        ignored: Mapping[str, str],
        prefixes: Mapping[str, str],
        differs: Mapping[str, str],
        others: Iterable[str] = (),
    ) -> None:
        """Account for the keys that are left. `others`: keys that are read elsewhere, and had nothing to say here."""
        others = set(others)
        for key, value in self.given.items():
            if self.is_explained(key):
                continue
            prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
            if key in differs:
                (self.ignored if value in _OFF else self.differs)[key] = "off" if value in _OFF else differs[key]
            elif key in ignored:
                self.ignored[key] = ignored[key]
            elif key in others:
                self.ignored[key] = "it is the default, or not read by this loss"
            elif prefix is not None:
                self.ignored[key] = prefixes[prefix]
            else:
                self.differs[key] = UNKNOWN

    @property
    def unknown_keys(self) -> list[str]:
        return [key for key, why in self.differs.items() if why == UNKNOWN]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources of the config, of training and of evaluation data."""
        prepare = self.config.get("prepare", {})
        return [*prepare.get("data", []), *prepare.get("held_out_data", [])]

    @property
    def data_paths(self) -> tuple[str, ...]:
        """The files or folders of data that the file names."""
        return tuple(str(each["path"]) for each in self.sources if "path" in each)

    def drop_unknown_formats(self, known: Container[str]) -> None:
        """Leave a source to be recognised by its columns where we have no format of its name."""
        for each in self.sources:
            if each.get("format", "auto") not in known and "format" in each:
                name = each.pop("format")
                each.pop("format_args", None)
                self.differs[f"type: {name}"] = (
                    "prefcache has no format of this name and recognises the data by its columns; set prepare.format (`prefcache formats`)"
                )

    def put_template(self, is_text: bool | None) -> None:
        """Say whether the data gets the chat template: TRL takes text as it is. None: the data is not here to be looked at."""
        prepare = self.config["prepare"]
        if self.program is LLAMAFACTORY or "template" in prepare or any("format" in each for each in self.sources):
            return  # LLaMA-Factory applies its template to all data, and a format knows whether it writes the turns itself
        if is_text:
            self.put("(the data is text)", "prepare.template", "none")
        elif is_text is None and "data" in prepare:
            self.differs["(the data)"] = (
                "where it is text and not messages, TRL applies no template; set prepare.template: none"
            )

    def check(self) -> None:
        """Check that this is a config that trains, apart from what the file cannot say."""
        tree = {"model": "model", "out": "out", **self.config}
        tree["prepare"] = {"data": ["data"], **tree.get("prepare", {})}
        Objective(validate(tree, "As a config of ours: ").train)


def put_model(converted: Converted, name: str, revision: str) -> None:
    """Put the model, and its revision unless it is a local folder, which has none."""
    converted.put_same({name: "model"})
    if revision in converted.given:
        if Path(str(converted.get(name))).exists():
            converted.ignored[revision] = "the model is a local folder"
        else:
            converted.put(revision, "revision", converted.given[revision])


def put_losses(converted: Converted, names: list[str], key: str, weights_key: str) -> None:
    """Put one loss, or several with their weights."""
    weights = converted.numbers(weights_key) or [1.0] * len(names)
    if len(weights) != len(names):
        raise UsageError(f"{weights_key} has {len(weights)} values for {len(names)} losses. Give one for each.")
    loss = names[0] if len(names) == 1 else dict(zip(names, map(float, weights), strict=True))
    converted.put(key, "train.loss", loss)
    converted.note([weights_key], "train.loss")


def put_share(converted: Converted, theirs: str) -> None:
    """Hold out a share of the prompts; a number of examples has no counterpart."""
    size = converted.number(theirs, 0)
    if 0 < size < 1:
        converted.put(theirs, "prepare.held_out", float(size))
    elif size:
        converted.differs[theirs] = f"{size} examples: prepare.held_out is a share, and stays at its default"
    else:
        converted.put("(no evaluation data)", "prepare.held_out", 0.0)


def put_kto(converted: Converted, batch_key: str) -> None:
    """Prepare labels, with mismatched answers chosen as TRL's KTOTrainer does: within the batches of one device."""
    converted.config["prepare"]["examples"] = "labels"
    if (size := int(converted.number(batch_key))) > 1:
        converted.config["prepare"]["kl_batch_size"] = size


def sources(
    converted: Converted, theirs: str, name: Any, subset: Any = None, split: Any = None, revision: Any = None
) -> list[dict[str, Any]]:
    """Name the sources of a data set: a file or a folder if it exists, else a data set on the hub.

    A name alone may be either here, as in the other programs; with a subset, a split or a revision it is on the hub.
    """
    place, (split, _, part) = Path(str(name)), str(split or "train").partition("[")
    if not place.exists():
        full = None if split == "train" and not part else f"{split}[{part}" if part else split
        more = {"name": subset, "split": full, "revision": revision}
        given = {key: value for key, value in more.items() if value is not None}
        return [{"hub": name, **given} if given else {"path": name}]
    first = re.fullmatch(r":(\d+)\]", part)
    if part and first is None:
        converted.differs[f"{theirs}: {split}[{part}"] = "all of it is read; prepare.data has max_records and weight"
    limit = {"max_records": int(first[1])} if first else {}
    if place.is_dir() and any((place / marker).exists() for marker in _SAVED_TO_DISK):
        return [{"path": name, **({"split": split} if split != "train" else {}), **limit}]
    if place.is_dir() and (files := _files_of_split(place, split)):
        return [{"path": file, **limit} for file in files]
    return [{"path": name, **limit}]


# What a folder has that datasets' save_to_disk wrote.
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
# Words in the names of files by which `datasets` knows their split.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def _files_of_split(folder: Path, split: str) -> list[str]:
    """Return the files of a folder that belong to a split by their names; none if no name speaks of a split."""
    found: dict[str, list[str]] = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = file.relative_to(folder).as_posix().lower()
        for each, words in _SPLITS.items():
            if re.search(rf"(^|[-._ /0-9])({'|'.join(words)})([-._ /0-9]|$)", name):
                found.setdefault(each, []).append(str(file))
    return found.get(split, [])
