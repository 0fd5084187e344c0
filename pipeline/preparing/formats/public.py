"""Public preference data sets, each read as its publisher lays it out.

A data set that grades its answers, or calls some a tie, gives a Ranking, to which `pairing` and `ties` apply.
"""

import re
from collections.abc import Iterable
from typing import Literal

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.example import Candidate, Message, Pair, Ranking, Turns, Unusable
from prefcache.pipeline.preparing.formats import fields
from prefcache.pipeline.preparing.formats.registry import Record, data_format

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_BEGINS = re.compile(r"\s*Human:")
_HELPSTEER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")
_ARGILLA = ("instruction", "chosen_response", "rejected_response")
_ORCA = ("question", "chosen", "rejected")
_STACK_EXCHANGE = ("question", "response_j", "response_k")
# Whole conversations come with grades under these names, depending on who published them.
_GRADES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)


def _one_of(option: str, name: str, *known: str) -> str:
    if option not in known:
        raise UsageError(f"prepare.format_args: format {name} has no by: {option!r}. It has: {', '.join(known)}.")
    return option


# -- transcripts -----------------------------------------------------------------------------------------------------


def _is_hh(record: Record) -> bool:
    return (
        fields.has_text(record, "chosen", "rejected")
        and not fields.has(record, "prompt")
        and all(
            _HH_BEGINS.match(record[column]) and "\n\nAssistant:" in record[column] for column in ("chosen", "rejected")
        )
    )


@data_format("chosen", "rejected", when=_is_hh)
def hh(record: Record) -> Pair:
    """Anthropic/hh-rlhf: chosen and rejected as transcripts of "Human:" and "Assistant:" after blank lines."""
    chosen, rejected = _transcript(record, "chosen"), _transcript(record, "rejected")
    n = fields.count_shared_turns(chosen, rejected)
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise Unusable("no assistant turn", f"{column} ends with a human's turn")
        if not turns[-1]["content"].strip():
            raise Unusable("empty answer", column)
    return Pair(prompt=chosen[:n], chosen=chosen[n:], rejected=rejected[n:])


def _transcript(record: Record, column: str) -> list[Message]:
    """Read the turns of a transcript. Only markers after a blank line count: people quote "Human:" in what they say."""
    text = fields.text(record, column)
    before, *parts = _HH_TURN.split("\n\n" + text.lstrip() if _HH_BEGINS.match(text) else text)
    if not parts or before.strip():
        raise Unusable("no transcript", f'{column} does not begin with "Human:" or "Assistant:" after a blank line')
    # The space after a marker is not speech.
    return _to_messages(parts[::2], (speech.removeprefix(" ") for speech in parts[1::2]))


def _to_messages(speakers: Iterable[str], speeches: Iterable[str]) -> list[Message]:
    return [
        {"role": fields.ROLES[speaker.lower()], "content": speech}
        for speaker, speech in zip(speakers, speeches, strict=True)
    ]


def _drop_empty_answer(turns: list[Message]) -> list[Message]:
    """Leave out the last turn if it is an answer yet to be given."""
    is_empty = turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
    return turns[:-1] if is_empty else turns


# -- UltraFeedback in its several forms ------------------------------------------------------------------------------


@data_format(
    *("chosen", "rejected"),
    optional=(*fields.CONTEXT, *(column for grades in _GRADES for column in grades)),
    when=lambda record: fields.has(record, "prompt") and fields.has_conversations(record, "chosen", "rejected"),
)
def ultrafeedback_binarized(record: Record) -> Pair:
    """HuggingFaceH4/ultrafeedback_binarized and the like: a prompt, whole conversations, and their scores."""
    chosen, rejected = fields.conversation(record, "chosen"), fields.conversation(record, "rejected")
    n = fields.count_shared_turns(chosen, rejected)
    good, bad = next((grades for grades in _GRADES if fields.has(record, *grades)), _GRADES[0])
    # Equal scores are not a tie: the data set itself says which answer is the chosen one.
    columns = fields.data_columns(record, "pairs", chosen_score=good, rejected_score=bad)
    return fields.make_pair(record, chosen[:n], chosen[n:], rejected[n:], columns)


@data_format(
    *_ARGILLA,
    optional=("chosen_avg_rating", "rejected_avg_rating"),
    makes=Ranking,
    when=fields.having(text=_ARGILLA),
)
def argilla_ultrafeedback(record: Record) -> Ranking:
    """argilla/ultrafeedback-binarized-preferences: instruction and two responses, which tie where their ratings do."""
    chosen, rejected = fields.text(record, "chosen_response"), fields.text(record, "rejected_response")
    good = fields.optional_number(record, "chosen_avg_rating")
    bad = fields.optional_number(record, "rejected_avg_rating")
    winner = 0.0 if good is not None and good == bad else 1.0
    answers = (Candidate(chosen, winner, good), Candidate(rejected, 0.0, bad))
    return Ranking(prompt=fields.text(record, "instruction"), answers=answers)


@data_format(
    *("instruction", "completions"),
    makes=Ranking,
    when=lambda record: fields.has_text(record, "instruction") and fields.has_rows(record, "completions", "response"),
)
def ultrafeedback(record: Record, by: Literal["fine-grained", "overall"] = "fine-grained") -> Ranking:
    """openbmb/UltraFeedback: instruction and graded completions. by: fine-grained (their mean), or overall."""
    # The overall score was 10 for many poor answers until the end of 2023, and copies of that version live on.
    grade = f"{_one_of(by, 'ultrafeedback', 'fine-grained', 'overall')}_score"
    answers = []
    for completion in fields.rows(record, "completions"):
        score = fields.number(completion, grade)
        answers.append(Candidate(fields.text(completion, "response"), score, score))
    return Ranking(prompt=fields.text(record, "instruction"), answers=tuple(answers))


# -- Orca ------------------------------------------------------------------------------------------------------------


_is_distilabel_orca = fields.having(text=("input", "chosen", "rejected"), absent=("instruction",))


@data_format(
    *("input", "chosen", "rejected"),
    optional=("system", "rating", "status"),
    makes=Ranking,
    when=lambda record: "rating" in record and _is_distilabel_orca(record),
)
def distilabel_orca(record: Record) -> Ranking:
    """argilla/distilabel-intel-orca-dpo-pairs: system, input, chosen, rejected, rating, and a status: perhaps tie."""
    ratings = record.get("rating")
    if ratings is not None and not isinstance(ratings, list):
        raise Unusable("wrong type", f"rating is {fields.type_name(ratings)}; expected a list of numbers")
    good = bad = None
    # A rating is null if the judge's answer could not be parsed.
    if ratings and None not in ratings:
        # In the order in which the judge saw the answers; the better one became the chosen.
        numbers = [fields.number({"rating": rating}, "rating") for rating in ratings]
        good, bad = max(numbers), min(numbers)
    tie = fields.optional_text(record, "status") == "tie" or (good is not None and good == bad)
    chosen, rejected = fields.text(record, "chosen"), fields.text(record, "rejected")
    prompt = fields.with_system(record, fields.text(record, "input"))
    answers = (Candidate(chosen, 0.0 if tie else 1.0, good), Candidate(rejected, 0.0, bad))
    return Ranking(prompt=prompt, answers=answers)


@data_format(*_ORCA, optional=("system",), when=fields.having(text=_ORCA, absent=("prompt",)))
def orca_dpo_pairs(record: Record) -> Pair:
    """Intel/orca_dpo_pairs: system, question, chosen and rejected, each text."""
    question, chosen, rejected = (fields.text(record, column) for column in _ORCA)
    return Pair(prompt=fields.with_system(record, question), chosen=chosen, rejected=rejected)


# -- HelpSteer -------------------------------------------------------------------------------------------------------


@data_format(
    *("prompt", "response_1", "response_2", "preference_strength"),
    makes=Ranking,
    when=fields.having(text=("prompt", "response_1", "response_2"), present=("preference_strength",)),
)
def helpsteer2(record: Record) -> Ranking:
    """nvidia/HelpSteer2, preference: prompt, two responses, and preference_strength: below 0 the first is better."""
    strength = fields.number(record, "preference_strength")
    first, second = fields.text(record, "response_1"), fields.text(record, "response_2")
    answers = (Candidate(first, -strength), Candidate(second, strength))
    return Ranking(prompt=_helpsteer_prompt(record), answers=answers)


def _helpsteer_prompt(record: Record) -> Turns:
    """Read a prompt; one of several turns begins as plain text and marks each later turn."""
    text = fields.text(record, "prompt")
    first, *parts = _HELPSTEER_TURN.split(text)
    if not parts:
        return text
    turns = _to_messages(["User"] if first.strip() else [], [first] if first.strip() else [])
    turns += _to_messages(parts[::2], parts[1::2])
    # The line break before a mark belongs to the mark.
    for turn in turns[:-1]:
        turn["content"] = turn["content"].removesuffix("\n")
    return _drop_empty_answer(turns)


@data_format(
    *("context", "response1", "response2", "overall_preference"),
    makes=Ranking,
    when=fields.having(messages=("context",), text=("response1", "response2"), present=("overall_preference",)),
)
def helpsteer3(record: Record) -> Ranking:
    """nvidia/HelpSteer3: context, two responses, and overall_preference: below 0 the first is better."""
    strength = fields.number(record, "overall_preference")
    first, second = fields.text(record, "response1"), fields.text(record, "response2")
    answers = (Candidate(first, -strength), Candidate(second, strength))
    return Ranking(prompt=fields.conversation(record, "context"), answers=answers)


# -- others ----------------------------------------------------------------------------------------------------------


@data_format(
    *("prompt", "answers"),
    makes=Ranking,
    when=lambda record: fields.has_text(record, "prompt") and fields.has_rows(record, "answers", "answer", "rank"),
)
def nectar(record: Record) -> Ranking:
    """berkeley-nest/Nectar: prompt, a transcript that ends with "Assistant:", and answers, of which rank 1 is best."""
    prompt = _drop_empty_answer(_transcript(record, "prompt"))
    if not prompt:
        raise Unusable("empty prompt")
    answers = tuple(
        Candidate(fields.text(answer, "answer"), -fields.number(answer, "rank"))
        for answer in fields.rows(record, "answers")
    )
    return Ranking(prompt=prompt, answers=answers)


@data_format(
    *("prompt", "response_0", "response_1", "better_response_id"),
    optional=("safer_response_id",),
    when=lambda record: (
        fields.has_text(record, "prompt", "response_0", "response_1")
        and (fields.has(record, "better_response_id") or fields.has(record, "safer_response_id"))
    ),
)
def pku_saferlhf(record: Record, by: Literal["better", "safer"] = "better") -> Pair:
    """PKU-Alignment/PKU-SafeRLHF: prompt, response_0, response_1 and which one is better. by: better, or safer."""
    column = f"{_one_of(by, 'pku_saferlhf', 'better', 'safer')}_response_id"
    answers = fields.text(record, "response_0"), fields.text(record, "response_1")
    better = _zero_or_one(record, column)
    return Pair(prompt=fields.text(record, "prompt"), chosen=answers[better], rejected=answers[1 - better])


def _zero_or_one(record: Record, column: str) -> int:
    value = fields.number(record, column)
    if value not in (0, 1):
        raise Unusable("wrong type", f"{column} is {value:g}; expected 0 or 1")
    return int(value)


@data_format(*_STACK_EXCHANGE, when=fields.having(text=_STACK_EXCHANGE))
def stack_exchange_paired(record: Record) -> Pair:
    """lvwerra/stack-exchange-paired: question, response_j, which is the better one, and response_k."""
    question, better, worse = (fields.text(record, column) for column in _STACK_EXCHANGE)
    return Pair(prompt=question, chosen=better, rejected=worse)


@data_format(
    *("history", "human_ref_A", "human_ref_B", "labels"),
    optional=("score_A", "score_B"),
    when=fields.having(text=("history", "human_ref_A", "human_ref_B"), present=("labels",)),
)
def shp(record: Record) -> Pair:
    """stanfordnlp/SHP: history, human_ref_A, human_ref_B, and labels, which is 1 where A is better."""
    better, worse = ("A", "B") if _zero_or_one(record, "labels") else ("B", "A")
    return Pair(
        prompt=fields.text(record, "history"),
        chosen=fields.text(record, f"human_ref_{better}"),
        rejected=fields.text(record, f"human_ref_{worse}"),
        columns=fields.data_columns(record, "pairs", chosen_score=f"score_{better}", rejected_score=f"score_{worse}"),
    )


def _is_webgpt(record: Record) -> bool:
    question = record.get("question")
    has_question = isinstance(question, dict) and "full_text" in question
    return has_question and fields.has_text(record, "answer_0", "answer_1") and fields.has(record, "score_0", "score_1")


@data_format("question", "answer_0", "answer_1", "score_0", "score_1", makes=Ranking, when=_is_webgpt)
def webgpt(record: Record) -> Ranking:
    """openai/webgpt_comparisons: question (its full_text), answer_0, answer_1 and their scores; 0 is a tie."""
    question = fields.get_column(record, "question")
    if not isinstance(question, dict):
        raise Unusable("wrong type", f"question is {fields.type_name(question)}; expected a mapping with full_text")
    answers = []
    for i in "01":
        score = fields.number(record, f"score_{i}")
        answers.append(Candidate(fields.text(record, f"answer_{i}"), score, score))
    return Ranking(prompt=fields.text(question, "full_text"), answers=tuple(answers))


@data_format(
    *("conversation_a", "conversation_b", "winner"),
    makes=Ranking,
    when=fields.having(messages=("conversation_a", "conversation_b"), text=("winner",)),
)
def arena(record: Record) -> Ranking:
    """lmsys/chatbot_arena_conversations: conversation_a, conversation_b and winner: model_a, model_b or a tie."""
    a, b = fields.conversation(record, "conversation_a"), fields.conversation(record, "conversation_b")
    winner = fields.text(record, "winner")
    if winner not in ("model_a", "model_b") and not winner.startswith("tie"):
        raise Unusable("unknown winner", f"{winner[:40]!r}; expected model_a, model_b or tie")
    n = fields.count_shared_turns(a, b)
    answers = (Candidate(a[n:], float(winner == "model_a")), Candidate(b[n:], float(winner == "model_b")))
    return Ranking(prompt=a[:n], answers=answers)
