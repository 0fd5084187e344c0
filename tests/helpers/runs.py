"""Small training runs: launch them and read what they wrote."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq

from tests.helpers.project import pair


def table(run: Path, name: str) -> list[dict]:
    parts = sorted((run / name).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def metrics(run: Path) -> list[dict]:
    return table(run, "metrics")


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def batches_of(run: Path) -> dict[int, list[str]]:
    """The pairs of every step, as the run recorded them."""
    batches: dict[int, list[str]] = {}
    for row in table(run, "steps"):
        if row["split"] == "train":
            batches.setdefault(row["step"], []).append(row["example_id"])
    return batches


def write_turned_pairs(path: Path) -> None:
    """Two of five are turned around, so that the best evaluation lies between the first and the last."""
    dice, turned = random.Random(2), {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
    rows = [pair(i) for i in range(60)]
    rows = [{turned[key]: row[key] for key in row} if dice.random() < 0.4 else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sft(model: Path, folder: Path, **settings) -> Path:
    """An adapter far from doing nothing."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings)
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    away_from_nothing(each for each in made.parameters() if each.requires_grad)
    made.save_pretrained(folder)
    return folder


def away_from_nothing(parameters) -> None:
    """A new adapter does nothing, and half of its gradients are 0."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
