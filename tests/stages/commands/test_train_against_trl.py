"""A run from the cache is TRL's run with a live reference: the same losses at every step."""

import pyarrow.parquet as pq

from tests.helpers.project import write_config, write_pairs
from tests.helpers.trl_runs import BATCH, N_STEPS, RATE, in_order, losses_of_trl


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
