"""What a traced GPU counts, by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from prefcache.pipeline.model.device import kind_of, to_device, to_host
from prefcache.pipeline.model.traced_gpu import GPU, Op, trace_gpu


def test_a_product_has_its_arithmetic_its_traffic_and_one_kernel():
    with trace_gpu() as trace:
        left, right = torch.empty(10, 20, device=GPU), torch.empty(20, 30, device=GPU)
        left @ right
        left.bfloat16() @ right.t().bfloat16().t()
        torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    products = [op for op in trace.ops if op.name == "mm"]
    # 2 m k n, and m k + k n numbers read, m n written.
    assert products == [
        Op("mm", "float32", 12_000, 4 * (200 + 600 + 300), 1),
        Op("mm", "bfloat16", 12_000, 2 * (200 + 600 + 300), 1),
        Op("mm", "bfloat16", 12_000, 2 * (200 + 600) + 4 * 300, 1),
    ]
    assert trace.flops_by_dtype() == {"bfloat16": 24_000, "float32": 12_000}


def test_a_product_that_is_added_has_the_dtype_of_its_operands_and_reads_its_sum_once():
    with trace_gpu() as trace:
        with GPU:
            left, right, total = torch.empty(10, 20).bfloat16(), torch.empty(20, 30).bfloat16(), torch.empty(10, 30)
        trace.restart()
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    assert dict(trace.ops) == {Op("addmm", "bfloat16", 12_000, 2 * (200 + 600) + 4 * (300 + 300), 1): 1}


def test_views_and_memory_without_values_launch_nothing():
    with trace_gpu() as trace:
        x = torch.empty(4, 6, device=GPU)
        x.t()[1:].unsqueeze(0).detach().view(5, 4).expand(2, 5, 4).split(1)
        assert trace.total(lambda op: op.kernels) == 0
        x.add_(1)
        torch._foreach_mul_([x, x], 2.0)  # one kernel for all
        assert trace.total(lambda op: op.kernels) == 2
        assert trace.total(lambda op: op.bytes) == 3 * (2 * 96)


def test_a_gather_moves_what_it_takes_not_the_table():
    with trace_gpu() as trace:
        table, ids = torch.empty(1000, 8, device=GPU), torch.empty(3, dtype=torch.long, device=GPU)
        F.embedding(ids, table)
        table[ids]
    assert trace.total(lambda op: op.bytes) == 2 * (2 * 3 * 8 * 4 + 3 * 8)


def test_the_peak_is_that_of_what_lives_together_in_blocks_of_the_allocator():
    with trace_gpu() as trace:
        weight = torch.empty(1000, device=GPU)
        trace.assign("weights", [weight])
        trace.restart()
        one = torch.empty(100, device=GPU)
        del one
        other = torch.empty(300, device=GPU)
        view = other[:10]
        del other
        assert sum(trace.held.values()) == 4096 + 1536  # a view keeps all of it
        del view
    # 4,000, 400 and 1,200 bytes, each rounded up to a multiple of 512; two of them never live together.
    assert trace.peak_bytes == 4096 + 1536
    assert trace.peak_parts["weights"] == 4096 and trace.peak_parts["activations"] == 1536


def test_copies_and_waits_are_counted():
    with trace_gpu() as trace:
        x = to_device(torch.arange(3), GPU)  # from pinned memory: nobody waits
        assert (trace.copies, trace.syncs) == (1, 0)
        to_host(x).tolist()
        assert (trace.copies, trace.syncs) == (1, 1)
        float(x[0])
        x.tolist()
        torch.tensor([1, 2], device=GPU)
        x[torch.tensor([0])]  # an index of the host's is copied
        assert trace.syncs == 1 + 4
        torch.arange(3).tolist()
        assert trace.syncs == 5


def test_host_and_gpu_do_not_mix():
    assert kind_of(GPU) == "cpu"
    with trace_gpu():
        assert kind_of(GPU) == "cuda"
        with pytest.raises(FakeTensorDeviceMismatchError):
            torch.ones(3, device=GPU) + torch.ones(3)


def test_what_is_compiled_is_one_operation_without_temporaries():
    with trace_gpu() as trace:
        x = torch.empty(1024, device=GPU)
        with trace.as_fused(Op("update", "float32", 0, 8192, 1)):
            x.copy_((x * 2 + 1).exp())
    assert trace.peak_bytes == 4096
    assert dict(trace.ops) == {Op("update", "float32", 0, 8192, 1): 1}


def test_modules_move_without_values():
    with trace_gpu():
        layer = torch.nn.Linear(4, 4).to(GPU, torch.bfloat16)
    assert layer.weight.device == GPU and layer.weight.dtype == torch.bfloat16
