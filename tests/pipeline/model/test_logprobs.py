"""Batched completion log-probs are those of the plain forward, on every kind of model, and so are their gradients."""

import numpy as np
import pytest
import torch
from models_for_tests import ARCHITECTURES, build, sequence

from pipeline.model.logprobs import (
    completion_logps,
    gather_logps,
    log_sum_squares,
    plain_logps,
    sums,
    use_float32_head,
)
from pipeline.schema import Sequence

torch.set_num_threads(1)

# Ragged on both sides: a completion of one token, a prompt of one token, a long prompt, a long answer.
RAGGED = [sequence(3, 5), sequence(9, 1), sequence(1, 4), sequence(40, 2), sequence(2, 17), sequence(1, 1)]
ONE_TOKEN = [sequence(7, 1), sequence(2, 1)]


def whole(seq: Sequence) -> torch.Tensor:
    return torch.tensor([[*seq.prompt_ids.tolist(), *seq.completion_ids.tolist()]])


@pytest.fixture(scope="module")
def llama():
    return build("llama")


# -- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [RAGGED, ONE_TOKEN, [sequence(60, 60)]], ids=["ragged", "one token", "long"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_log_probs_are_those_of_a_float64_softmax(name, batch):
    model = build(name)
    exact = build(name).double()
    with torch.no_grad():
        found = completion_logps(model, batch).logps
        for seq, logps_N in zip(batch, found, strict=True):
            logits_TV = exact(input_ids=whole(seq)).logits[0]
            assert logits_TV.dtype == torch.float64
            # The token at position t is predicted at position t - 1: log(exp(logit of it) / sum of exp(logits)).
            for i, token in enumerate(seq.completion_ids.tolist()):
                logits_V = logits_TV[len(seq.prompt_ids) + i - 1]
                expected = logits_V[token] - torch.log(torch.exp(logits_V).sum())
                assert abs(logps_N[i].item() - expected.item()) < 2e-5
            assert logps_N.shape == (len(seq.completion_ids),) and logps_N.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_sequence_has_the_loss_that_transformers_reports(name):
    model = build(name)
    for seq in RAGGED:
        labels = whole(seq)
        labels[:, : len(seq.prompt_ids)] = -100
        with torch.no_grad():
            loss = model(input_ids=whole(seq), labels=labels).loss
            (logps_N,) = completion_logps(model, [seq]).logps
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
        logps = completion_logps(llama, RAGGED).logps
    n_tokens = sum(len(seq.completion_ids) for seq in RAGGED)  # 5 + 1 + 4 + 2 + 17 + 1 = 30
    assert n_tokens == 30
    assert -sums(logps).sum().item() / 30 == pytest.approx(loss.item(), abs=1e-5)


# -- batched equals plain --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_gives_what_each_sequence_gives_alone(name):
    model = build(name)
    with torch.no_grad():
        together = completion_logps(model, RAGGED).logps
        alone = [plain_logps(model, seq) for seq in RAGGED]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    # The models are sharp enough for a shift by one token to show.
    assert torch.cat(alone).std() > 0.1


@pytest.mark.parametrize("name", ["mistral", "gemma2", "phi3"])
def test_the_sliding_window_is_in_force(name):
    wide = {"sliding_window": 100}
    with torch.no_grad():
        (narrow_N,), (wide_N,) = (completion_logps(build(name, **more), [sequence(40, 2)]).logps for more in ({}, wide))
    assert (narrow_N - wide_N).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "mixtral"])
def test_a_batch_has_the_gradient_of_its_sequences_alone(name):
    gradients = []
    for compute in (
        lambda model: completion_logps(model, RAGGED).logps,
        lambda model: [plain_logps(model, seq) for seq in RAGGED],
    ):
        model = build(name)
        # Different weights, so that a gradient of one sequence cannot stand in for another's.
        (sums(compute(model)) * torch.arange(1.0, len(RAGGED) + 1)).sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for key, gradient in gradients[0].items():
        scale = gradients[1][key].abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][key], rtol=0, atol=1e-5 * max(scale, 1.0), msg=key)


def test_the_order_of_a_batch_is_kept(llama):
    with torch.no_grad():
        forwards, backwards = completion_logps(llama, RAGGED).logps, completion_logps(llama, RAGGED[::-1]).logps
    for one, other in zip(forwards, backwards[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_tokens_after_the_answer_cannot_matter(llama):
    # The prompt and answer of one are the beginning of the other: causality alone makes them agree.
    long = sequence(5, 20)
    short = Sequence(long.prompt_ids, long.completion_ids[:4])
    with torch.no_grad():
        long_N, short_N = completion_logps(llama, [long, short]).logps
    torch.testing.assert_close(long_N[:4], short_N, rtol=0, atol=1e-6)


def test_ids_may_be_views_of_a_read_only_map(llama):
    ids = np.arange(2, 10, dtype=np.int32)
    ids.flags.writeable = False
    with torch.no_grad():
        (found,) = completion_logps(llama, [Sequence(ids[:3], ids[3:])]).logps
    assert found.shape == (5,) and torch.isfinite(found).all()


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_gathered_log_probs_by_hand():
    # Odds 1 : 2 : 5 of 8, so log p = log(1/8), log(5/8).
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]))
    found = gather_logps(logits, torch.tensor([0, 2]))
    assert found.tolist() == pytest.approx([-2.0794415, -0.4700036], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(20, 1000) * 5).to(dtype)
    target = torch.randint(0, 1000, (20,))
    found = gather_logps(logits, target)
    expected = torch.log_softmax(logits.double(), -1).gather(-1, target[:, None])[:, 0]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5  # bfloat16 itself resolves no better than 0.03 at 8 nats


def test_log_probs_of_hopeless_tokens_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert gather_logps(logits, torch.tensor([1])).item() == -20000
    assert gather_logps(logits, torch.tensor([0])).item() == 0


def test_sums_are_taken_in_float64():
    # 2**24 + 1 is no float32: adding 1.0 to 16777216.0 in float32 changes nothing.
    found = sums([torch.tensor([-16777216.0, -1.0]), torch.tensor([-0.5])])
    assert found.dtype == torch.float64 and found.tolist() == [-16777217.0, -0.5]


# -- squares of probabilities ----------------------------------------------------------------------------------------


def test_the_log_of_the_sum_of_squares_by_hand():
    # Odds 1 : 2 : 5 of 8: 1/64 + 4/64 + 25/64 = 30/64. Any constant added to the logits leaves that. Even odds of 4: 4/16.
    logits = torch.log(torch.tensor([[1.0, 2, 5], [3, 6, 15]]))
    assert log_sum_squares(logits).tolist() == pytest.approx([np.log(30 / 64)] * 2, abs=1e-6)
    assert log_sum_squares(torch.zeros(1, 4)).item() == pytest.approx(np.log(1 / 4), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_squares_lies_between_one_over_the_vocabulary_and_one_at_any_size_of_logit(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4], [3e4, 3e4, 0.0]]).to(dtype)
    found = log_sum_squares(logits)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([0, np.log(1 / 3), np.log(1 / 3), np.log(1 / 2)], abs=4e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_squares_are_those_of_a_float64_softmax_and_come_with_the_same_log_probs(name):
    model, exact = build(name), build(name).double()
    with torch.no_grad():
        logps, squares = completion_logps(model, RAGGED, squares=True)
        alone = completion_logps(model, RAGGED).logps
        assert all(torch.equal(one, other) for one, other in zip(logps, alone, strict=True))
        for seq, squares_N in zip(RAGGED, squares, strict=True):
            p_TV = exact(input_ids=whole(seq)).logits[0].softmax(-1)
            expected_N = (p_TV[len(seq.prompt_ids) - 1 : -1] ** 2).sum(-1).log()
            assert squares_N.shape == (len(seq.completion_ids),)
            assert (squares_N - expected_N).abs().max() < 2e-5


def test_gradients_flow_through_the_log_probs_and_not_through_the_squares(llama):
    logps, squares = completion_logps(llama, ONE_TOKEN, squares=True)
    assert all(each.requires_grad for each in logps) and not any(each.requires_grad for each in squares)


# -- the head in float32 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt2"])
def test_the_float32_head_changes_nothing_in_a_float32_model(name):
    model = build(name)
    with torch.no_grad():
        before = completion_logps(model, RAGGED).logps
        use_float32_head(model)
        after = completion_logps(model, RAGGED).logps
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_float32_head_multiplies_a_bfloat16_model_in_float32(name):
    model = build(name).bfloat16()
    ids = whole(sequence(4, 9))
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        assert hidden.dtype == torch.bfloat16
        expected = hidden.double() @ model.get_output_embeddings().weight.double().T
        if cap := getattr(model.config, "final_logit_softcapping", None):
            expected = cap * torch.tanh(expected / cap)
        use_float32_head(model)
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    assert (logits[0] - expected[0]).abs().max() < 1e-4
    if name == "gemma2":
        assert logits.abs().max() <= 2  # the cap


def test_the_float32_head_stays_float32_under_autocast():
    model = build("llama")
    use_float32_head(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=whole(sequence(4, 9))).logits
    assert logits.dtype == torch.float32


def test_the_float32_head_keeps_its_bias():
    head = torch.nn.Linear(4, 3)

    class Model:
        def get_output_embeddings(self):
            return head

    hidden = torch.randn(2, 4)
    expected = hidden @ head.weight.T + head.bias
    use_float32_head(Model())
    torch.testing.assert_close(head(hidden), expected)
    assert head.bias.abs().max() > 0


def test_gradients_flow_through_the_float32_head():
    model = build("llama")
    use_float32_head(model)
    sums(completion_logps(model, [sequence(3, 3)]).logps).sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0
