"""TRL's trainer on pairs with images, with both models in memory: the model, its processor and a live reference."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import DPOConfig, DPOTrainer

from prefcache.pipeline import image_processor

Row = dict[str, Any]  # prompt, chosen and rejected as messages, and images


_ARGUMENTS: Row = {
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "beta": 0.1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": None,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class InOrder(DPOTrainer):
    """Takes the rows in their order and keeps every loss in full."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.item())
        return loss


def make_trainer(folder: Path, rows: list[Row], out: Path, *, batch: int, trains_tower: bool, **settings) -> "InOrder":
    """A trainer of these rows in steps of `batch`, with a warm-up of a tenth of them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if not trains_tower:
        freeze_tower(model)
    # AutoProcessor would also load what processes video, which needs torchvision.
    processor = image_processor.load(folder).transformers
    processor.chat_template = processor.tokenizer.chat_template
    trainer = InOrder(
        model=model,
        ref_model=AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(
            **_ARGUMENTS | {"warmup_steps": len(rows) // batch // 10} | settings,
            output_dir=str(out),
            per_device_train_batch_size=batch,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.seen = []
    return trainer


def freeze_tower(model: Any) -> None:
    """Train the language model and its head alone."""
    model.requires_grad_(False)
    for part in (model.get_decoder(), model.get_output_embeddings()):
        part.requires_grad_(True)


def as_row(images: list[Image.Image], question: str, chosen: str, rejected: str) -> Row:
    parts = [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": question}]
    return {
        "images": images,
        "prompt": [{"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
    }
