"""Whatever shares a forward pass: the values and the gradients are those of the plain forward, one sequence at a time.

Shapes: N answer tokens, V vocabulary.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_for_tests import ARCHITECTURES, SIZES, UNSHARABLE, build, sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.errors import UsageError
from pipeline.model import attention, forward, logprobs
from pipeline.model.forward import Forward, flat
from pipeline.model.logprobs import log_sum_squares, plain_logps, sums
from pipeline.schema import Sequence

torch.set_num_threads(1)

WAYS = ("shared", "packed", "padded")


def answers(n_prompt: int, *n_completions: int) -> list[Sequence]:
    """Answers to one prompt."""
    prompt = sequence(n_prompt, 1, seed=9).prompt_ids
    return [Sequence(prompt, sequence(1, n, seed=n_prompt + i).completion_ids) for i, n in enumerate(n_completions)]


# Chosen and rejected in turn: ragged, one token against many, a prompt of one token, and one longer than any window.
PAIRS = [each for n_prompt, *n in [(20, 9, 14), (7, 1, 5), (1, 6, 1), (40, 2, 3)] for each in answers(n_prompt, *n)]
# Four labelled answers to one prompt, and lone ones.
LABELS = [*answers(12, 3, 1, 8, 2), *answers(7, 5), *answers(30, 4)]


def dpo(logps: list[torch.Tensor]) -> torch.Tensor:
    """Against a reference that has said minus 2, minus 3, ... of the answers."""
    ratios = sums(logps) + torch.arange(2.0, 2 + len(logps))
    return -F.logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()


def kto_of_good_and_bad(logps: list[torch.Tensor]) -> torch.Tensor:
    """Answers are good and bad in turn; weights that differ, so that no answer's gradient stands in for another's."""
    ratios = sums(logps) + torch.arange(2.0, 2 + len(logps))
    sign = torch.tensor([1.0, -1.0] * len(logps))[: len(logps)]
    return (torch.arange(1.0, 1 + len(logps)) * torch.sigmoid(-0.1 * sign * ratios)).mean()


def made(model, way: str, like: list[Sequence]) -> Forward:
    found = Forward(model, model.config._attn_implementation, way, "float32", "train.rows")
    found.choose(like)
    return found


def together(shared: Forward, sequences: list[Sequence], *, squares: bool = False) -> list[list[torch.Tensor]]:
    """Log-probs, and what else is asked for, in the order of the sequences."""
    groups = shared.groups(sequences)
    back = np.argsort(flat(groups))
    found = shared.logps([[sequences[i] for i in group] for group in groups], squares=squares)
    return [[lists[i] for i in back] if lists else [] for lists in found]


def gradient(model) -> torch.Tensor:
    """Of all weights, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


# -- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sequences", "loss"), [(PAIRS, dpo), (LABELS, kto_of_good_and_bad)], ids=["pairs", "labels"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients_are_those_of_the_plain_forward(name, sequences, loss):
    plain = build(name)
    logps = [plain_logps(plain, each) for each in sequences]
    loss(logps).backward()
    for way in WAYS:
        model = build(name)
        shared = made(model, way, sequences)
        assert shared.way == way and shared.why is None
        found, _ = together(shared, sequences)
        assert [len(each) for each in found] == [len(each.completion_ids) for each in sequences]
        assert apart(torch.cat(found), torch.cat(logps)) < 1e-5, way
        loss(found).backward()
        assert apart(gradient(model), gradient(plain)) < 1e-5, way


@pytest.mark.parametrize("name", UNSHARABLE)
def test_a_model_that_cannot_share_is_padded_and_says_why(name):
    model = build(name)
    with torch.no_grad():
        alone = [plain_logps(model, each) for each in PAIRS]
        shared = made(model, "auto", PAIRS)
        found, _ = together(shared, PAIRS)
    assert shared.way == "padded"
    assert shared.why.startswith("not shared: ") and "; not packed: " in shared.why
    assert apart(torch.cat(found), torch.cat(alone)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_squares_are_those_of_the_plain_forwards_distributions(name, way):
    model, plain = build(name), build(name)
    logps, squares = together(made(model, way, PAIRS), PAIRS, squares=True)
    for each, logps_N, squares_N in zip(PAIRS, logps, squares, strict=True):
        ids = torch.from_numpy(np.concatenate(each).astype(np.int64))[None]
        with torch.no_grad():
            logits_NV = plain(input_ids=ids).logits[0, len(each.prompt_ids) - 1 : -1]
        torch.testing.assert_close(squares_N, log_sum_squares(logits_NV), rtol=0, atol=2e-5)
        assert logps_N.requires_grad and not squares_N.requires_grad


# -- the way that is taken -------------------------------------------------------------------------------------------


def test_a_model_whose_rows_come_out_wrong_falls_back(monkeypatch):
    # Positions that do not restart are what a model that ignores them would compute: wrong for a second answer, and
    # silently so. Without shared prompts a relative position stays what it is.
    real = forward.lay_out

    def shifted(groups):
        row = real(groups)
        row.position_T[:] = np.arange(len(row.position_T))
        return row

    monkeypatch.setattr(forward, "lay_out", shifted)
    found = made(build("llama"), "auto", PAIRS)
    assert found.way == "packed" and found.why.startswith("not shared: off by up to")
    with pytest.raises(UsageError, match=r"train\.rows=shared is not right for this model"):
        made(build("llama"), "shared", PAIRS)


def test_a_model_that_drops_the_keyword_goes_back_to_its_own_attention(monkeypatch):
    # As if nothing were known of it: it fails when it is tried.
    monkeypatch.setattr(attention, "_MODELS", set())
    model = build("stablelm")
    found = made(model, "auto", PAIRS)
    assert found.way == "padded" and "TypeError" in found.why
    assert model.config._attn_implementation == "sdpa"
    together(found, PAIRS)


def test_a_shared_prompt_is_computed_once():
    n_positions = {}
    for way in WAYS:
        model, seen = build("llama"), []
        shared = made(model, way, PAIRS)
        model.get_decoder().register_forward_pre_hook(
            lambda module, _, inputs, seen=seen: seen.append(inputs.get("input_ids")), with_kwargs=True
        )
        with torch.no_grad():
            together(shared, PAIRS)
        n_positions[way] = sum(ids.numel() for ids in seen if ids is not None)  # with none, the head computes
    # No answer's last token. Prompts 20 + 7 + 1 + 40; answers 8 + 13, 0 + 4, 5 + 0, 1 + 2.
    assert n_positions["shared"] == 68 + 33
    assert n_positions["packed"] == 2 * 68 + 33
    assert n_positions["padded"] == 8 * (40 + 2)


def test_it_writes_and_saves_as_it_came():
    model, plain = build("mistral"), build("mistral")
    shared = made(model, "auto", PAIRS)
    assert shared.way == "shared"
    ids = torch.from_numpy(PAIRS[0].prompt_ids.astype(np.int64))[None]
    said = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before, _ = together(shared, PAIRS)
        with shared.plainly():
            assert model.config._attn_implementation == "sdpa"
            assert torch.equal(model.generate(input_ids=ids, **said), plain.generate(input_ids=ids, **said))
        after, _ = together(shared, PAIRS)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# -- the head --------------------------------------------------------------------------------------------------------


class Logits(TorchDispatchMode):
    """How many rows of logits there are at once: the first dimensions of all that is computed over the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[-1] == self.vocabulary:
                self.rows.add(each.numel() // self.vocabulary)
        return found


def saved_logits(compute) -> tuple[torch.Tensor, int]:
    """A loss, and how many rows over the vocabulary wait for its backward pass."""
    rows = {}

    def keep(each: torch.Tensor) -> torch.Tensor:
        # 32 rows are the head's weights, the other way round.
        if each.ndim > 1 and each.shape[-1] == 60 and each.shape[-2] != 32:
            rows[each.data_ptr()] = each.numel() // 60
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        loss = compute()
    return loss, sum(rows.values())


@pytest.mark.parametrize("way", ["shared", "packed"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere"])
def test_the_logits_of_all_tokens_never_exist(name, way, monkeypatch):
    model = build(name)
    shared = made(model, way, PAIRS)
    monkeypatch.setattr(logprobs, "_head_positions", lambda model: 5)
    n = sum(len(each.completion_ids) for each in PAIRS)
    assert n == 41  # so nine chunks, the last of four tokens
    with Logits(60) as seen:
        loss, waiting = saved_logits(lambda: dpo(together(shared, PAIRS)[0]))
        loss.backward()
    # Gemma's caps keep theirs as well.
    assert waiting <= (8 if name == "gemma2" else 4)
    assert max(seen.rows - {32}) == 5


def test_a_head_that_trains_more_than_a_matrix_is_padded():
    config = BertConfig(**SIZES, is_decoder=True)
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    found = made(model, "auto", PAIRS)
    assert found.way == "padded"
    assert "its head trains more than a matrix (cls.predictions.transform.dense.weight)" in found.why


def test_a_model_may_change_its_logits_in_place():
    class InPlace(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits /= 2
            return found

    slopes = []
    for way in ("shared", "padded"):
        torch.manual_seed(0)
        model = InPlace(LlamaConfig(**SIZES)).eval()
        dpo(together(made(model, way, PAIRS), PAIRS)[0]).backward()
        slopes.append(gradient(model))
    assert apart(*slopes) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere", "gpt2", "minicpm3"])
@pytest.mark.parametrize("squares", [False, True])
def test_a_head_in_chunks_has_the_values_and_the_gradient_of_one_at_once(name, squares, monkeypatch):
    found = []
    for n in (1000, 41, 7, 1):
        monkeypatch.setattr(logprobs, "_head_positions", lambda model, n=n: n)
        model = build(name)
        logps, of_squares = together(made(model, "shared", PAIRS), PAIRS, squares=squares)
        dpo(logps).backward()
        found.append((torch.cat([*logps, *of_squares]).detach(), gradient(model)))
        # The decoder is back in its place.
        with torch.no_grad():
            model.set_attn_implementation("eager")
            assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 60)
    for values, slopes in found[1:]:
        assert apart(values, found[0][0]) < 1e-6
        assert apart(slopes, found[0][1]) < 1e-6
