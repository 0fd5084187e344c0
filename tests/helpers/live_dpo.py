"""DPO as the paper has it: both models in memory, both run on every pair by Transformers' plain forward."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefcache.pipeline.stored.prepared import Prepared


def live_losses(
    model: Path,
    prepared: Path,
    batches: dict[int, list[str]],
    learning_rate: float,
    done: Callable[[int, float], Any] = lambda step, loss: None,
) -> dict[int, float]:
    """The loss of each step, one sequence at a time. Loss and schedule are those of `train` by default; beta is 0.1."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    n_steps = len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * n_steps), n_steps)
    examples = {row["example_id"]: row for row in Prepared(prepared).table().to_pylist()}

    def logp(live: torch.nn.Module, row: dict[str, Any], side: str) -> torch.Tensor:
        ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        logps = live(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return logps[row["n_prompt"] - 1 :].double().sum()

    losses = {}
    for step, example_ids in batches.items():
        total = 0.0
        # Pair by pair, so that the graph of one is in memory: the mean's gradient is the sum of theirs.
        for row in (examples[example_id] for example_id in example_ids):
            with torch.no_grad():
                reference_margin = logp(reference, row, "chosen") - logp(reference, row, "rejected")
            margin = logp(policy, row, "chosen") - logp(policy, row, "rejected") - reference_margin
            loss = -torch.nn.functional.logsigmoid(0.1 * margin) / len(example_ids)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = total
        done(step, total)
    return losses
