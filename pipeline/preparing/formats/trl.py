"""Our own shape, which is TRL's: prompt, chosen and rejected, or prompt, completion and label.

OpenRLHF reads the same columns, with the same meaning, once its prompt_key, chosen_key and rejected_key are named so:
`columns: {prompt: input}` says it here.
"""

import re

from pipeline.preparing.example import Label, Pair, Unusable
from pipeline.preparing.formats import fields
from pipeline.preparing.formats.registry import Record, data_format

BESIDE = ("system", "tools", "chat_template_kwargs")
SCORES = ("chosen_score", "rejected_score")
# Where an answer begins in a transcript written as one text.
_ANSWER_BEGINS = re.compile(
    r"\n\nAssistant:[ ]?"
    r"|<\|im_start\|>assistant\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<\|assistant\|>\n?"
    r"|<start_of_turn>model\n"
    r"|\[/INST\][ ]?"
    r"|### Response:\n?"
    r"|\bASSISTANT:[ ]?"
)
# Where other formats keep the prompt. Beside one of them, chosen and rejected are mere answers.
_ASKED_ELSEWHERE = ("instruction", "question", "input", "query", "context", "history", "conversations", "messages")


def _is_pair(record: Record) -> bool:
    return fields.has(record, "prompt", "chosen", "rejected")


def _is_implicit(record: Record) -> bool:
    if fields.has_text(record, "chosen", "rejected"):
        return not any(fields.has(record, column) for column in ("prompt", *_ASKED_ELSEWHERE))
    return fields.are_whole(record, "chosen", "rejected") and not fields.has(record, "prompt")


def _is_label(record: Record) -> bool:
    return fields.has(record, "prompt", "completion", "label")


@data_format("prompt", "chosen", "rejected", optional=(*BESIDE, *SCORES), when=_is_pair)
def pairs(record: Record) -> Pair:
    """Ours, TRL's and OpenRLHF's: prompt, chosen and rejected, each text or a list of {role, content} messages."""
    prompt, chosen, rejected = (fields.turns(record, column) for column in ("prompt", "chosen", "rejected"))
    prompt = fields.with_system(record, prompt)
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **fields.beside(record), **fields.scores(record))


@data_format("chosen", "rejected", optional=(*BESIDE, *SCORES), when=_is_implicit)
def implicit_prompt(record: Record) -> Pair:
    """TRL's implicit prompt: chosen and rejected as whole conversations; what they begin with alike is the prompt."""
    chosen, rejected = fields.turns(record, "chosen"), fields.turns(record, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        n = _common_text(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        n = fields.shared_turns(chosen, rejected)
    else:
        raise Unusable("wrong type", "chosen and rejected are of two kinds; expected both text or both messages")
    prompt = fields.with_system(record, chosen[:n])
    return Pair(
        prompt=prompt, chosen=chosen[n:], rejected=rejected[n:], **fields.beside(record), **fields.scores(record)
    )


@data_format("prompt", "completion", "label", optional=BESIDE, makes=Label, when=_is_label)
def labels(record: Record) -> Label:
    """Ours and TRL's for KTO: prompt, completion (text or messages) and label, true for a good answer."""
    prompt, completion = fields.turns(record, "prompt"), fields.turns(record, "completion")
    label = fields.boolean(record, "label")
    return Label(prompt=fields.with_system(record, prompt), completion=completion, label=label, **fields.beside(record))


def _common_text(chosen: str, rejected: str) -> int:
    """Where the answers begin: after the last turn that both share, else after the last whole word."""
    n = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    begins = [match.end() for match in _ANSWER_BEGINS.finditer(chosen[:n])]
    if begins:
        return begins[-1]
    cut = n
    while cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    if not chosen[:cut].strip():
        raise Unusable("empty prompt", "chosen and rejected begin with different words")
    return cut
