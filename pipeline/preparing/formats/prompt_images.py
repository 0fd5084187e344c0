"""The pictures of a prompt, in any format: where they stand in its text, and where the record has them.

    a part of a content   {"type": "image"}, with the picture itself (image, url, path, base64, or OpenAI's image_url), or without
    <image>               in the text of a record that has a column of pictures
    neither               the pictures of the column come before the first user turn, as in TRL

Parts without a picture, and every <image>, take theirs from the column `images` (or `image`), in their order. There have to be
as many of them as of pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from prefcache.pipeline.preparing.example import IMAGE_MARK, Label, Message, Pair, Ranking, Turns, Unusable

COLUMNS = ("images", "image")
MARKER = "<image>"
# What parts of other kinds are called by the frameworks.
_OTHER_KINDS = {
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_OTHER_COLUMNS = {"videos": "video", "audios": "audio"}  # of LLaMA-Factory and ms-swift
_COLUMNS_OF_MEDIA = frozenset((*COLUMNS, *_OTHER_COLUMNS))
_IMAGE_KINDS = ("image", "image_url", "input_image")
_SOURCES = ("image", "url", "path", "base64", "image_url")


def read_parts(parts: Sequence[Any], column: str) -> tuple[str, tuple[Any, ...]] | None:
    """Read a content in parts: its text with a mark for each picture, and the pictures, None for one that the part lacks.

    Return None if it holds anything but texts and pictures.
    """
    texts: list[str] = []
    images: list[Any] = []
    for part in parts:
        if not isinstance(part, dict):
            return None
        kind = part.get("type") or ("image" if "image" in part or "image_url" in part else "text")
        if kind in _IMAGE_KINDS:
            texts.append(IMAGE_MARK)
            images.append(_find_image(part))
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind in _OTHER_KINDS:
            raise Unusable(f"{_OTHER_KINDS[kind]} in a message", column)
        else:
            return None
    return ("".join(texts), tuple(images)) if texts else None


def _find_image(part: dict[str, Any]) -> Any:
    key = next((key for key in _SOURCES if part.get(key)), None)
    if key is None:
        return None
    value = part[key]
    if key == "image_url" and isinstance(value, dict):
        return value.get("url")
    # Else it could be taken for a path.
    is_bare = key == "base64" and isinstance(value, str) and not value.startswith("data:")
    return f"data:image;base64,{value}" if is_bare else value


def place_images(example: Pair | Label | Ranking, record: dict[str, Any]) -> Pair | Label | Ranking:
    """Return the example with the pictures of its record, and a mark in the prompt for each."""
    prompt, answers_have_images = example.prompt, any(map(_has_images, _answers(example)))
    if not answers_have_images and _COLUMNS_OF_MEDIA.isdisjoint(record) and not _has_images(prompt):
        return example
    for column in _OTHER_COLUMNS:
        if isinstance(record.get(column), list) and record[column]:
            raise Unusable(f"{_OTHER_COLUMNS[column]} in the record", f"column {column}")
    if answers_have_images:
        raise Unusable("image in an answer")
    own = [] if isinstance(prompt, str) else [image for turn in prompt for image in turn.get(IMAGE_MARK, ())]
    if not isinstance(prompt, str):
        prompt = [
            {key: turn[key] for key in turn if key != IMAGE_MARK} if IMAGE_MARK in turn else turn for turn in prompt
        ]
    pictures = _read_column(record)
    if own:
        _check_number(sum(image is None for image in own), len(pictures))
        rest = iter(pictures)
        return replace(example, prompt=prompt, images=tuple(next(rest) if image is None else image for image in own))
    n_markers = count_markers(prompt)
    if n_markers:
        _check_number(n_markers, len(pictures))
        prompt = _replace_markers(prompt)
    elif pictures:
        prompt = _put_before_question(prompt, len(pictures))
    return replace(example, prompt=prompt, images=pictures)


def _check_number(n_places: int, n_pictures: int) -> None:
    if n_places != n_pictures:
        what = "places of images in the prompt, against images of the record"
        raise Unusable("wrong number of images", what, n_found=n_places, n_limit=n_pictures)


def _read_column(record: dict[str, Any]) -> tuple[Any, ...]:
    value = next((record[column] for column in COLUMNS if record.get(column) is not None), ())
    if isinstance(value, list | tuple):
        return tuple(value)
    return () if value == "" or value != value else (value,)  # NaN, as tables have it


# -- markers in text -------------------------------------------------------------------------------------------------


def count_markers(prompt: Turns) -> int:
    """Count the <image> in the texts of a prompt."""
    return prompt.count(MARKER) if isinstance(prompt, str) else sum(text.count(MARKER) for text in _contents(prompt))


def _replace_markers(prompt: Turns) -> Turns:
    if isinstance(prompt, str):
        return prompt.replace(MARKER, IMAGE_MARK)
    return [
        turn | {"content": turn["content"].replace(MARKER, IMAGE_MARK)}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in prompt
    ]


def _put_before_question(prompt: Turns, n: int) -> Turns:
    if isinstance(prompt, str):
        return IMAGE_MARK * n + prompt
    for at, turn in enumerate(prompt):
        if turn["role"] == "user":
            asked = turn | {"content": IMAGE_MARK * n + (turn.get("content") or "")}
            return [*prompt[:at], asked, *prompt[at + 1 :]]
    raise Unusable("wrong number of images", "images, and no user turn to put them into", n_found=0, n_limit=n)


def _contents(turns: list[Message]) -> Iterator[str]:
    return (content for turn in turns if isinstance(content := turn.get("content"), str))


# -- pictures of their own -------------------------------------------------------------------------------------------


def _answers(example: Pair | Label | Ranking) -> list[Turns]:
    if isinstance(example, Ranking):
        return [candidate.turns for candidate in example.answers]
    return list(example.answers)


def _has_images(turns: Turns) -> bool:
    if isinstance(turns, str):
        return False
    # Every example comes here: a loop takes a third of the time of any().
    for turn in turns:  # noqa: SIM110
        if IMAGE_MARK in turn:
            return True
    return False
