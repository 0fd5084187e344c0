"""Public preference data sets with images, each read as its publisher lays it out. prompt_images.py says where the images go."""

from collections.abc import Sequence
from typing import Any

from prefcache.pipeline.preparing.example import Candidate, Message, Pair, Ranking, Unusable
from prefcache.pipeline.preparing.formats import fields
from prefcache.pipeline.preparing.formats.registry import Record, data_format

_ANSWERED = ("question", "chosen", "rejected")


def _has_image(record: Record) -> bool:
    return fields.has(record, "image") or fields.has(record, "images")


@data_format(
    *_ANSWERED,
    optional=("image", "system"),
    when=lambda record: fields.has_text(record, *_ANSWERED) and _has_image(record) and not fields.has(record, "prompt"),
)
def rlaif_v(record: Record) -> Pair:
    """openbmb/RLAIF-V-Dataset, SPA-VL, MMPR and the like: image, question, chosen and rejected."""
    question, chosen, rejected = (fields.text(record, column) for column in _ANSWERED)
    return Pair(prompt=fields.with_system(record, question), chosen=chosen, rejected=rejected)


def _is_rlhf_v(record: Record) -> bool:
    return _has_image(record) and fields.has_text(record, "text") and '"rejected"' in record["text"]


@data_format("text", optional=("image",), when=_is_rlhf_v)
def rlhf_v(record: Record) -> Pair:
    """openbmb/RLHF-V-Dataset: image, and text, which is JSON with question, chosen and rejected."""
    texts = fields.parse_json_text(fields.text(record, "text"))
    if not isinstance(texts, dict):
        raise Unusable("wrong type", "text is not JSON with question, chosen and rejected")
    question, chosen, rejected = (fields.text(texts, column) for column in _ANSWERED)
    return Pair(prompt=question, chosen=chosen, rejected=rejected)


def _is_vlfeedback(record: Record) -> bool:
    completions = record.get("completions")
    in_columns = isinstance(completions, dict) and isinstance(completions.get("annotations"), list)
    return fields.has_text(record, "prompt") and (
        in_columns or fields.has_rows(record, "completions", "annotations", "response")
    )


@data_format("prompt", "completions", optional=("image",), makes=Ranking, when=_is_vlfeedback)
def vlfeedback(record: Record) -> Ranking:
    """MMInstruction/VLFeedback: image, prompt, and completions, graded by the mean of their ratings."""
    answers = []
    for annotations, response in _vlfeedback_completions(record):
        if not isinstance(annotations, dict) or not annotations:
            raise Unusable("wrong type", f"annotations is {fields.type_name(annotations)}; expected ratings by aspect")
        ratings = [_rating(annotation) for annotation in annotations.values()]
        score = sum(ratings) / len(ratings)
        answers.append(Candidate(fields.text({"response": response}, "response"), score, score))
    return Ranking(prompt=fields.text(record, "prompt"), answers=tuple(answers))


def _vlfeedback_completions(record: Record) -> Sequence[tuple[Any, Any]]:
    """Read a list of completions; or the lists of each of their fields, as `datasets` stores it."""
    completions = fields.get_column(record, "completions")
    if not isinstance(completions, dict):
        return [(row.get("annotations"), row.get("response")) for row in fields.rows(record, "completions")]
    annotations, responses = completions.get("annotations"), completions.get("response")
    if not isinstance(annotations, list) or not isinstance(responses, list) or len(annotations) != len(responses):
        raise Unusable("wrong type", "completions has no annotation for each response")
    return list(zip(annotations, responses, strict=True))


def _rating(annotation: Any) -> float:
    rating = annotation.get("Rating") if isinstance(annotation, dict) else None
    # Ratings are text.
    return fields.number({"Rating": fields.parse_json_text(rating) if isinstance(rating, str) else rating}, "Rating")


def _turns(record: Record, column: str) -> list[Message]:
    return fields.messages(fields.get_column(record, column), column, role="from", content="value", roles=fields.ROLES)


@data_format(
    *("conversations", "rejected_conversations"),
    optional=("system", "image"),
    when=lambda record: all(
        fields.has_messages(record, column, role="from") for column in ("conversations", "rejected_conversations")
    ),
)
def povid(record: Record) -> Pair:
    """YiyangAiLab/POVID_preference_data_for_VLLMs, CSR and the like: image, conversations, and rejected_conversations."""
    chosen, rejected = _turns(record, "conversations"), _turns(record, "rejected_conversations")
    n = fields.count_shared_turns(chosen, rejected)
    return Pair(prompt=fields.with_system(record, chosen[:n]), chosen=chosen[n:], rejected=rejected[n:])


_OUTPUTS = ("output_1", "output_2")


@data_format(
    *("conversations", *_OUTPUTS, "preference"),
    optional=("image",),
    when=lambda record: (
        fields.has_messages(record, "conversations", role="from")
        and all(isinstance(record.get(column), dict) for column in _OUTPUTS)
        and fields.has(record, "preference")
    ),
)
def llava_rlhf(record: Record) -> Pair:
    """zhiqings/LLaVA-Human-Preference-10K: image, conversations, output_1, output_2, and the number of the better one."""
    answers = {n: [_output(record, column)] for n, column in enumerate(_OUTPUTS, start=1)}
    better = fields.number(record, "preference")
    if better not in answers:
        raise Unusable("wrong type", f"preference is {better:g}; expected 1 or 2")
    return Pair(prompt=_turns(record, "conversations"), chosen=answers[int(better)], rejected=answers[3 - int(better)])


def _output(record: Record, column: str) -> Message:
    """Read an answer, whose speaker is the name of a model."""
    value = fields.get_column(record, column)
    if not isinstance(value, dict):
        raise Unusable("wrong type", f"{column} is {fields.type_name(value)}; expected a turn of from and value")
    return {"role": "assistant", "content": fields.text(value, "value")}
