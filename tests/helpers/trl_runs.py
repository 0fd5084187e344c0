"""TRL's trainer on the same token ids in the same order, with both models in memory."""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefcache.pipeline.stored.prepared import Prepared

N_STEPS, BATCH, RATE = 200, 8, 1e-4


def in_order(run: Path) -> list[dict[str, list[int]]]:
    """The pairs as ours took them, step after step, as the run recorded it."""
    pairs = {row["example_id"]: row for row in Prepared(run.parent / "prepared").table().to_pylist()}
    parts = [pq.read_table(part).to_pylist() for part in sorted((run / "steps").glob("*.parquet"))]
    visits = [row for part in parts for row in part if row["split"] == "train"]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: pairs[row["example_id"]][name] for name in names} for row in sorted(visits, key=lambda row: row["step"])
    ]


def losses_of_trl(model: Path, pairs: list[dict[str, list[int]]], out: Path, **settings) -> list[float]:
    """In steps of BATCH, with a warm-up of a tenth of them."""
    trainer = OfIds(
        model=str(model),
        args=DPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            beta=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=len(pairs) // BATCH // 10,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    # Both models are in memory, and both run on every pair.
    assert isinstance(trainer.ref_model, torch.nn.Module) and not trainer.precompute_ref_logps
    trainer.seen = []
    trainer.train()
    return trainer.seen


class OfIds(DPOTrainer):
    """Reads token ids, in their order, and says every loss in full."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.item())
        return loss
