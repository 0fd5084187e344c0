"""TRL's shape, which is also ours: prompt, chosen and rejected, or prompt, completion and label.

OpenRLHF reads the same columns, with the same meaning, under the names in prompt_key, chosen_key and rejected_key; here
`columns: {prompt: input}` renames them.
"""

import re
import unicodedata

from prefcache.pipeline import schema
from prefcache.pipeline.preparing.example import Label, Pair, Unusable
from prefcache.pipeline.preparing.formats import fields
from prefcache.pipeline.preparing.formats.registry import Record, data_format

_PAIR, _LABEL = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
_OF_PAIRS = (*fields.CONTEXT, *fields.SIDES, *schema.data_columns("pairs"))
_OF_LABELS = (*fields.CONTEXT, *schema.data_columns("labels"))
# Where an answer begins in a transcript written as one text. A blank after it belongs to the answer.
_ANSWER_BEGINS = re.compile(
    r"\n\nAssistant:"
    r"|<\|im_start\|>assistant\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<\|assistant\|>\n?"
    r"|<start_of_turn>model\n"
    r"|\[/INST\]"
    r"|### Response:\n?"
    r"|\bASSISTANT:"
)
# Thai, Lao, Burmese, Khmer, kana, Chinese characters, and punctuation as wide as these.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)
# Where other formats keep the prompt. Next to one of them, chosen and rejected are answers alone.
_OTHER_PROMPTS = ("instruction", "question", "input", "query", "context", "history", "conversations", "messages")


@data_format(*_PAIR, optional=_OF_PAIRS, when=fields.having(present=_PAIR))
def pairs(record: Record) -> Pair:
    """TRL's and OpenRLHF's: prompt, chosen and rejected, each text or a list of {role, content} messages."""
    prompt, chosen, rejected = (fields.turns(record, column) for column in _PAIR)
    return fields.make_pair(record, prompt, chosen, rejected, fields.data_columns(record, "pairs"))


def _is_implicit(record: Record) -> bool:
    if fields.has_text(record, "chosen", "rejected"):
        return not any(fields.has(record, column) for column in ("prompt", *_OTHER_PROMPTS))
    return fields.has_conversations(record, "chosen", "rejected") and not fields.has(record, "prompt")


@data_format("chosen", "rejected", optional=_OF_PAIRS, when=_is_implicit)
def implicit_prompt(record: Record) -> Pair:
    """TRL's implicit prompt: chosen and rejected as whole conversations; what they begin with alike is the prompt.

    Text is cut after the last answer's marker that both share (such as "Assistant:" after a blank line), else after the
    last whole word. The blank before an answer belongs to the answer, as in TRL. Scripts without blanks between words
    are cut where the texts part. With prepare.template: none, the cut moves back by up to 16 characters to where tokens
    of both texts end, so that the prompt's tokens are those of the whole.
    """
    chosen, rejected = fields.turns(record, "chosen"), fields.turns(record, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        n = _count_shared_characters(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        n = fields.count_shared_turns(chosen, rejected)
    else:
        raise Unusable("wrong type", "chosen and rejected are of two kinds; expected both text or both messages")
    pair = fields.make_pair(record, chosen[:n], chosen[n:], rejected[n:], fields.data_columns(record, "pairs"))
    pair.implicit = isinstance(chosen, str)
    return pair


def _count_shared_characters(chosen: str, rejected: str) -> int:
    """Find where the answers begin: after the last marker that both share, else after the last whole word."""
    n = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    begins = [match.end() for match in _ANSWER_BEGINS.finditer(chosen[:n])]
    if begins:
        return begins[-1]
    while n > 0 and not (chosen[n - 1].isspace() or _is_border(chosen[:n], chosen[n:], rejected[n:])):
        n -= 1
    if chosen[:n].endswith(" "):
        n -= 1
    if not chosen[:n].strip():
        raise Unusable("empty prompt", "chosen and rejected begin with different words")
    return n


def _is_border(shared: str, *rests: str) -> bool:
    """Return whether a word ends here without a blank: after a character of a script that has none between words."""
    # A mark that is combined with the character before it stays with it.
    is_combined = any(unicodedata.category(rest[0]).startswith("M") for rest in rests if rest)
    return _UNSPACED.match(shared[-1]) is not None and not is_combined


@data_format(*_LABEL, optional=_OF_LABELS, makes=Label, when=fields.having(present=_LABEL))
def labels(record: Record) -> Label:
    """TRL's for KTO: prompt, completion (text or messages) and label, true for a good answer."""
    prompt, completion = fields.turns(record, "prompt"), fields.turns(record, "completion")
    label = fields.boolean(record, "label")
    return fields.make_label(record, prompt, completion, label, fields.data_columns(record, "labels"))
