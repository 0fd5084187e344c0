"""Tiny tokenizers of every family that models come with, trained on the spot, and chat templates in their styles."""

import datetime
import functools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefcache.pipeline.config import Prepare
from prefcache.pipeline.preparing import tokenizer_facts
from prefcache.pipeline.preparing.encoder import ExampleTokens
from prefcache.pipeline.preparing.resolved_config import ResolvedConfig, SourceFormat
from prefcache.pipeline.preparing.sources import Chunk
from prefcache.pipeline.preparing.sources.jsonl import read_lines
from prefcache.pipeline.preparing.tokenizer_facts import TokenizerFacts

DATE = datetime.date(2025, 1, 1)
CORPUS = [
    "the cat sings and the dog runs, why?\n\nuser\nassistant\n  two  spaces\n\n\nlines",
    "assistant\n\nthe answer is 42. 1234 red fish; don't! [INST] red [/INST] green",
    "système ünïcode 日本語 the the and and fish fish <b>markup</b> \"quotes\" 'single'",
] * 4
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_end|><|x|>"]
# The splits of two byte-level families, as their tokenizer.json files have them.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACE = "\u2581"
_FOLDER = tempfile.TemporaryDirectory(prefix="prefcache-tokenizers-")  # gone when the tests end


def _byte_level(split: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if split is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    """BPE on characters, with bytes for those it does not know, as SentencePiece models are converted."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Trained on words, or a piece could be a whole line.
    words = [word for line in CORPUS for word in line.replace(" ", f" {SPACE}").split(" ")]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.train_from_iterator([*words, "\n", "\n\n", SPACE, f"{SPACE}{SPACE}"], trainer)
    parts = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    tokenizer.model = models.BPE(parts["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def _with_decoder(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _llama2() -> Tokenizer:
    return _with_decoder(
        _byte_fallback(normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]))
    )


def _metaspace(scheme: str) -> Tokenizer:
    return _with_decoder(
        _byte_fallback(pre_tokenizer=pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False))
    )


def _gemma() -> Tokenizer:
    tokenizer = _byte_fallback(
        normalizers.Replace(" ", SPACE), pre_tokenizers.Split(" ", behavior="merged_with_previous")
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _unigram() -> Tokenizer:
    # Its own trainer gives another vocabulary each time.
    pieces = json.loads(_byte_fallback().to_str())["model"]["vocab"]
    scores = [(piece, -float(n > 0) * (2 + n / 100)) for n, piece in enumerate(sorted(pieces, key=pieces.get))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="first")
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def _wordpiece() -> Tokenizer:
    """With added tokens that take the spaces around them, that are matched as words, or on normalised text."""
    words = sorted({word for line in CORPUS for word in line.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    pieces = ["[UNK]", *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(
        [
            AddedToken("<|im_start|>", lstrip=True, normalized=False),
            AddedToken("<|im_end|>", rstrip=True, normalized=False),
            AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("word", single_word=True, normalized=False),
            AddedToken("<NORM>", normalized=True),
            *(AddedToken(token, normalized=False) for token in SPECIALS if not token.startswith("<|im")),
        ]
    )
    return tokenizer


FAMILIES = {
    "byte-level": _byte_level,
    "tiktoken": functools.partial(_byte_level, LLAMA3),
    "byte-level split": functools.partial(_byte_level, GPT2),
    "llama-2": _llama2,
    "metaspace first": functools.partial(_metaspace, "first"),
    "metaspace always": functools.partial(_metaspace, "always"),
    "gemma": _gemma,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}
# They write every text back as it was.
LOSSLESS = ("byte-level", "tiktoken", "byte-level split", "gemma")


def build(family: str, *, bos: bool = False, eos: str | None = "</s>", template: str | None = None) -> Any:
    """A tokenizer as Transformers loads it. bos: the tokenizer begins texts with <s>."""
    tokenizer = FAMILIES[family]()
    if bos:
        first = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    named = {"bos_token": "<s>"} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **({"eos_token": eos} if eos else {}))
    fast.chat_template = template
    return fast


@functools.cache
def saved(family: str, *, bos: bool = False, eos: str | None = "</s>") -> tuple[Path, Any]:
    """Return the folder of a tokenizer, and the tokenizer as Transformers loads it from there."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    build(family, bos=bos, eos=eos).save_pretrained(folder)
    return folder, AutoTokenizer.from_pretrained(folder)


@functools.cache
def facts(family: str, *, bos: bool = False, eos: str | None = "</s>") -> TokenizerFacts:
    return tokenizer_facts.load_facts(saved(family, bos=bos, eos=eos)[0])


# -- from records to a part ------------------------------------------------------------------------------------------


def with_lists(tokens: ExampleTokens) -> ExampleTokens:
    """Return the same tokens with lists of ids, as they are written by hand and as Transformers gives them."""
    answers = tuple(list(ids) for ids in tokens.answers)
    return tokens._replace(prompt=list(tokens.prompt), answers=answers)  # type: ignore[arg-type]


def resolved_config(
    tokenizer: TokenizerFacts, template: str | None, kind: str = "pairs", **prepare: Any
) -> ResolvedConfig:
    """Of pairs or labels in our own format."""
    settings = Prepare(**{"data": "x", "held_out": 0, "template": "chat" if template else "none"} | prepare)
    return ResolvedConfig(settings, kind, tokenizer, template, None, (SourceFormat(kind, {}, {}),))


def chunk_of(records: Iterable[dict[str, Any] | bytes]) -> Chunk:
    """What is read of JSON Lines with these records."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    payload = b"".join(line + b"\n" for line in lines)
    return Chunk("records.jsonl", 1, len(payload), payload, read_lines)


# -- chat templates, each in the style of a family -------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_CHAT = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n\\n'+ message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>model\n'}}{% endif %}"
)
QWEN3_CHAT = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (tool_call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
R1_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>assistant\n{{ content }}<|im_end|>{% else %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ZEPHYR_CHAT = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GENERATION_CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MACRO_CHAT = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% endif %}{% endmacro %}"
    "{% for message in messages %}{% set content = said(message.content) | trim %}"
    "<|im_start|>{{ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOP_CHAT = (
    "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "{% if loop.index > 40 %}{% break %}{% endif %}{{ message.role | capitalize }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Those of models that see images. The contents of SmolVLM and LLaVA-OneVision are parts, and nothing else.
SMOLVLM_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA_ONEVISION_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA3_CHAT,
    "llama-2": LLAMA2_CHAT,
    "mistral": MISTRAL_CHAT,
    "gemma": GEMMA_CHAT,
    "qwen3": QWEN3_CHAT,
    "r1": R1_CHAT,
    "zephyr": ZEPHYR_CHAT,
    "generation": GENERATION_CHAT,
    "macro": MACRO_CHAT,
    "loop": LOOP_CHAT,
}
