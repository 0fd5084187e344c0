"""Public preference data sets, each read as its publisher lays it out.

A data set that grades its answers, or calls some a tie, gives a Ranking: `pairing` and `ties` then have their say.
"""

import re
from typing import Literal

from pipeline.errors import UsageError
from pipeline.preparing.example import Message, Pair, Ranked, Ranking, Turns, Unusable
from pipeline.preparing.formats import fields
from pipeline.preparing.formats.registry import Record, data_format

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_BEGINS = re.compile(r"\s*Human:")
_HELPSTEER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")
# Whole conversations come with grades under these names, by who published them.
_GRADES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)


def _is_hh(record: Record) -> bool:
    transcripts = fields.has_text(record, "chosen", "rejected") and not fields.has(record, "prompt")
    return transcripts and all(_is_transcript(record[column]) for column in ("chosen", "rejected"))


def _is_transcript(found: str) -> bool:
    return bool(_HH_BEGINS.match(found)) and "\n\nAssistant:" in found


@data_format("chosen", "rejected", when=_is_hh)
def hh(record: Record) -> Pair:
    """Anthropic/hh-rlhf: chosen and rejected as transcripts of "Human:" and "Assistant:" after blank lines."""
    chosen, rejected = _transcript(record, "chosen"), _transcript(record, "rejected")
    n = fields.shared_turns(chosen, rejected)
    for column, turns in (("chosen", chosen), ("rejected", rejected)):
        _ends_with_an_answer(turns, column)
    return Pair(prompt=chosen[:n], chosen=chosen[n:], rejected=rejected[n:])


def _transcript(record: Record, column: str) -> list[Message]:
    """The turns of a transcript. Only markers after a blank line count: people quote "Human:" in what they say."""
    said = fields.text(record, column)
    before, *parts = _HH_TURN.split("\n\n" + said.lstrip() if _HH_BEGINS.match(said) else said)
    if not parts or before.strip():
        raise Unusable("no transcript", f'{column} does not begin with "Human:" or "Assistant:" after a blank line')
    return _paired(parts)


def _paired(parts: list[str]) -> list[Message]:
    """Messages of a split that alternates between speaker and speech; the space after the marker is not speech."""
    return [
        {"role": fields.ROLES[who.lower()], "content": said.removeprefix(" ")}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _ends_with_an_answer(turns: list[Message], column: str) -> None:
    if turns[-1]["role"] != "assistant":
        raise Unusable("no assistant turn", f"{column} ends with a human's turn")
    if not turns[-1]["content"].strip():
        raise Unusable("empty answer", column)


def _is_ultrafeedback_binarized(record: Record) -> bool:
    return fields.has(record, "prompt") and fields.are_whole(record, "chosen", "rejected")


@data_format(
    "chosen",
    "rejected",
    optional=("system", "tools", "chat_template_kwargs", *(column for grades in _GRADES for column in grades)),
    when=_is_ultrafeedback_binarized,
)
def ultrafeedback_binarized(record: Record) -> Pair:
    """HuggingFaceH4/ultrafeedback_binarized and its kin: a prompt beside whole conversations, and their scores."""
    chosen, rejected = fields.conversation(record, "chosen"), fields.conversation(record, "rejected")
    n = fields.shared_turns(chosen, rejected)
    grades = next((grades for grades in _GRADES if fields.has(record, *grades)), _GRADES[0])
    # Equal scores are no tie: which answer is the chosen one is what this data set says.
    return Pair(
        prompt=fields.with_system(record, chosen[:n]),
        chosen=chosen[n:],
        rejected=rejected[n:],
        **fields.beside(record),
        **fields.scores(record, *grades),
    )


def _is_argilla_ultrafeedback(record: Record) -> bool:
    return fields.has_text(record, "instruction", "chosen_response", "rejected_response")


@data_format(
    "instruction",
    "chosen_response",
    "rejected_response",
    optional=("chosen_avg_rating", "rejected_avg_rating"),
    makes=Ranking,
    when=_is_argilla_ultrafeedback,
)
def argilla_ultrafeedback(record: Record) -> Ranking:
    """argilla/ultrafeedback-binarized-preferences: instruction and two responses, which tie where their ratings do."""
    chosen, rejected = fields.text(record, "chosen_response"), fields.text(record, "rejected_response")
    good = fields.optional_number(record, "chosen_avg_rating")
    bad = fields.optional_number(record, "rejected_avg_rating")
    tie = good is not None and good == bad
    return Ranking(prompt=fields.text(record, "instruction"), answers=_two(chosen, rejected, tie, good, bad))


def _two(
    chosen: str, rejected: str, tie: bool, chosen_score: float | None = None, rejected_score: float | None = None
) -> tuple[Ranked, ...]:
    return Ranked(chosen, 0.0 if tie else 1.0, chosen_score), Ranked(rejected, 0.0, rejected_score)


def _is_ultrafeedback(record: Record) -> bool:
    return fields.has_text(record, "instruction") and fields.has_rows(record, "completions", "response")


@data_format("instruction", "completions", makes=Ranking, when=_is_ultrafeedback)
def ultrafeedback(record: Record, by: Literal["fine-grained", "overall"] = "fine-grained") -> Ranking:
    """openbmb/UltraFeedback: instruction and graded completions. by: fine-grained (their mean), or overall."""
    # The overall score was 10 for many poor answers until the end of 2023, and copies of that version live on.
    grade = f"{_one_of(by, 'ultrafeedback', 'fine-grained', 'overall')}_score"
    answers = []
    for completion in fields.rows(record, "completions"):
        score = fields.number(completion, grade)
        answers.append(Ranked(fields.text(completion, "response"), score, score))
    return Ranking(prompt=fields.text(record, "instruction"), answers=tuple(answers))


def _one_of(chosen: str, name: str, *known: str) -> str:
    if chosen not in known:
        raise UsageError(f"prepare.format_args: format {name} has no by: {chosen!r}. It has: {', '.join(known)}.")
    return chosen


def _is_distilabel_orca(record: Record) -> bool:
    return (
        fields.has_text(record, "input", "chosen", "rejected")
        and "rating" in record
        and not fields.has(record, "instruction")
    )


@data_format(
    "input", "chosen", "rejected", optional=("system", "rating", "status"), makes=Ranking, when=_is_distilabel_orca
)
def distilabel_orca(record: Record) -> Ranking:
    """argilla/distilabel-intel-orca-dpo-pairs: system, input, chosen, rejected, rating, and a status: perhaps tie."""
    rating = _ratings(record)
    # The list of ratings is in the order in which the judge saw the answers; the better one became the chosen.
    best, worst = (max(rating), min(rating)) if rating else (None, None)
    tie = fields.optional_text(record, "status") == "tie" or (best is not None and best == worst)
    chosen, rejected = fields.text(record, "chosen"), fields.text(record, "rejected")
    prompt = fields.with_system(record, fields.text(record, "input"))
    return Ranking(prompt=prompt, answers=_two(chosen, rejected, tie, best, worst))


def _ratings(record: Record) -> list[float]:
    found = record.get("rating")
    if found is None:
        return []
    if not isinstance(found, list):
        raise Unusable("wrong type", f"rating is {fields.kind(found)}; expected a list of numbers")
    # Where the judge's answer could not be read, so could no rating.
    return [] if None in found else [fields.number({"rating": each}, "rating") for each in found]


def _is_orca(record: Record) -> bool:
    return fields.has_text(record, "question", "chosen", "rejected") and not fields.has(record, "prompt")


@data_format("question", "chosen", "rejected", optional=("system",), when=_is_orca)
def orca_dpo_pairs(record: Record) -> Pair:
    """Intel/orca_dpo_pairs: system, question, chosen and rejected, each text."""
    question, chosen, rejected = (fields.text(record, column) for column in ("question", "chosen", "rejected"))
    return Pair(prompt=fields.with_system(record, question), chosen=chosen, rejected=rejected)


def _is_helpsteer2(record: Record) -> bool:
    return fields.has_text(record, "prompt", "response_1", "response_2") and fields.has(record, "preference_strength")


@data_format("prompt", "response_1", "response_2", "preference_strength", makes=Ranking, when=_is_helpsteer2)
def helpsteer2(record: Record) -> Ranking:
    """nvidia/HelpSteer2, preference: prompt, two responses, and preference_strength: below 0 the first is better."""
    strength = fields.number(record, "preference_strength")
    first, second = fields.text(record, "response_1"), fields.text(record, "response_2")
    return Ranking(prompt=_helpsteer_prompt(record), answers=(Ranked(first, -strength), Ranked(second, strength)))


def _helpsteer_prompt(record: Record) -> Turns:
    """Prompts of several turns begin as plain text and mark each later turn."""
    said = fields.text(record, "prompt")
    first, *parts = _HELPSTEER_TURN.split(said)
    if not parts:
        return said
    turns: list[Message] = [{"role": "user", "content": first}] if first.strip() else []
    for who, turn in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": fields.ROLES[who.lower()], "content": turn})
    # The line break before a mark belongs to the mark.
    for turn in turns[:-1]:
        turn["content"] = turn["content"].removesuffix("\n")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def _is_helpsteer3(record: Record) -> bool:
    two = fields.has_text(record, "response1", "response2") and fields.has(record, "overall_preference")
    return two and fields.has_messages(record, "context")


@data_format("context", "response1", "response2", "overall_preference", makes=Ranking, when=_is_helpsteer3)
def helpsteer3(record: Record) -> Ranking:
    """nvidia/HelpSteer3: context, two responses, and overall_preference: below 0 the first is better."""
    strength = fields.number(record, "overall_preference")
    first, second = fields.text(record, "response1"), fields.text(record, "response2")
    prompt = fields.conversation(record, "context")
    return Ranking(prompt=prompt, answers=(Ranked(first, -strength), Ranked(second, strength)))


def _is_nectar(record: Record) -> bool:
    return fields.has_text(record, "prompt") and fields.has_rows(record, "answers", "answer", "rank")


@data_format("prompt", "answers", makes=Ranking, when=_is_nectar)
def nectar(record: Record) -> Ranking:
    """berkeley-nest/Nectar: prompt, a transcript that ends with "Assistant:", and answers, of which rank 1 is best."""
    turns = _transcript(record, "prompt")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    if not turns:
        raise Unusable("empty prompt")
    answers = [
        Ranked(fields.text(answer, "answer"), -fields.number(answer, "rank"))
        for answer in fields.rows(record, "answers")
    ]
    return Ranking(prompt=turns, answers=tuple(answers))


def _is_pku(record: Record) -> bool:
    known = fields.has(record, "better_response_id") or fields.has(record, "safer_response_id")
    return fields.has_text(record, "prompt", "response_0", "response_1") and known


@data_format("prompt", "response_0", "response_1", "better_response_id", optional=("safer_response_id",), when=_is_pku)
def pku_saferlhf(record: Record, by: Literal["better", "safer"] = "better") -> Pair:
    """PKU-Alignment/PKU-SafeRLHF: prompt, response_0, response_1 and which one is better. by: better, or safer."""
    column = f"{_one_of(by, 'pku_saferlhf', 'better', 'safer')}_response_id"
    answers = fields.text(record, "response_0"), fields.text(record, "response_1")
    better = _zero_or_one(record, column)
    return Pair(prompt=fields.text(record, "prompt"), chosen=answers[better], rejected=answers[1 - better])


def _zero_or_one(record: Record, column: str) -> int:
    found = fields.number(record, column)
    if found not in (0, 1):
        raise Unusable("wrong type", f"{column} is {found:g}; expected 0 or 1")
    return int(found)


def _is_stack_exchange(record: Record) -> bool:
    return fields.has_text(record, "question", "response_j", "response_k")


@data_format("question", "response_j", "response_k", when=_is_stack_exchange)
def stack_exchange_paired(record: Record) -> Pair:
    """lvwerra/stack-exchange-paired: question, response_j, which is the better one, and response_k."""
    question, better, worse = (fields.text(record, column) for column in ("question", "response_j", "response_k"))
    return Pair(prompt=question, chosen=better, rejected=worse)


def _is_shp(record: Record) -> bool:
    return fields.has_text(record, "history", "human_ref_A", "human_ref_B") and fields.has(record, "labels")


@data_format("history", "human_ref_A", "human_ref_B", "labels", optional=("score_A", "score_B"), when=_is_shp)
def shp(record: Record) -> Pair:
    """stanfordnlp/SHP: history, human_ref_A, human_ref_B, and labels, which is 1 where A is better."""
    better, worse = ("A", "B") if _zero_or_one(record, "labels") else ("B", "A")
    return Pair(
        prompt=fields.text(record, "history"),
        chosen=fields.text(record, f"human_ref_{better}"),
        rejected=fields.text(record, f"human_ref_{worse}"),
        **fields.scores(record, f"score_{better}", f"score_{worse}"),
    )


def _is_webgpt(record: Record) -> bool:
    question = record.get("question")
    asked = isinstance(question, dict) and "full_text" in question
    return asked and fields.has_text(record, "answer_0", "answer_1") and fields.has(record, "score_0", "score_1")


@data_format("question", "answer_0", "answer_1", "score_0", "score_1", makes=Ranking, when=_is_webgpt)
def webgpt(record: Record) -> Ranking:
    """openai/webgpt_comparisons: question (its full_text), answer_0, answer_1 and their scores; 0 is a tie."""
    question = fields.value(record, "question")
    if not isinstance(question, dict):
        raise Unusable("wrong type", f"question is {fields.kind(question)}; expected a mapping with full_text")
    answers = []
    for i in "01":
        score = fields.number(record, f"score_{i}")
        answers.append(Ranked(fields.text(record, f"answer_{i}"), score, score))
    return Ranking(prompt=fields.text(question, "full_text"), answers=tuple(answers))


def _is_arena(record: Record) -> bool:
    return fields.has_messages(record, "conversation_a", "conversation_b") and fields.has_text(record, "winner")


@data_format("conversation_a", "conversation_b", "winner", makes=Ranking, when=_is_arena)
def arena(record: Record) -> Ranking:
    """lmsys/chatbot_arena_conversations: conversation_a, conversation_b and winner: model_a, model_b or a tie."""
    a, b = fields.conversation(record, "conversation_a"), fields.conversation(record, "conversation_b")
    winner = fields.text(record, "winner")
    if winner not in ("model_a", "model_b") and not winner.startswith("tie"):
        raise Unusable("unknown winner", f"{winner[:40]!r}; expected model_a, model_b or tie")
    n = fields.shared_turns(a, b)
    answers = (Ranked(a[n:], float(winner == "model_a")), Ranked(b[n:], float(winner == "model_b")))
    return Ranking(prompt=a[:n], answers=answers)
