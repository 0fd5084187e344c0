"""A run on pairs with images is TRL's vision DPO with a live reference: the same losses at every step."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers import vision_models
from tests.helpers.project import write_config
from tests.helpers.trl_vision import as_row, make_trainer

N_STEPS, BATCH, RATE, N_PAIRS = 50, 4, 3e-4, 40


def picture(i: int):
    """Of one of three sizes, so that prompts have different numbers of image tokens."""
    return vision_models.picture(24 + 16 * (i % 3), 24 + 8 * (i % 2), seed=i)


def texts(i: int) -> tuple[str, str, str]:
    return f"why the cat {i}?", f"the answer is {i}, and the dog runs", f"red fish; {i} don't"


def write_pairs(folder: Path) -> None:
    lines = []
    for i in range(N_PAIRS):
        picture(i).save(folder / f"{i}.png")
        row = as_row([], *texts(i))
        row["prompt"][0]["content"].insert(0, {"type": "image"})
        lines.append(json.dumps(row | {"images": [f"{i}.png"]}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    ("vision", "name"),
    [
        ("frozen", "qwen2.5-vl"),
        ("trained", "gemma3"),
        pytest.param("frozen", "gemma3", marks=pytest.mark.slow),
        pytest.param("trained", "qwen2.5-vl", marks=pytest.mark.slow),
    ],
)
def test_50_steps_have_the_losses_of_trl_with_a_live_reference(prefcache, tmp_path, name, vision):
    """Identical data, order and hyperparameters, in float32: 40 pairs in 5 epochs of 10 steps. TRL's tower is frozen or not, too."""
    model = vision_models.save(name)
    write_pairs(tmp_path)
    config = write_config(tmp_path, model, batch_size=BATCH, epochs=5, learning_rate=RATE, samples=0, vision=vision)
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config, "--set", "prepare.held_out=0")
    run = tmp_path / "runs/tiny/trained"
    metrics = [row for part in sorted((run / "metrics").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    ours = [row["loss"] for row in sorted(metrics, key=lambda row: row["step"]) if row["step"]]
    assert len(ours) == N_STEPS
    # Something was learnt, over the whole of the run: equal losses of a policy that stands still would say little.
    assert ours[0] > 0.69 and ours[40] < 0.6 and abs(ours[40] - ours[20]) > 1e-3

    lines = {row["example_id"]: row["line"] - 1 for row in Prepared(run.parent / "prepared").table().to_pylist()}
    visits = [row for part in sorted((run / "steps").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    taken = sorted((row for row in visits if row["split"] == "train"), key=lambda row: row["step"])
    rows = [as_row([picture(i)], *texts(i)) for i in (lines[row["example_id"]] for row in taken)]
    trainer = make_trainer(
        model, rows, tmp_path / "trl", batch=BATCH, trains_tower=vision == "trained", learning_rate=RATE
    )
    # Both models are in memory, and both see every picture twice.
    assert trainer.ref_model is not None and not trainer.precompute_ref_logps
    trainer.train()
    worst = max(abs(one - other) for one, other in zip(ours, trainer.seen, strict=True))
    assert worst < 1e-4, worst
