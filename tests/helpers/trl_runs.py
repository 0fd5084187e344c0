"""A run from the cache is TRL's run with a live reference: the same losses at every step."""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from conftest import write_config, write_pairs
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from pipeline.stored.prepared import Prepared

N_STEPS, BATCH, RATE = 200, 8, 1e-4


def test_200_steps_have_the_losses_of_trl_with_a_live_reference(prefcache, model, tmp_path):
    """Identical data, order and hyperparameters, in float32: 64 pairs in 25 epochs of 8 steps."""
    write_pairs(tmp_path / "pairs.jsonl", 64)
    config = write_config(
        tmp_path, model, batch_size=BATCH, epochs=25, learning_rate=RATE, checkpoint_every=N_STEPS, samples=0
    )
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, "--set", "prepare.held_out=0")
    run = tmp_path / "runs/tiny/trained"
    rows = [row for part in sorted((run / "metrics").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    ours = [row["loss"] for row in sorted(rows, key=lambda row: row["step"]) if row["step"]]
    assert len(ours) == N_STEPS
    # Something was learnt, over the whole of the run: equal losses of a policy that stands still would say little.
    assert ours[0] > 0.69 and ours[150] < 0.6 and abs(ours[150] - ours[100]) > 1e-3

    theirs = losses_of_trl(model, in_order(run), tmp_path / "trl", learning_rate=RATE)
    assert len(theirs) == N_STEPS
    worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    assert worst < 1e-4, worst


def in_order(run: Path) -> list[dict[str, list[int]]]:
    """The pairs as ours took them, step after step, as the run recorded it."""
    pairs = {row["example_id"]: row for row in Prepared(run.parent / "prepared").table().to_pylist()}
    parts = [pq.read_table(part).to_pylist() for part in sorted((run / "steps").glob("*.parquet"))]
    visits = [row for part in parts for row in part if row["split"] == "train"]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: pairs[row["example_id"]][name] for name in names} for row in sorted(visits, key=lambda row: row["step"])
    ]


class OfIds(DPOTrainer):
    """Reads token ids, in their order, and says every loss in full."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.item())
        return loss


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
