"""Batched completion log-probs are those of the plain forward, and so are their gradients. Every architecture: test_forward.py."""

import numpy as np
import pytest
import torch

from prefcache.pipeline.model.logprobs import gather_logps, log_sum_squares, padded_logps, plain_logps, sum_logps
from prefcache.pipeline.schema import TokenSequence
from tests.helpers.models import build, sequence

torch.set_num_threads(1)

# Ragged on both sides: a completion of one token, a prompt of one token, a long prompt, a long answer.
RAGGED = [sequence(3, 5), sequence(9, 1), sequence(1, 4), sequence(40, 2), sequence(2, 17), sequence(1, 1)]
ONE_TOKEN = [sequence(7, 1), sequence(2, 1)]


def whole(seq: TokenSequence) -> torch.Tensor:
    return torch.tensor([[*seq.prompt_ids.tolist(), *seq.completion_ids.tolist()]])


@pytest.fixture(scope="module")
def llama():
    return build("llama")


# -- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [RAGGED, ONE_TOKEN, [sequence(60, 60)]], ids=["ragged", "one token", "long"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_log_probs_and_squares_are_those_of_a_float64_softmax(name, batch):
    model, exact = build(name), build(name).double()
    with torch.no_grad():
        found = padded_logps(model, batch, squares=True)
        assert torch.equal(found.values_N, padded_logps(model, batch).values_N)
        for seq, logps_N, squares_N in zip(batch, found.logps, found.squares, strict=True):
            # The token at position t is predicted at position t - 1: log(exp(logit of it) / sum of exp(logits)).
            logits_NV = exact(input_ids=whole(seq)).logits[0, len(seq.prompt_ids) - 1 : -1]
            assert logits_NV.dtype == torch.float64
            for i, token in enumerate(seq.completion_ids.tolist()):
                expected = logits_NV[i, token] - torch.log(torch.exp(logits_NV[i]).sum())
                assert abs(logps_N[i].item() - expected.item()) < 2e-5
            assert logps_N.shape == squares_N.shape == (len(seq.completion_ids),) and logps_N.dtype == torch.float32
            assert (squares_N - (logits_NV.softmax(-1) ** 2).sum(-1).log()).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_sequence_has_the_loss_that_transformers_reports(name):
    model = build(name)
    for seq in RAGGED:
        labels = whole(seq)
        labels[:, : len(seq.prompt_ids)] = -100
        with torch.no_grad():
            loss = model(input_ids=whole(seq), labels=labels).loss
            (logps_N,) = padded_logps(model, [seq]).logps
        # Transformers' loss is the mean of -log p over the labelled tokens.
        assert -logps_N.mean().item() == pytest.approx(loss.item(), abs=1e-5)


def test_a_padded_batch_has_the_loss_that_transformers_reports(llama):
    longest = max(seq.n_tokens for seq in RAGGED)
    ids_BT, mask_BT = torch.zeros(len(RAGGED), longest, dtype=torch.int64), torch.zeros(len(RAGGED), longest)
    labels_BT = torch.full((len(RAGGED), longest), -100)
    for row, seq in enumerate(RAGGED):
        ids_BT[row, : seq.n_tokens] = whole(seq)[0]
        mask_BT[row, : seq.n_tokens] = 1
        labels_BT[row, len(seq.prompt_ids) : seq.n_tokens] = torch.from_numpy(seq.completion_ids)
    with torch.no_grad():
        loss = llama(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
        logps = padded_logps(llama, RAGGED).logps
    # 5 + 1 + 4 + 2 + 17 + 1 = 30 answer tokens
    assert -sum_logps(logps).sum().item() / 30 == pytest.approx(loss.item(), abs=1e-5)


# -- batched equals plain --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "mixtral"])
def test_a_batch_has_the_values_and_gradients_of_its_sequences_alone(name):
    # Different weights, so that a gradient of one sequence cannot stand in for another's.
    weights = torch.arange(1.0, len(RAGGED) + 1)
    results = []
    for compute in (
        lambda model: padded_logps(model, RAGGED).logps,
        lambda model: padded_logps(model, RAGGED[::-1]).logps[::-1],
        lambda model: [plain_logps(model, seq) for seq in RAGGED],
    ):
        model = build(name)
        logps = compute(model)
        (sum_logps(logps) * weights).sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((torch.cat(logps).detach(), gradients))
    *batched, (alone, expected) = results
    # The models are sharp enough for a shift by one token to show.
    assert alone.std() > 0.1 and expected
    for values, gradients in batched:
        torch.testing.assert_close(values, alone, rtol=0, atol=1e-5)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            scale = max(expected[key].abs().max().item(), 1.0)
            torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3"])
def test_the_sliding_window_is_in_force(name):
    with torch.no_grad():
        (narrow_N,) = padded_logps(build(name), [sequence(40, 2)]).logps
        (wide_N,) = padded_logps(build(name, sliding_window=100), [sequence(40, 2)]).logps
    assert (narrow_N - wide_N).abs().max() > 1e-3


def test_tokens_after_the_answer_cannot_matter(llama):
    # The prompt and answer of one are the beginning of the other: causality alone makes them agree.
    long = sequence(5, 20)
    short = TokenSequence(long.prompt_ids, long.completion_ids[:4])
    with torch.no_grad():
        long_N, short_N = padded_logps(llama, [long, short]).logps
    torch.testing.assert_close(long_N[:4], short_N, rtol=0, atol=1e-6)


def test_ids_may_be_views_of_a_read_only_map(llama):
    ids = np.arange(2, 10, dtype=np.int32)
    ids.flags.writeable = False
    with torch.no_grad():
        (logps_N,) = padded_logps(llama, [TokenSequence(ids[:3], ids[3:])]).logps
    assert logps_N.shape == (5,) and torch.isfinite(logps_N).all()


def test_gradients_flow_through_the_log_probs_and_not_through_the_squares(llama):
    found = padded_logps(llama, ONE_TOKEN, squares=True)
    assert found.values_N.requires_grad and not found.squares_N.requires_grad


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_gathered_log_probs_by_hand():
    # Odds 1 : 2 : 5 of 8, so log p = log(1/8), log(5/8).
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]))
    assert gather_logps(logits, torch.tensor([0, 2])).tolist() == pytest.approx([-2.0794415, -0.4700036], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(20, 1000) * 5).to(dtype)
    target = torch.randint(0, 1000, (20,))
    logps = gather_logps(logits, target)
    expected = torch.log_softmax(logits.double(), -1).gather(-1, target[:, None])[:, 0]
    assert logps.dtype == torch.float32
    assert (logps - expected).abs().max() < 1e-5  # bfloat16 itself resolves no better than 0.03 at 8 nats


def test_log_probs_of_hopeless_tokens_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert gather_logps(logits, torch.tensor([1])).item() == -20000
    assert gather_logps(logits, torch.tensor([0])).item() == 0


def test_sums_are_taken_in_float64():
    # 2**24 + 1 is no float32: adding 1.0 to 16777216.0 in float32 changes nothing.
    sums = sum_logps([torch.tensor([-16777216.0, -1.0]), torch.tensor([-0.5])])
    assert sums.dtype == torch.float64 and sums.tolist() == [-16777217.0, -0.5]


def test_the_log_of_the_sum_of_squares_by_hand():
    # Odds 1 : 2 : 5 of 8: 1/64 + 4/64 + 25/64 = 30/64. Any constant added to the logits leaves that. Even odds of 4: 4/16.
    logits = torch.log(torch.tensor([[1.0, 2, 5], [3, 6, 15]]))
    assert log_sum_squares(logits).tolist() == pytest.approx([np.log(30 / 64)] * 2, abs=1e-6)
    assert log_sum_squares(torch.zeros(1, 4)).item() == pytest.approx(np.log(1 / 4), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_squares_lies_between_one_over_the_vocabulary_and_one_at_any_size_of_logit(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4], [3e4, 3e4, 0.0]]).to(dtype)
    squares = log_sum_squares(logits)
    assert squares.dtype == torch.float32
    assert squares.tolist() == pytest.approx([0, np.log(1 / 3), np.log(1 / 3), np.log(1 / 2)], abs=4e-3)
