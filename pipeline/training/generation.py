"""Greedy answers of the policy to tokenized prompts."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import StoppingCriteriaList

from prefcache.pipeline.model.packing import token_budget_batches
from prefcache.pipeline.progress import Counter, counting
from prefcache.pipeline.training.distributed import Calls

_MIN_BUDGET = 16_384  # tokens; a token's step through the model costs the same for many prompts as for one


def _note_tokens(counter: Counter, n_prompt: int, n_most: int) -> StoppingCriteriaList:
    """Return a criterion that notes how many tokens the answers have, and stops none."""

    def note(input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        counter.add(0, f"token {input_ids.shape[1] - n_prompt:,} of at most {n_most:,}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([note])


def generate_answers(
    calls: Calls,
    tokenizer: Any,
    accelerator: Accelerator,
    prompts: list[np.ndarray],
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
    lengths = [len(ids) + max_new_tokens for ids in prompts]
    answers: dict[int, str] = {}
    with counting("greedy answers", len(prompts), "prompts") as counter:
        for batch in token_budget_batches(lengths, max(budget, _MIN_BUDGET)):
            longest = max(len(prompts[i]) for i in batch)
            n_new = min(max_new_tokens, max_length - longest)
            if n_new <= 0:
                answers |= dict.fromkeys(batch, "")
                continue
            ids = [[pad] * (longest - len(prompts[i])) + prompts[i].tolist() for i in batch]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
            with torch.no_grad(), accelerator.autocast():
                out = calls.generate(
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
