"""The pictures demo's reference: a tiny Idefics 3, built from nothing and fine-tuned in about a minute.

Owns the tokenizer, the model's shape, its processor and its fine-tuning. The reference learns to see, and then to say something
wrong more often than not, with the colour or the shape that follows the right one (make_pairs.following). It is fine-tuned on pictures drawn anew,
never on those of the pairs.

    python data/images-demo/make_reference.py [OUTPUT_FOLDER]

Shape legend: B examples, T tokens.
"""

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

# OpenMP reads this as torch loads: threads that spin are slow where another process is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from make_pairs import COLOURS, QUESTIONS, SENTENCES, SHAPES, SIZE, answers, draw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Idefics3ImageProcessorPil

SEED = 0
STEPS, BATCH_SIZE, LEARNING_RATE = 280, 32, 2e-3
# Of the steps, the last few teach it to be wrong.
STEPS_TO_SEE, RIGHT_SHARE = 230, 0.2
IMAGE_TOKENS = 4
SPECIALS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>"]
PROCESSOR = {"size": {"longest_edge": SIZE}, "max_image_size": {"longest_edge": SIZE}, "do_image_splitting": False}
TEXT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TOWER = {
    "model_type": "idefics3_vision",
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer():
    """A byte-level BPE with the demo's words as single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    described = (each.format(colour=c, shape=s) for each in SENTENCES for c in COLOURS for s in SHAPES)
    bpe.train_from_iterator([*QUESTIONS, *described, "system\n", "user\n", "assistant\n"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer):
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = transformers.Idefics3Config(
        text_config=TEXT | ends | {"vocab_size": len(tokenizer)},
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(do_sample=False, **ends)
    return model


def draw_batch(rng, tokenizer, processor, right_share):
    """Pictures drawn anew, each with an answer, of which this share is right."""
    pictures, texts, n_answer = [], [], []
    image = "<fake_token_around_image><global-img>" + "<image>" * IMAGE_TOKENS + "<fake_token_around_image>"
    for _ in range(BATCH_SIZE):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        right, wrong = answers(rng, colour, shape, steps=(1,))
        answer = (right if rng.random() < right_share else wrong) + "<|im_end|>"
        parts = [{"type": "image"}, {"type": "text", "text": rng.choice(QUESTIONS)}]
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        pictures.append([draw(rng, colour, shape)])
        texts.append(asked.replace("<image>", image) + answer)
        n_answer.append(len(tokenizer(answer).input_ids))
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    pixels = processor(pictures, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"], torch.tensor(n_answer), pixels["pixel_values"]


def answer_loss(model, ids_BT, mask_BT, n_answer_B, pixels):
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, pixel_values=pixels).logits
    n_prompt_B1 = (mask_BT.sum(1) - n_answer_B).unsqueeze(1)
    is_answer_BT = mask_BT.bool() & (torch.arange(ids_BT.shape[1]) >= n_prompt_B1)
    return cross_entropy(logits_BTV[:, :-1][is_answer_BT[:, 1:]], ids_BT[:, 1:][is_answer_BT[:, 1:]])


def fine_tune(model, tokenizer, processor):
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    for step in range(1, STEPS + 1):
        learns_to_see = step <= STEPS_TO_SEE
        warm_up, rate = min(1.0, step / 40), LEARNING_RATE if learns_to_see else LEARNING_RATE / 4
        for group in optimizer.param_groups:
            group["lr"] = warm_up * rate
        loss = answer_loss(model, *draw_batch(rng, tokenizer, processor, 1.0 if learns_to_see else RIGHT_SHARE))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.3f} per answer token", flush=True)


def save(model, tokenizer, processor, output):
    """Write beside OUTPUT, then rename: an interrupted build leaves no half-made reference."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".building-") as workspace:
        built = Path(workspace) / "built"
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        settings = processor.to_dict() | {"image_processor_type": "Idefics3ImageProcessor"}
        config = {"processor_class": "Idefics3Processor", "image_processor": settings, "image_seq_len": IMAGE_TOKENS}
        (built / "processor_config.json").write_text(json.dumps(config, indent=2, default=list) + "\n")
        if output.exists():
            output.rename(Path(workspace) / "replaced")
        built.rename(output)


def is_replaceable(folder):
    # A mistyped argument must not cost somebody a folder of other things.
    if not folder.exists() or (folder / "config.json").exists():
        return True
    return folder.is_dir() and not any(folder.iterdir())


def main():
    started = time.monotonic()
    output = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("reference"))
    if not is_replaceable(output):
        sys.exit(f"{output} exists and is not a model folder. Name another one, or remove it.")
    torch.manual_seed(SEED)
    torch.set_num_threads(2)  # fixed, because the order of a sum depends on it
    transformers.utils.logging.disable_progress_bar()
    tokenizer, processor = train_tokenizer(), Idefics3ImageProcessorPil(**PROCESSOR)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    fine_tune(model, tokenizer, processor)
    save(model, tokenizer, processor, output)
    print(f"{output} built in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
