"""A packed row gives what the plain forward gives. Every architecture and its gradients: test_forward.py."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prefcache.pipeline.model import attention
from prefcache.pipeline.model.attention import Branch
from prefcache.pipeline.model.logprobs import plain_logps
from prefcache.pipeline.model.packed_row import Row, lay_out, row_logps
from prefcache.pipeline.schema import TokenSequence
from tests.helpers.models import UNSHARABLE, answers, build, tree

torch.set_num_threads(1)

# Two answers and their prompt; a lone one; four, one of them a single token; a prompt of one token.
GROUPS = [answers(20, 9, 14), answers(7, 5), answers(12, 3, 1, 8, 2), answers(1, 6, 1)]


# -- the layout, by hand ---------------------------------------------------------------------------------------------


def row_of(prompt: list[int], *answers: list[int]) -> Row:
    ids = [np.array(each, dtype=np.int32) for each in (prompt, *answers)]
    return lay_out([[TokenSequence(ids[0], answer) for answer in ids[1:]]])


def test_a_row_by_hand():
    row = row_of([7, 8], [4, 5], [1, 2, 3])
    # 7 8 4 | 1 2: an answer's last token is never an input, and both answers continue at position 2.
    assert row.input_T.tolist() == [7, 8, 4, 1, 2]
    assert row.position_T.tolist() == [0, 1, 2, 2, 3]
    # 4 is predicted by 8, 5 by 4; 1 by 8 again, 2 by 1, 3 by 2.
    assert row.target_M.tolist() == [4, 5, 1, 2, 3]
    assert row.source_M.tolist() == [1, 2, 1, 3, 4]
    assert row.branches == [Branch((), slice(0, 3)), Branch((slice(0, 2),), slice(3, 5))]
    assert (row.place_N, row.counts) == (None, [2, 3])


def test_a_tree_by_hand():
    row = row_of([7, 8], [1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 9, 9], [1, 2])
    # By ids, descending: 1 2 5 9 9, then 1 2 5 6, whose inputs are all there, then 3 after 1 2, and 1 2 is there.
    assert row.input_T.tolist() == [7, 8, 1, 2, 5, 9, 3]
    assert row.position_T.tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert row.branches == [Branch((), slice(0, 6)), Branch((slice(0, 4),), slice(6, 7))]
    # 16 tokens are counted. Distinct are 1 and 2, predicted by 8 and 1; 3 and 5 by 2; 6 and 9 by 5; 9 by 9; 4 by 3.
    predictions = [(1, 1), (2, 2), (3, 3), (3, 5), (4, 6), (4, 9), (5, 9), (6, 4)]
    assert list(zip(row.source_M.tolist(), row.target_M.tolist(), strict=True)) == predictions
    assert row.place_N.tolist() == [0, 1, 2, 7, 0, 1, 3, 4, 0, 1, 3, 5, 6, 0, 1] and row.counts == [4, 4, 5, 2]


def test_a_branch_within_a_branch_sees_its_whole_path():
    row = row_of([7], [3, 3], [2, 5, 1, 1], [2, 4, 1])
    assert row.input_T.tolist() == [7, 3, 2, 5, 1, 4]
    assert row.branches == [
        Branch((), slice(0, 2)),
        Branch((slice(0, 1),), slice(2, 5)),
        Branch((slice(0, 1), slice(2, 3)), slice(5, 6)),
    ]
    assert attention.Segments(row.branches).index_calls()["keys"].tolist() == [0, 1, 0, 2, 3, 4, 0, 2, 5]


def test_the_keys_of_one_call_over_the_row():
    row = lay_out([answers(2, 3, 3), answers(1, 2)])
    segments = attention.Segments(row.branches)
    # p p a a | b b sees p p b b | q c: queries 4, 2, 2; keys 4, 4, 2.
    assert (segments.n_queries, segments.n_keys) == ([4, 2, 2], [4, 4, 2])
    assert {name: values.tolist() for name, values in segments.index_calls().items()} == {
        "keys": [0, 1, 2, 3, 0, 1, 4, 5, 6, 7],
        "query_starts": [0, 4, 6, 8],
        "key_starts": [0, 4, 8, 10],
    }


def test_under_autocast_a_row_is_computed_in_its_dtype():
    # Trained weights are float32: rotated queries and keys are too, which a fused kernel does not take.
    query = torch.zeros(1, 4, 7, 8)
    assert attention._compute_dtype(query) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention._compute_dtype(query) == torch.bfloat16


@pytest.mark.parametrize(
    ("width", "value_width", "dtype", "fits"),
    [
        (64, 64, torch.bfloat16, True),
        (256, 256, torch.float16, True),
        (64, 64, torch.float32, False),
        (192, 128, torch.bfloat16, False),  # DeepSeek-V3
        (512, 512, torch.bfloat16, False),
        (20, 20, torch.bfloat16, False),
    ],
)
def test_what_the_kernel_does_not_take_is_computed_call_by_call(width, value_width, dtype, fits):
    query, value = torch.empty(1, 2, 3, width), torch.empty(1, 2, 3, value_width)
    assert attention._fits_varlen_kernel(query, value, dtype) == fits


# -- on real models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "mistral"])
def test_a_row_gives_what_each_sequence_gives_alone_whatever_else_is_in_it(name):
    model = build(name)
    assert attention.unsupported_reason(model.config) is None
    with torch.no_grad():
        plain = torch.cat([plain_logps(model, sequence) for group in GROUPS for sequence in group])
        attention.use_segments(model)
        together = torch.cat(row_logps(model, lay_out(GROUPS)).logps)
        alone, other = (row_logps(model, lay_out(row)).logps for row in (GROUPS[:1], [GROUPS[0], answers(30, 30, 2)]))
    torch.testing.assert_close(together, plain, rtol=0, atol=2e-5)
    assert plain.std() > 0.1
    # Matrix products may be split differently in a longer row; nothing of another group may come in.
    torch.testing.assert_close(together[:9], alone[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(other[0], alone[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", UNSHARABLE)
def test_models_that_cannot_be_kept_to_segments_are_known(name):
    assert attention.unsupported_reason(build(name).config)


def test_a_model_that_drops_the_keyword_fails_rather_than_attend_to_all():
    model = build("stablelm")
    with pytest.raises(Exception, match=r"segments|attention"):
        attention.use_segments(model)
        row_logps(model, lay_out(GROUPS))


# -- the kernel for GPUs, written out --------------------------------------------------------------------------------


def varlen(q_THD, k_THD, v_THD, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn is documented to compute: queries are aligned with the last keys."""
    out = torch.empty_like(q_THD[..., : v_THD.shape[-1]])
    left, right = window_size
    assert right == 0 and max_q == max(cu_q.diff()) and max_k == max(cu_k.diff())
    for i in range(len(cu_q) - 1):
        q, k, v = (x[cu[i] : cu[i + 1]].transpose(0, 1) for x, cu in ((q_THD, cu_q), (k_THD, cu_k), (v_THD, cu_k)))
        last = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        key = torch.arange(k.shape[1])
        seen = (key <= last) & ((key >= last - left) if left >= 0 else torch.tensor(True))
        call = F.scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=scale, enable_gqa=enable_gqa)[0]
        out[cu_q[i] : cu_q[i + 1]] = call.transpose(0, 1)
    return out


def varlen_of_2_11(q_THD, k_THD, *others, scale, window_size):
    """PyTorch 2.11 has no keyword for fewer heads of keys, and takes them."""
    grouped = q_THD.shape[1] != k_THD.shape[1]
    return varlen(q_THD, k_THD, *others, scale=scale, window_size=window_size, enable_gqa=grouped)


@pytest.mark.parametrize("window", [None, 4])
def test_one_call_over_the_row_is_asked_as_this_pytorch_wants_it(window):
    row = lay_out([answers(2, 3, 3), answers(1, 2)])
    # Tensors without values: arguments and shapes are checked, and nothing is computed.
    states = [torch.empty(heads, 8, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)]
    segments = attention.Segments(row.branches)
    indices = attention.CallIndices(*(torch.from_numpy(each).to("meta") for each in segments.index_calls().values()))
    segments = dataclasses.replace(segments, indices=indices)
    assert attention._varlen_attention(*states, segments, 0.25, window).shape == (8, 4, 16)


@pytest.mark.parametrize("kernel", [varlen, varlen_of_2_11])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_one_call_over_the_row_is_the_same(name, kernel, monkeypatch):
    def one_call(module, query, key, value, mask, *, segments, scaling=None, sliding_window=None, **_):
        out = attention._varlen_attention(query[0], key[0], value[0], segments, scaling, sliding_window)
        return out.unsqueeze(0), None

    model, row = build(name), lay_out([*GROUPS, tree()])
    attention.use_segments(model)
    with torch.no_grad():
        expected = row_logps(model, row).logps
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        attention.AttentionInterface.register(attention.NAME, one_call)
        try:
            logps = row_logps(model, row).logps
        finally:
            attention.AttentionInterface.register(attention.NAME, attention.attend)
    torch.testing.assert_close(torch.cat(logps), torch.cat(expected), rtol=0, atol=1e-5)
