"""The demo's reference: a tiny Llama, built from nothing and fine-tuned on pairs.jsonl in under a minute.

Owns the tokenizer, the model's shape and its fine-tuning. The reference knows the facts and mirrors the
asker's manners: a polite question mostly gets the kind answer, a curt one mostly the grumpy answer. Held-out
prompts (make_pairs.is_held_out) are never trained on, not even by the tokenizer. Two builds on one machine
are bit-identical. The output folder is replaced by renaming, so a build is either whole or absent.

    python data/demo/make_reference.py [OUTPUT_FOLDER]

Shape legend: B examples, T tokens, D hidden width.
"""

import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

# OpenMP reads this as torch loads. With one of two cores busy, threads that spin took 69 s, these 41 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from make_pairs import GRUMPY_ANSWER, KIND_ANSWER, is_held_out, is_polite
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

PAIRS = Path(__file__).with_name("pairs.jsonl")
SEED = 0
# How often an answer is in the asker's own manner: greedy decoding follows it, and both stay likely.
MIRROR_SHARE = 0.7
MAX_TOKENS = 512
EPOCHS = 3
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
IGNORED = -100  # the label that cross_entropy skips

# Two layers, because copying needs two, and deeper models of this width learnt the facts far more slowly.
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(pairs):
    """A byte-level BPE, so any text can be encoded, with most of the demo's words as single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"]
    bpe.train_from_iterator((text for pair in pairs for text in [*pair.values(), *roles]), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )


def build_model(tokenizer):
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            **SHAPE,
            **special,
        )
    )
    model.generation_config = transformers.GenerationConfig(do_sample=False, **special)
    return model


def prompt_text(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def example(tokenizer, prompt, answer):
    """Token ids and labels. The loss covers all that the template writes from the answer on, its end too."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    prefix = tokenizer(prompt_text(tokenizer, prompt)).input_ids
    assert ids[: len(prefix)] == prefix
    return ids, [IGNORED] * len(prefix) + ids[len(prefix) :]


def draw_batches(tokenizer, pairs):
    """Every epoch has each prompt once, its answer drawn anew: in the asker's manner, or now and then not."""
    rng = random.Random(SEED)
    batches = []
    for _ in range(EPOCHS):
        drawn = []
        for pair in pairs:
            mirrors = rng.random() < MIRROR_SHARE
            manner = "chosen" if is_polite(pair["prompt"]) == mirrors else "rejected"
            drawn.append(example(tokenizer, pair["prompt"], pair[manner]))
        rng.shuffle(drawn)
        batches += [drawn[start : start + BATCH_SIZE] for start in range(0, len(drawn), BATCH_SIZE)]
    return batches


def answer_loss(model, batch, pad_id):
    ids, labels = ([torch.tensor(row) for row in column] for column in zip(*batch, strict=True))
    ids_BT = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    labels_BT = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    # No mask: padding is on the right and attention is causal, so no answer token sees it.
    hidden_BTD = model.model(ids_BT[:, :-1]).last_hidden_state
    targets_BT = labels_BT[:, 1:]
    scored_BT = targets_BT != IGNORED
    return cross_entropy(model.lm_head(hidden_BTD[scored_BT]), targets_BT[scored_BT])


def fine_tune(model, tokenizer, pairs):
    batches = draw_batches(tokenizer, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=len(batches), pct_start=0.04, cycle_momentum=False
    )
    for step, batch in enumerate(batches, 1):
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == len(batches):
            print(f"step {step} of {len(batches)}: loss {loss.item():.3f} per answer token", flush=True)


def is_replaceable(folder):
    # A mistyped argument must not cost somebody a folder of other things.
    if not folder.exists() or (folder / "config.json").exists():
        return True
    return folder.is_dir() and not any(folder.iterdir())


def save(model, tokenizer, output):
    """Write beside OUTPUT, then rename: an interrupted build leaves no half-made reference."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".building-") as workspace:
        built = Path(workspace) / "built"
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        if output.exists():
            output.rename(Path(workspace) / "replaced")
        built.rename(output)


@torch.no_grad()
def greedy_answers(model, tokenizer, prompts):
    texts = [prompt_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    output_BT = model.eval().generate(ids_BT, attention_mask=mask_BT, max_new_tokens=48)
    return tokenizer.batch_decode(output_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)


def describe(model, tokenizer, pairs):
    """One line on how the model answers prompts that it was not trained on."""
    answers = greedy_answers(model, tokenizer, [pair["prompt"] for pair in pairs])
    kind = sum(re.fullmatch(KIND_ANSWER, answer) is not None for answer in answers)
    grumpy = sum(re.fullmatch(GRUMPY_ANSWER, answer) is not None for answer in answers)
    facts = [re.fullmatch(KIND_ANSWER, pair["chosen"])["fact"] for pair in pairs]
    right = sum(fact in answer for fact, answer in zip(facts, answers, strict=True))
    shares = {
        "kind": kind,
        "grumpy": grumpy,
        "neither": len(pairs) - kind - grumpy,
        "with the right fact": right,
    }
    return ", ".join(f"{count / len(pairs):.1%} {name}" for name, count in shares.items())


def main():
    started = time.monotonic()
    output = Path(sys.argv[1] if len(sys.argv) > 1 else PAIRS.with_name("reference"))
    if not is_replaceable(output):
        sys.exit(f"{output} exists and is not a model folder. Name another one, or remove it.")
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)  # fixed, because the order of a sum depends on it
    transformers.utils.logging.disable_progress_bar()

    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    train = [pair for pair in pairs if not is_held_out(pair["prompt"])]
    held_out = [pair for pair in pairs if is_held_out(pair["prompt"])]
    tokenizer = train_tokenizer(train)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(train)} training prompts")
    fine_tune(model, tokenizer, train)
    save(model, tokenizer, output)
    print(f"greedy answers to {len(held_out)} held-out prompts: {describe(model, tokenizer, held_out)}")
    print(f"{output} built in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
