"""Products by oneDNN: the same numbers, quicker kernels, and no memory for shapes that are gone."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from pipeline.model import products
from tests.bench import contest

needs_amd = pytest.mark.skipif(not products._is_amd(), reason="not an AMD processor")


@pytest.fixture(autouse=True)
def onednn():
    products.use_onednn()


def kernels(compute) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        compute()
    return {event.key for event in seen.key_averages()}


def test_products_are_those_of_float64():
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((300, 128, 200), (131, 256, 2_000), (3, 5, 7), (1, 600, 9_000), (257, 1, 40_000)):
        a, b, bias = (torch.randn(*size, generator=generator) for size in ((m, k), (k, n), (n,)))
        expected = a.double() @ b.double()
        for left in (a, a.t().contiguous().t()):
            for right in (b, b.t().contiguous().t()):
                # A sum of k products of numbers around 1 is rounded in its last places.
                assert (left @ right - expected).abs().max() < 1e-5 * k**0.5
                assert (torch.addmm(bias, left, right) - expected - bias).abs().max() < 1e-5 * k**0.5
                assert (torch.addmm(bias, left, right, beta=2, alpha=0.5) - expected / 2 - 2 * bias).abs().max() < 1e-4


def test_a_bias_or_a_matrix_that_lies_otherwise_in_memory_is_right_too():
    generator = torch.Generator().manual_seed(0)
    a, weight, many = (torch.randn(*size, generator=generator) for size in ((300, 512), (2_000, 512), (4_000,)))
    for bias in (many[::2], many[:1].expand(2_000)):
        expected = a.double() @ weight.double().t() + bias.double()
        assert (F.linear(a, weight, bias) - expected).abs().max() < 1e-3
    overlapping = many.as_strided((500, 512), (3, 1))
    assert (a @ overlapping.t() - a.double() @ overlapping.double().t()).abs().max() < 1e-3


def test_a_token_does_not_depend_on_how_many_others_are_in_its_row():
    generator = torch.Generator().manual_seed(0)
    for k, n in ((384, 384), (384, 1_024), (512, 2_000), (64, 128)):
        rows, weight = torch.randn(700, k, generator=generator), torch.randn(n, k, generator=generator)
        whole = F.linear(rows, weight)
        assert all(torch.equal(F.linear(rows[:m], weight), whole[:m]) for m in (8, 30, 131, 512))


def test_gradients_are_those_of_float64():
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 150, 128), (200, 128), (200,))
    inputs = [torch.randn(*size, generator=generator).requires_grad_() for size in sizes]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    for some in (inputs, exact):
        F.linear(*some).sin().sum().backward()
    for mine, theirs in zip(inputs, exact, strict=True):
        assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_other_numbers_and_mistakes_are_as_ever():
    whole = torch.arange(6).reshape(2, 3)
    assert (whole @ whole.t()).tolist() == [[5, 14], [14, 50]]
    turned = torch.tensor([[1 + 1j, 2]])
    assert (turned @ turned.conj().t()).tolist() == [[6 + 0j]]
    assert (torch.ones(2, 0) @ torch.ones(0, 3)).tolist() == [[0, 0, 0]] * 2
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ones(300, 200) @ torch.ones(300, 200)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.ones(300, 200) @ torch.ones(200, 300).double()


@needs_amd
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_large_products_are_onednns():
    a, weight, bias = torch.ones(300, 128), torch.ones(600, 128), torch.ones(600)
    assert "mkldnn::_linear_pointwise" in kernels(lambda: F.linear(a, weight))
    assert "mkldnn::_linear_pointwise" in kernels(lambda: F.linear(a, weight, bias))
    assert "mkldnn::_linear_pointwise" not in kernels(lambda: F.linear(a[:, :3], weight[:, :3]))
    with torch.backends.mkldnn.flags(enabled=False):
        assert "mkldnn::_linear_pointwise" not in kernels(lambda: F.linear(a, weight))


@needs_amd
def test_shapes_that_are_gone_take_no_memory():
    """Five hundred lengths of a row, each with a kernel of its own: kept, they would take some 200 MiB."""
    program = """
import torch
from pipeline.model import products
from tests.bench.contest import resident

products.use_onednn()
weight, rows = torch.randn(1_024, 512), torch.randn(900, 512)
for n in range(300, 340):
    rows[:n] @ weight.t()
before = resident("VmRSS")
for n in range(340, 840):
    rows[:n] @ weight.t()
print(resident("VmRSS") - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=contest.ROOT)
    assert "Warning" not in ran.stderr
    assert float(ran.stdout) < 64
