"""Memory that runs out makes forwards smaller, and changes no result. The limits are real ones, of a process's address space."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import ResourceError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.training import micro_batch_size
from prefcache.pipeline.training.dataset import Examples, SplitData
from prefcache.pipeline.training.distributed import make_accelerator
from prefcache.pipeline.training.micro_batch_size import Budget, find_budget, never_retried
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from tests.helpers.examples import pair, table
from tests.helpers.project import ROOT

CPU = torch.device("cpu")
N_PAIRS, STEPS = 64, 2
# A pair takes 100 tokens of prompt and twice 150 of answers, whose last ones are no inputs.
SIZE = 100 + 2 * (150 - 1)


def examples() -> Examples:
    dice = np.random.default_rng(0)
    rows = [pair(i, *(dice.integers(3, 280, n).tolist() for n in (100, 150, 150))) for i in range(N_PAIRS)]
    columns = {name: np.full(N_PAIRS, -900.0) for name in ("ref_chosen_logp", "ref_rejected_logp")}
    return Examples(SplitData(table(rows, "pairs"), columns, ("chosen", "rejected")))


def leave(n_bytes: int) -> None:
    """This process may take so much more address space than it has by now, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def train(model: str, room: int | None, **settings: Any) -> dict[str, Any]:
    """Some steps with so much room: their losses and gradient norms, what was said, and the budget at the end."""
    said: list[str] = []
    chosen = Train(learning_rate=1e-3, batch_size=N_PAIRS, **settings)
    data, objective = examples(), Objective(chosen)
    policy = Policy(Reference(Path(model)), None, chosen, make_accelerator(chosen), data.longest(2), said.append)
    if room is not None:
        leave(room)
    found = []
    for _ in range(STEPS):
        visit, logged, _ = policy.update(data, np.arange(N_PAIRS), objective, {}, 1e-3)
        found.append([float(visit["loss"].mean()), logged["grad_norm"]])
    return {"steps": found, "said": said, "budget": policy._budget.tokens}


def trial(model: str, room: int | None, most: int, **settings: Any) -> int:
    """The budget that is found with so much room, for steps of so many pairs."""
    chosen, like = Train(batch_size=most, **settings), examples().longest(2)
    policy = Policy(Reference(Path(model)), None, chosen, make_accelerator(chosen), like, print)
    if room is not None:
        leave(room)
    tokens = find_budget(policy.forward, like, policy.parameters, chosen, policy.accelerator)
    assert all(parameter.grad is None for parameter in policy.parameters.values())
    return tokens


def limited(function: str, *arguments: Any, **settings: Any) -> Any:
    """A function of this file in a process of its own, which its limit dies with."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, function, json.dumps([arguments, settings])],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode in (0, ResourceError.exit_code), done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


# -- a step ----------------------------------------------------------------------------------------------------------


def test_a_step_that_ran_out_of_memory_is_taken_in_smaller_forwards_with_the_same_result(model):
    roomy = train(str(model), None, tokens_per_micro_batch=100_000)
    assert roomy["said"] == []
    tight = limited("train", str(model), 60 << 20, tokens_per_micro_batch=100_000)
    # All pairs were in one forward, 25,472 tokens; then in halves of what did not fit, which sticks.
    assert tight["budget"] in [N_PAIRS * SIZE >> n for n in range(1, 6)]
    assert tight["said"][0] == (
        "train: out of memory at 25,472 tokens in one forward and backward; again with at most 12,736"
    )
    assert len(tight["said"]) == [N_PAIRS * SIZE >> n for n in range(1, 6)].index(tight["budget"]) + 1
    # What differs is the order in which gradients are added up.
    assert np.array(tight["steps"]) == pytest.approx(np.array(roomy["steps"]), rel=1e-6)


def too_much() -> None:
    """4 TiB, more than any machine's address space has left for it."""
    torch.empty(1 << 46)


def budget(said: list[str], n_processes: int = 1, **settings: Any) -> Budget:
    return Budget(Train(**settings), CPU, n_processes, said.append)


def test_only_a_lack_of_memory_is_tried_again():
    with pytest.raises(ZeroDivisionError):
        budget([]).retry_smaller(lambda: 1 / 0, list, list)


def test_what_was_begun_is_dropped_before_each_further_try():
    said, tries, dropped = [], [], []
    tight = budget(said, tokens_per_micro_batch=1_000)

    def compute() -> str:
        tries.append(tight.tokens)
        return "done" if tight.tokens < 300 else too_much()

    forwards = [(2, 600), (1, 500)]
    assert tight.retry_smaller(compute, lambda: forwards, lambda: dropped.append(len(tries))) == "done"
    # Half of the largest forward that can be divided, not of the budget, which it does not fill: 600, not 1,000.
    assert tries == [1_000, 300, 150] and dropped == [1, 2]
    assert said[0].endswith("at 600 tokens in one forward and backward; again with at most 300")


def test_an_example_that_does_not_fit_alone_ends_the_run_with_what_to_try():
    with pytest.raises(ResourceError, match=r"single example of 500 tokens. Try train.gradient_checkpointing=true"):
        budget([]).retry_smaller(too_much, lambda: [(1, 500), (1, 20)], list)


@pytest.mark.parametrize("settings", [{"n_processes": 2}, {"scope": "micro", "micro_batch_size": 4}])
def test_where_a_step_cannot_be_begun_anew_the_run_ends_with_what_to_lower(settings):
    with pytest.raises(
        ResourceError, match=r"for 60 tokens in one .* Lower train.micro_batch_size or train.tokens_per"
    ):
        budget([], **settings).retry_smaller(too_much, lambda: [(2, 60)], list)


def test_an_update_is_never_taken_twice():
    tries = []
    with (
        pytest.raises(ResourceError, match=r"for the optimizer's update. Try"),
        never_retried("the optimizer's update"),
    ):
        tries.append(1)
        too_much()
    assert tries == [1]


# -- the trial -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_trial_finds_less_where_there_is_less_room(model):
    found = limited("trial", str(model), 60 << 20, N_PAIRS)
    assert found in [N_PAIRS * SIZE >> n for n in range(1, 6)]
    # As many examples as a step has are enough.
    assert limited("trial", str(model), 1 << 30, 5) == 5 * SIZE


def test_an_optimizer_that_does_not_fit_is_reported(model, monkeypatch):
    monkeypatch.setattr(micro_batch_size, "state_bytes", lambda *_: 1 << 40)
    with pytest.raises(ResourceError, match=r"for gradients and the state of the optimizer. Try"):
        trial(str(model), None, 1)


@pytest.mark.parametrize(("weights", "value_bytes"), [("float32", 8), ("bfloat16", 4)])
def test_the_trial_leaves_room_for_moments_of_the_weights_own_type(model, monkeypatch, weights, value_bytes):
    reserved, empty = [], torch.empty

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        reserved.extend(size if options.get("dtype") == torch.uint8 else ())
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", watched)
    assert trial(str(model), None, 1, weights=weights) == SIZE
    n = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert reserved == [value_bytes * n]


def test_auto_is_no_other_run_and_on_a_cpu_the_default(prefcache, config, tmp_path):
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    again = prefcache("train", config, "--set", "train.tokens_per_micro_batch=auto")
    assert "nothing to do" in again.stderr
    assert budget([], tokens_per_micro_batch="auto").tokens == budget([]).tokens == 1_024
    assert not budget([], tokens_per_micro_batch="auto").wants_trial


def main() -> None:
    arguments, settings = json.loads(sys.argv[2])
    try:
        print(json.dumps(globals()[sys.argv[1]](*arguments, **settings)))
    except ResourceError as error:
        sys.exit(print(error, file=sys.stderr) or error.exit_code)


if __name__ == "__main__":
    main()
