"""Greedy answers of the policy to tokenized prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import StoppingCriteriaList

from prefcache.pipeline.model.packing import token_budget_batches
from prefcache.pipeline.progress import Counter, counting
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training.distributed import Calls

_MIN_BUDGET = 16_384  # tokens; a token's step through the model costs the same for many prompts as for one


def _note_tokens(counter: Counter, n_prompt: int, n_most: int) -> StoppingCriteriaList:
    """Return a criterion that notes how many tokens the answers have, and stops none."""

    def note(input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        counter.add(0, f"token {input_ids.shape[1] - n_prompt:,} of at most {n_most:,}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([note])


def _batches(prompts: Sequence[TokenSequence], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Prompts to answer together: each with images alone, the others as many as fit."""
    text = [i for i, prompt in enumerate(prompts) if not prompt.images]
    batches = token_budget_batches([lengths[i] for i in text], budget) if text else []
    return [[text[k] for k in batch] for batch in batches] + [[i] for i, each in enumerate(prompts) if each.images]


def generate_answers(
    calls: Calls,
    tokenizer: Any,
    accelerator: Accelerator,
    prompts: Sequence[TokenSequence],
    *,
    max_new_tokens: int,
    max_length: int,
    budget: int,
    sharded: bool,
) -> list[str]:
    """Generate with the model's own attention. With a sharded model every process has to call this."""
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    model_end = calls.model.generation_config.eos_token_id
    ends = {end, *(model_end if isinstance(model_end, list) else [model_end])} - {None}
    lengths = [len(prompt.prompt_ids) + max_new_tokens for prompt in prompts]
    answers: dict[int, str] = {}
    with counting("greedy answers", len(prompts), "prompts") as counter:
        for batch in _batches(prompts, lengths, max(budget, _MIN_BUDGET)):
            longest = max(len(prompts[i].prompt_ids) for i in batch)
            n_new = min(max_new_tokens, max_length - longest)
            if n_new <= 0:
                answers |= dict.fromkeys(batch, "")
                continue
            lists = [prompts[i].prompt_ids.tolist() for i in batch]
            ids = [[pad] * (longest - len(each)) + each for each in lists]
            mask = [[0] * (longest - len(each)) + [1] * len(each) for each in lists]
            with torch.no_grad(), accelerator.autocast():
                out = calls.generate(
                    prompt=prompts[batch[0]] if prompts[batch[0]].images else None,
                    input_ids=torch.tensor(ids, device=accelerator.device),
                    attention_mask=torch.tensor(mask, device=accelerator.device),
                    do_sample=False,
                    max_new_tokens=n_new,
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=pad,
                    synced_gpus=sharded,
                    stopping_criteria=_note_tokens(counter, longest, n_new),
                )
            texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            answers |= {i: text.strip() for i, text in zip(batch, texts, strict=True)}
            counter.add(len(batch))
    return [answers[i] for i in range(len(prompts))]
