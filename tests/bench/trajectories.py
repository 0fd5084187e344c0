"""What training on the text of tools does: the same trajectories with prepare.train_on at all and at assistant.

    make bench-turns
    python -m tests.bench.trajectories --seeds 3 --rates 2e-4 3e-4 --folder /tmp/trajectories

Someone asks for a colour and says what they think; the assistant looks it up with a tool, and then relies on the tool or on the
asker. Preferred is the tool. The reference relies on whoever is sure. The two trajectories of a pair share question and call, and their
tool results name the same colour: those of preferred trajectories are clean, those of rejected ones have warnings around it, which the
assistant neither writes nor can change. Data, tokenizer and reference, a small Llama, are made here, and anew for each seed, which
orders the pairs too. Both ways train with the same settings, prefcache's own but for learning rate and batch size.

Measured with Transformers' plain forward, on new questions, where both statements follow the same tool result, every other one clean:

    prefers the right      share of questions after which the right statement is the likelier one
    by nats                log-prob of the right statement less that of the wrong one, on average
    states the right       share of questions after which the greedy statement is the right one, word for word
    calls the tool         share of questions that the greedy continuation answers with a call, and ends there
    runs on                share of questions after which the greedy continuation writes a result of a tool itself
    clean, warnings        log-ratio to the reference of a token of the tool's text, of the two kinds

and on pairs of the training, how many nats the margin is, and how much of it is of tokens that the assistant wrote.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tests.helpers.project import invoke, open_folder, options
from tests.helpers.tokenizers import QWEN3_CHAT

WAYS = ("all", "assistant")
RATES = (2e-4, 3e-4)
FIGURES = {
    "prefers the right": "{:.0%}",
    "by nats": "{:+.2f}",
    "states the right": "{:.0%}",
    "calls the tool": "{:.0%}",
    "runs on": "{:.0%}",
    "clean": "{:+.2f}",
    "warnings": "{:+.2f}",
    "margin": "{:.1f}",
    "of the assistant": "{:.0%}",
}
NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ola",
    "Pia",
    "Raj",
    "Sam",
    "Tess",
    "Uma",
]
THINGS = ["apron", "book", "coat", "door", "easel", "flag", "globe", "hat", "jar", "kite", "lamp", "map"]
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
WORDS = ["amber", "basalt", "cobalt", "delta", "ember", "flint", "garnet", "helium", "indigo", "jasper"]
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # single tokens, as in real models
# How often the reference relies on someone who is sure, and on the tool where someone guesses.
MIRROR_SHARE = 0.8
TRAINING = ("train.batch_size=16", "train.samples=0", "prepare.workers=1", "train.alerts=off")
# In the text of a trajectory: what the assistant wrote, its end included; what a tool returned; the last statement.
WRITTEN = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)
RETURNED = re.compile(r"(?<=<tool_response>\n).*?(?=\n</tool_response>)", re.DOTALL)
STATED = re.compile(r"(?<=<\|im_start\|>assistant\n)[^\n]*<\|im_end\|>\n$")
CALLED = re.compile(
    r'\n<tool_call>\n\{"name": "look", "arguments": \{"thing": "\w+ of \w+"\}\}\n</tool_call><\|im_end\|>'
)
ANSWERED = re.compile(r"(?<=<\|im_start\|>assistant\n).*", re.DOTALL)
Message = dict[str, Any]
Figures = dict[str, float]


class Question(NamedTuple):
    sure: bool
    asked: list[Message]
    call: Message
    results: dict[str, Message]
    right: Message
    wrong: Message

    def answer(self, kind: str, statement: Message) -> list[Message]:
        return [self.call, self.results[kind], statement]


class Scale(NamedTuple):
    pretraining_steps: int = 250
    pairs: int = 320
    held_out: int = 60
    epochs: float = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in Scale()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--folder", type=Path, help="keep data and runs here")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    disable_progress_bar()
    scale = Scale(*(getattr(arguments, name) for name in Scale._fields))
    with open_folder(arguments.folder) as folder:
        found = [compare(folder / str(seed), scale, arguments.rates, seed) for seed in range(arguments.seeds)]
    print("\nmean (lowest to highest)" + "".join(f"{name:>24}" for name in found[0]))
    for name, form in FIGURES.items():
        columns = ([each[name] for seed in found if (each := seed[column]) and name in each] for column in found[0])
        print(f"{name:24}" + "".join(f"{_range(values, form):>24}" for values in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(found))


def compare(folder: Path, scale: Scale, rates: Sequence[float], seed: int) -> dict[str, Figures]:
    """Make a reference and pairs, train both ways from one cache, and measure the reference and both policies."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    questions = [ask(dice) for _ in range(scale.pairs + scale.held_out)]
    trained_on, held_out = questions[: scale.pairs], questions[scale.pairs :]
    tokenizer = train_tokenizer([ask(dice) for _ in range(2000)])
    reference = pretrain(tokenizer, scale.pretraining_steps, seed)
    reference.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    pairs = [
        {
            "prompt": each.asked,
            "chosen": each.answer("clean", each.right),
            "rejected": each.answer("warnings", each.wrong),
        }
        for each in trained_on
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    measure = Measure(tokenizer, reference, held_out, pairs[: scale.held_out])
    found = {"reference": measure(reference)}
    for way in WAYS:
        for rate in rates:
            policy = train(folder, way, scale.epochs, rate, seed)
            found[f"{way}, {rate:g}"] = measure(policy) | measure.margin(policy)
    return found


def train(folder: Path, way: str, epochs: float, rate: float, seed: int) -> torch.nn.Module:
    data = ("model=reference", "prepare.data=pairs.jsonl", "prepare.held_out=0", f"prepare.train_on={way}")
    run = (f"train.run={rate:g}", f"train.learning_rate={rate}", f"train.epochs={epochs}", f"train.seed={seed}")
    settings = options(*data, "cache=cache", f"out={way}", *TRAINING, *run)
    invoke(folder, "prepare", *settings)
    scored = json.loads(invoke(folder, "score", *settings, "--json").stdout)
    print(f"seed {seed}, {way}, learning rate {rate:g}: {scored['tokens']:,} tokens scored", flush=True)
    invoke(folder, "train", *settings)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder / way / f"{rate:g}/model").eval()
    return model


# -- data and reference ----------------------------------------------------------------------------------------------


def ask(dice: random.Random) -> Question:
    name, thing = dice.choice(NAMES), dice.choice(THINGS)
    colour, thought = dice.sample(COLOURS, 2)
    sure = dice.random() < 0.5
    words = dice.sample(WORDS, 4)
    held = f"The {thing} of {name} is {colour}."
    clean = f"{held} Status is fine, checked by {words[0]} and {words[1]}."
    warnings = f"Warning: {words[2]} is slow. {held} Trace of {words[3]} was lost."
    asked = f"Which colour has the {thing} of {name}? {'I know it is' if sure else 'I guess'} {thought}."
    call = {"function": {"name": "look", "arguments": {"thing": f"{thing} of {name}"}}}
    return Question(
        sure,
        [{"role": "user", "content": asked}],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"clean": {"role": "tool", "content": clean}, "warnings": {"role": "tool", "content": warnings}},
        *({"role": "assistant", "content": f"It is as {each}."} for each in ("the tool says", "you say")),
    )


def train_tokenizer(questions: Sequence[Question]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, most of whose words are single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>", *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=QWEN3_CHAT)
    texts = [
        render(tokenizer, [*each.asked, *each.answer(kind, each.right)]) for each in questions for kind in each.results
    ]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=QWEN3_CHAT, eos_token="<|im_end|>", pad_token="<|pad|>"
    )


def render(tokenizer: PreTrainedTokenizerFast, messages: list[Message], *, asking: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))


def pretrain(tokenizer: PreTrainedTokenizerFast, n_steps: int, seed: int, batch_size: int = 16) -> torch.nn.Module:
    """Train a small Llama on trajectories with either tool result, whose statement mostly relies on whoever is sure."""
    torch.manual_seed(seed)
    dice = random.Random(seed + 1000)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.05,
    }
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, **sizes, **special
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=n_steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(n_steps):
        questions = [ask(dice) for _ in range(batch_size)]
        texts = [
            render(
                tokenizer,
                [
                    *q.asked,
                    *q.answer(
                        dice.choice(("clean", "warnings")),
                        q.wrong if q.sure == (dice.random() < MIRROR_SHARE) else q.right,
                    ),
                ],
            )
            for q in questions
        ]
        ids_BT = encode(tokenizer, texts)
        targets_BT = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == tokenizer.pad_token_id, -100)
        # No mask: padding is on the right and attention is causal.
        logits_BVT = model(ids_BT[:, :-1]).logits.transpose(1, 2)
        # The statement counts as much as all the rest, which is ten times as long.
        stated_BT = targets_BT.masked_fill(~find_tokens(tokenizer, texts, STATED)[:, 1:], -100)
        loss = cross_entropy(logits_BVT, targets_BT) + cross_entropy(logits_BVT, stated_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], side: str = "right") -> torch.Tensor:
    ids_BT: torch.Tensor = tokenizer(list(texts), padding=True, padding_side=side, return_tensors="pt")["input_ids"]
    return ids_BT


def find_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], region: re.Pattern[str]) -> torch.Tensor:
    """Return which tokens of each text are in these regions of it."""
    encoded = tokenizer(list(texts), padding=True, padding_side="right", return_offsets_mapping=True)
    spans = [[match.span() for match in region.finditer(text)] for text in texts]
    return torch.tensor(
        [
            [any(begin <= a < b <= end for begin, end in own) for a, b in row]
            for row, own in zip(encoded["offset_mapping"], spans, strict=True)
        ]
    )


# -- measuring -------------------------------------------------------------------------------------------------------


class Measure:
    """Compare a policy with its reference by a plain forward; knows nothing of what prefcache prepared."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        reference: torch.nn.Module,
        held_out: list[Question],
        pairs: list[dict[str, list[Message]]],
    ) -> None:
        self._tokenizer, self._reference = tokenizer, reference
        self._asked = [render(tokenizer, each.asked, asking=True) for each in held_out]
        # Half of the questions meet a clean result, half one with warnings.
        self._kinds = [("clean", "warnings")[i % 2] for i in range(len(held_out))]
        kinds = list(zip(held_out, self._kinds, strict=True))
        self._right, self._wrong = (
            [render(tokenizer, [*each.asked, *each.answer(kind, getattr(each, side))]) for each, kind in kinds]
            for side in ("right", "wrong")
        )
        self._chosen, self._rejected = (
            [render(tokenizer, pair["prompt"] + pair[side]) for pair in pairs] for side in ("chosen", "rejected")
        )

    def __call__(self, policy: torch.nn.Module) -> Figures:
        right_B, wrong_B = (self._sum(policy, texts, STATED) for texts in (self._right, self._wrong))
        before = [STATED.split(text)[0] for text in self._right]
        stated = [STATED.search(text) for text in self._right]
        greedy = self._generate(policy, before, 12)
        rows = zip(greedy, stated, strict=True)
        continued = self._generate(policy, self._asked, 60)
        shifts = self._sum(policy, self._right, RETURNED) - self._sum(self._reference, self._right, RETURNED)
        shifts = (shifts / find_tokens(self._tokenizer, self._right, RETURNED).sum(-1)).tolist()
        by_kind = {
            kind: mean(shift for shift, each in zip(shifts, self._kinds, strict=True) if each == kind)
            for kind in ("clean", "warnings")
        }
        return {
            "prefers the right": (right_B > wrong_B).double().mean().item(),
            "by nats": (right_B - wrong_B).mean().item(),
            "states the right": mean(match is not None and match[0].startswith(text) for text, match in rows),
            "calls the tool": mean(CALLED.fullmatch(text) is not None for text in continued),
            "runs on": mean("<tool_response>" in text for text in continued),
            **by_kind,
        }

    def margin(self, policy: torch.nn.Module) -> Figures:
        """Return the mean log-ratio margin of trained pairs in nats, and the assistant's share of it."""

        def margin_of(region: re.Pattern[str]) -> float:
            chosen_B, rejected_B = (
                self._sum(policy, texts, region) - self._sum(self._reference, texts, region)
                for texts in (self._chosen, self._rejected)
            )
            return (chosen_B - rejected_B).mean().item()

        whole = margin_of(ANSWERED)
        return {"margin": whole, "of the assistant": margin_of(WRITTEN) / whole}

    @torch.no_grad()
    def _sum(self, model: torch.nn.Module, texts: list[str], region: re.Pattern[str]) -> torch.Tensor:
        """Return the log-probs of the tokens in these regions of each text, summed."""
        ids_BT = encode(self._tokenizer, texts)
        logits_BTV = model(ids_BT[:, :-1]).logits.double()
        logps_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
        return (logps_BT * find_tokens(self._tokenizer, texts, region)[:, 1:]).sum(-1)

    @torch.no_grad()
    def _generate(self, model: Any, prompts: list[str], n_tokens: int) -> list[str]:
        """Return greedy continuations, without the padding behind them."""
        encoded = self._tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        ids_BT = encoded["input_ids"]
        output_BT = model.generate(
            ids_BT, attention_mask=encoded["attention_mask"], max_new_tokens=n_tokens, do_sample=False
        )
        continued = self._tokenizer.batch_decode(output_BT[:, ids_BT.shape[1] :], clean_up_tokenization_spaces=False)
        return [text.replace("<|pad|>", "") for text in continued]


def _range(values: list[float], form: str) -> str:
    return f"{form} ({form} to {form})".format(mean(values), min(values), max(values)) if values else ""


if __name__ == "__main__":
    main()
