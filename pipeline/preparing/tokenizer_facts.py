"""What preparing reads off a model's tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from prefcache.pipeline.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer as it is sent to a worker: loading it there takes neither Transformers nor PyTorch."""

    folder: str
    backend: str | None  # as JSON of the tokenizers library; None if Transformers runs it in Python
    special: dict[str, str]  # bos_token, eos_token and the like, as templates print them
    added_tokens: tuple[str, ...]  # the texts that are one token each, special or not
    bos: int | None  # None unless the tokenizer begins a text with it
    eos: int | None
    chat_template: str | None
    tool_template: str | None


def load_facts(folder: Path) -> TokenizerFacts:
    """Load whatever tokenizer the folder has."""
    tokenizer = load_tokenizer(folder)
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {"default": template}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bos = tokenizer.bos_token_id
    return TokenizerFacts(
        folder=str(folder),
        backend=backend.to_str() if backend is not None else None,
        special={name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        added_tokens=tuple(token.content for token in tokenizer.added_tokens_decoder.values()),
        bos=bos if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else None,
        eos=tokenizer.eos_token_id,
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
    )
