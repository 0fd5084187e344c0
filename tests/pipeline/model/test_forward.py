"""However sequences share a forward pass, values and gradients are those of the plain forward, one sequence at a time.

Shapes: N answer tokens, V vocabulary.
"""

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForCausalLM, BertConfig, BertLMHeadModel

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.model import attention, forward
from prefcache.pipeline.model.forward import Forward
from prefcache.pipeline.model.logprobs import log_sum_squares, plain_logps, sum_logps
from tests.helpers.models import (
    ARCHITECTURES,
    PAIRS,
    SIZES,
    TREE_PREDICTIONS,
    TREE_TOKENS,
    UNSHARABLE,
    answers,
    build,
    compute,
    dpo_loss,
    gradient,
    relative_error,
    sequence,
    start_forward,
    tree,
)

torch.set_num_threads(1)

LAYOUTS = ("shared", "packed", "padded")
# Four labelled answers to one prompt, and lone ones.
LABELS = [*answers(12, 3, 1, 8, 2), *answers(7, 5), *answers(30, 4)]


def kto_loss(logps: list[torch.Tensor]) -> torch.Tensor:
    """Answers are good and bad in turn; weights differ, so that no answer's gradient stands in for another's."""
    ratios = sum_logps(logps) + torch.arange(2.0, 2 + len(logps))
    sign = torch.tensor([1.0, -1.0] * len(logps))[: len(logps)]
    return (torch.arange(1.0, 1 + len(logps)) * torch.sigmoid(-0.1 * sign * ratios)).mean()


# -- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sequences", "loss"), [(PAIRS, dpo_loss), (LABELS, kto_loss)], ids=["pairs", "labels"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients_are_those_of_the_plain_forward(name, sequences, loss):
    plain = build(name)
    expected = [plain_logps(plain, each) for each in sequences]
    loss(expected).backward()
    for layout in LAYOUTS:
        model = build(name)
        chosen = start_forward(model, layout, sequences)
        assert chosen.layout == layout and chosen.layout_reason is None
        logps, _ = compute(chosen, sequences)
        assert [len(each) for each in logps] == [len(each.completion_ids) for each in sequences]
        assert relative_error(torch.cat(logps), torch.cat(expected)) < 1e-5, layout
        loss(logps).backward()
        assert relative_error(gradient(model), gradient(plain)) < 1e-5, layout


# -- trees -----------------------------------------------------------------------------------------------------------

TREES = [*tree(), *answers(7, 5, 8), *tree(3)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_answers_begin_with_has_the_values_and_gradients_of_the_plain_forward(name):
    plain, model = build(name), build(name)
    expected = [plain_logps(plain, each) for each in TREES]
    kto_loss(expected).backward()
    logps, _ = compute(start_forward(model, "shared", TREES), TREES)
    for found, each in zip(logps, expected, strict=True):
        assert relative_error(found, each) < 1e-5
    kto_loss(logps).backward()
    assert relative_error(gradient(model), gradient(plain)) < 1e-5


def test_tokens_that_answers_share_are_computed_once_and_their_values_are_the_same():
    model, inputs, heads = build("llama"), [], []
    chosen = start_forward(model, "shared", PAIRS)
    model.get_decoder().register_forward_pre_hook(
        lambda module, _, named: inputs.append(named["input_ids"]),
        with_kwargs=True,
    )
    model.lm_head.register_forward_pre_hook(lambda _, given: heads.append(given[0].flatten(0, -2).shape[0]))
    with torch.no_grad():
        logps, squares = compute(chosen, tree(), squares=True)
    # Where the head computes, the decoder is given none.
    assert (sum(ids.numel() for ids in inputs if ids is not None), sum(heads)) == (TREE_TOKENS, TREE_PREDICTIONS)
    for lists in (logps, squares):
        first, second, third, beginning, again, changed, *_ = lists
        assert torch.equal(first, again) and torch.equal(first[:-1], changed[:-1])
        assert torch.equal(first[:9], second[:9]) and torch.equal(second[:12], third[:12])
        assert torch.equal(first[:5], beginning)
    assert not torch.equal(logps[0][-1], logps[5][-1])


def test_answers_may_count_different_tokens_of_what_they_share():
    model, plain = build("llama"), build("llama")
    counted = [[0, 1, 13], [1, 9, 10], [0, 13], [], [5], [13], [0, 1, 2, 3], [0]]
    sequences = [each._replace(counted=np.array(n, np.int64)) for each, n in zip(tree(), counted, strict=True)]
    expected = [plain_logps(plain, each) for each in sequences]
    kto_loss(expected).backward()
    logps, _ = compute(start_forward(model, "shared", PAIRS), sequences)
    assert relative_error(torch.cat(logps), torch.cat(expected)) < 1e-5
    kto_loss(logps).backward()
    assert relative_error(gradient(model), gradient(plain)) < 1e-5


@pytest.mark.parametrize("fault", ["positions", "path"])
def test_a_model_that_is_wrong_for_branches_within_an_answer_falls_back(monkeypatch, fault):
    """Though it is right for answers that share their prompt only, as those do that training begins with."""
    real = forward.lay_out

    def lay_out(groups, vision):
        row = real(groups, vision)
        for i, (path, own, _) in enumerate(row.branches):
            if fault == "path" and len(path) > 1:
                row.branches[i] = attention.Branch(path[:1], own)
            n_prompt = next((len(group[0].prompt_ids) for group in groups), 0)
            if fault == "positions" and path and row.position_T[own.start] > n_prompt:
                row.position_T[own] = row.position_T[own] - row.position_T[own.start] + n_prompt
        return row

    monkeypatch.setattr(forward, "lay_out", lay_out)
    chosen = start_forward(build("llama"), "auto", [*answers(40, 30, 14), *answers(50, 9, 9)])
    assert chosen.layout == "packed" and chosen.layout_reason.startswith("not shared: off by up to")


# -- models that cannot share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSHARABLE)
def test_a_model_that_cannot_share_is_padded_and_says_why(name):
    model = build(name)
    with torch.no_grad():
        alone = [plain_logps(model, each) for each in PAIRS]
        chosen = start_forward(model, "auto", PAIRS)
        logps, _ = compute(chosen, PAIRS)
    assert chosen.layout == "padded"
    assert chosen.layout_reason.startswith("not shared: ") and "; not packed: " in chosen.layout_reason
    assert relative_error(torch.cat(logps), torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squares_are_those_of_the_plain_forwards_distributions(name, layout):
    model, plain = build(name), build(name)
    logps, squares = compute(start_forward(model, layout, PAIRS), PAIRS, squares=True)
    for each, logps_N, squares_N in zip(PAIRS, logps, squares, strict=True):
        ids = torch.from_numpy(each.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits_NV = plain(input_ids=ids).logits[0, len(each.prompt_ids) - 1 : -1]
        torch.testing.assert_close(squares_N, log_sum_squares(logits_NV), rtol=0, atol=2e-5)
        assert logps_N.requires_grad and not squares_N.requires_grad


# -- counted tokens --------------------------------------------------------------------------------------------------

# Turns of 14 and of 8 tokens whose middle is not the assistant's, one whose last token alone counts, and one that counts whole.
COUNTED = [
    each._replace(counted=None if positions is None else np.array(positions, dtype=np.int64))
    for each, positions in zip(
        [*answers(20, 9, 14), *answers(7, 5, 8)], [[], [0, 1, 2, 9, 10, 13], [4], None], strict=True
    )
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2"])
def test_counted_tokens_have_the_values_and_gradients_of_the_plain_forward_without_the_other_terms(name, layout):
    exact, model = build(name).double(), build(name)
    expected = []
    for each in COUNTED:
        ids = torch.from_numpy(each.ids.astype(np.int64))
        logps = exact(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        of_answer = logps[len(each.prompt_ids) - 1 :]
        expected.append(of_answer if each.counted is None else of_answer[each.counted])
    weights = torch.arange(1.0, 5, dtype=torch.float64)
    sum(weight * logps.sum() for weight, logps in zip(weights, expected, strict=True)).backward()
    logps, squares = compute(start_forward(model, layout, PAIRS), COUNTED, squares=True)
    assert [len(each) for each in logps] == [len(each) for each in squares] == [0, 6, 1, 8]
    assert relative_error(torch.cat(logps).double(), torch.cat(expected)) < 1e-5
    (weights * sum_logps(logps)).sum().backward()
    assert relative_error(gradient(model).double(), gradient(exact)) < 1e-5


def test_of_the_definition_only_counted_tokens_are_returned():
    model = build("llama")
    for each in COUNTED:
        whole, counted = plain_logps(model, each._replace(counted=None)), plain_logps(model, each)
        assert torch.equal(counted, whole[each.counted_positions])


@pytest.mark.parametrize(
    ("layout", "n"),
    # 0 + 6 + 1 + 8 tokens count. Padded, all rows have the columns that any of the rows needs: 19, 20, 21, 28, 29, 32 for a
    # prompt of 20, and 6 to 13 for one of 7.
    [("shared", 15), ("packed", 15), ("padded", 4 * (6 + 8))],
)
def test_the_head_computes_counted_positions_only(layout, n):
    model, seen = build("llama"), []
    chosen = start_forward(model, layout, PAIRS)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2).shape[0]))
    with torch.no_grad():
        compute(chosen, COUNTED)
    assert sum(seen) == n


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
def test_where_no_token_counts_nothing_is_learned(name, layout):
    model = build(name)
    nothing = [each._replace(counted=np.empty(0, np.int64)) for each in COUNTED]
    logps, _ = compute(start_forward(model, layout, PAIRS), nothing, squares=True)
    sums = sum_logps(logps)
    assert sums.tolist() == [0, 0, 0, 0]
    sums.sum().backward()
    assert gradient(model).norm() == 0


# -- the choice of a layout ------------------------------------------------------------------------------------------


def test_a_model_whose_rows_are_wrong_falls_back(monkeypatch):
    # Positions that do not restart are what a model that ignores them would compute: wrong for a second answer, and
    # silently so. Without shared prompts a relative position stays what it is.
    real = forward.lay_out

    def shifted(groups, vision):
        row = real(groups, vision)
        row.position_T[:] = np.arange(len(row.position_T))
        return row

    monkeypatch.setattr(forward, "lay_out", shifted)
    chosen = start_forward(build("llama"), "auto", PAIRS)
    assert chosen.layout == "packed" and chosen.layout_reason.startswith("not shared: off by up to")
    with pytest.raises(UsageError, match=r"train\.rows=shared is not right for this model"):
        start_forward(build("llama"), "shared", PAIRS)


def test_a_layout_that_gives_nan_is_not_taken(monkeypatch):
    """As attention does if a query sees no key. A nan is neither above a limit nor below it."""
    real = forward.row_logps

    def with_a_hole(*args, **kwargs):
        scores = real(*args, **kwargs)
        scores.logps[0][0] = float("nan")
        return scores

    monkeypatch.setattr(forward, "row_logps", with_a_hole)
    chosen = start_forward(build("llama"), "auto", PAIRS)
    assert chosen.layout == "padded" and "off by up to nan" in chosen.layout_reason


def test_a_layout_is_tried_on_the_longest_sequence_and_on_those_of_its_prompt():
    """So that a window is exceeded in the trial if it is at all: 42 lone sequences of 9 to 12 tokens, a pair of 72 and 71."""
    short = [sequence(8 + k % 3, 1 + k % 2, seed=k) for k in range(42)]
    long = answers(60, 12, 11)
    for like in ([*short, *long], [*long, *short]):
        chosen, tried = Forward(build("mistral"), "sdpa", "auto", "float32", "train.rows"), []

        def compute_all(sequences, chosen=chosen, tried=tried):
            tried.extend(sequences)
            return chosen.compute_all(sequences)

        chosen.choose_layout(like, compute_all)
        assert len(tried) <= 24 and [each.n_tokens for each in tried if each.n_tokens > 20] == [72, 71]


def test_a_model_that_drops_the_keyword_gets_its_own_attention_back(monkeypatch):
    # As if nothing were known of it: it fails when it is tried.
    monkeypatch.setattr(attention, "_UNSUPPORTED_MODELS", set())
    model = build("stablelm")
    chosen = start_forward(model, "auto", PAIRS)
    reason = "its forward does not take packed rows (TypeError)"
    assert (chosen.layout, chosen.layout_reason) == ("padded", f"not shared: {reason}; not packed: {reason}")
    assert model.config._attn_implementation == "sdpa"
    compute(chosen, PAIRS)


def test_a_model_that_takes_no_positions_says_so_before_it_is_tried():
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 64}
    bart = BartForCausalLM(BartConfig(**sizes, max_position_embeddings=128)).eval()
    chosen = start_forward(bart, "auto", PAIRS)
    reason = "it computes positions from the row, so rows cannot be packed"
    assert (chosen.layout, chosen.layout_reason) == ("padded", f"not shared: {reason}; not packed: {reason}")


def test_a_head_that_trains_more_than_a_matrix_is_padded():
    torch.manual_seed(0)
    chosen = start_forward(BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval(), "auto", PAIRS)
    assert chosen.layout == "padded"
    expected = "its head trains more than a matrix (cls.predictions.transform.dense.weight)"
    assert expected in chosen.layout_reason


def test_a_shared_prompt_is_computed_once():
    n_positions = {}
    for layout in LAYOUTS:
        model, seen = build("llama"), []
        chosen = start_forward(model, layout, PAIRS)
        model.get_decoder().register_forward_pre_hook(
            lambda module, _, inputs, seen=seen: seen.append(inputs.get("input_ids")), with_kwargs=True
        )
        with torch.no_grad():
            compute(chosen, PAIRS)
        n_positions[layout] = sum(ids.numel() for ids in seen if ids is not None)  # with none, the head computes
    # No answer's last token. Prompts 20 + 7 + 1 + 40; answers 8 + 13, 0 + 4, 5 + 0, 1 + 2.
    assert n_positions == {"shared": 68 + 33, "packed": 2 * 68 + 33, "padded": 8 * (40 + 2)}


def test_it_generates_with_its_own_attention():
    model, plain = build("mistral"), build("mistral")
    chosen = start_forward(model, "shared", PAIRS)
    ids = torch.from_numpy(PAIRS[0].prompt_ids.astype(np.int64))[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before, _ = compute(chosen, PAIRS)
        with chosen.native_attention():
            assert model.config._attn_implementation == "sdpa"
            assert torch.equal(model.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
        after, _ = compute(chosen, PAIRS)
    assert all(map(torch.equal, before, after))
