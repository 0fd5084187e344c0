"""What is suggested to a run can be set on top of what it has."""

import pytest

from prefcache.pipeline.config import Train
from prefcache.pipeline.training.run_estimate import RunEstimate, _with_settings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": "bfloat16", "gradient_checkpointing": True, "release_gradients": True, "max_grad_norm": None},
        {"tokens_per_micro_batch": 4096, "micro_batch_size": 4, "optimizer": "adamw_8bit"},
        {"lora": {"r": 4}, "offload": ["activations"], "gradient_checkpointing": True},
        {"loss": {"sigmoid": 1, "sft": 0.1}, "loss_args": {"sigmoid.label_smoothing": 0.1}, "shard": "fsdp"},
    ],
)
def test_suggestions_fit_the_settings_of_the_run(settings):
    run = RunEstimate.__new__(RunEstimate)  # without a model
    run.train, run.processes = Train.model_validate(settings), 1
    rungs = [rung.settings for rung in run._ladder()]
    changed = [_with_settings(run.train, rung) for rung in rungs]
    assert rungs and all(train != run.train for train in changed)
    assert all(train.loss == run.train.loss and train.loss_args == run.train.loss_args for train in changed)
