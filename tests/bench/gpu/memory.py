"""How large a model trains: with the cache, beside a live reference, and beside SFT on the same tokens.

Bytes are the peak of a step, the second one, with all gradients and AdamW's state. Models of the largest shape are cut to two
numbers of layers; a layer then has its bytes, weights and activations together, and all else has the rest. What fits into
a GPU follows from these, and is tried on the GPU that is here.
"""

from typing import Any

import numpy as np
import torch

from prefcache.pipeline.model.oom import is_out_of_memory
from tests.bench import corpus
from tests.bench.gpu import machine, ours, work
from tests.bench.gpu.machine import ON_GPU, Budget
from tests.bench.gpu.train import target

TOKENS = 4096  # of the one micro-batch
WAYS = ("ours", "ours-live", "ours-recomputed", "ours-recomputed-live", "ours-recomputed-lora")
SIZES = (80, 140)  # GB
LEFT_FREE = 0.06  # of a GPU, for the context and what lies between blocks


def run(tiny: bool, budget: Budget) -> dict[str, Any]:
    like_sft = _like_sft(work.SHAPES["tiny" if tiny else "0.5B"], tiny)
    shape, layers = work.SHAPES["tiny-8B" if tiny else "8B"], (2, 4)
    found: dict[str, Any] = {}
    print(f"A step of one micro-batch of {_n_tokens(tiny):,} tokens:")
    for way in WAYS:
        if why := (machine.absent("peft") if "lora" in way else None) or (
            "no time was left" if budget.over() else None
        ):
            found[way] = {"why": why}
            print(f"  {way:24} {why}")
            continue
        peaks = [_peak(way, shape | {"num_hidden_layers": n}, tiny) for n in layers]
        if None in peaks:
            found[way] = {"why": "out of memory"}
            print(f"  {way:24} out of memory at {layers[-1]} layers")
            continue
        if peaks[1] <= peaks[0]:
            # As on a CPU, where what was freed stays with the process.
            found[way] = {"why": f"more layers took no more memory ({peaks[0]:,} and {peaks[1]:,} bytes)"}
            print(f"  {way:24} {found[way]['why']}")
            continue
        found[way] = _fit(shape, layers, peaks)
        _say(way, layers, peaks, found[way])
    tried = None if budget.over() else _try_largest(shape, found, tiny)
    return {"ways": found, "sft": like_sft, "tried": tried, "targets": like_sft["targets"]}


def _n_tokens(tiny: bool) -> int:
    return 512 if tiny else TOKENS


def _peak(way: str, shape: dict[str, Any], tiny: bool) -> int | None:
    """Bytes; None where memory does not suffice."""
    machine.free()
    try:
        return _of_step(way, shape, tiny)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _of_step(way: str, shape: dict[str, Any], tiny: bool) -> int:
    trainer = ours.Trainer(way, shape, pairs := _pairs(shape, tiny))
    reference = np.zeros((len(pairs), 2))
    trainer.step(pairs, reference)
    machine.forget_peak()
    trainer.step(pairs, reference)
    machine.wait()
    return machine.peak()


def _pairs(shape: dict[str, Any], tiny: bool) -> list[corpus.TokenPair]:
    """As many as fill the micro-batch, and no more."""
    n, pairs = 0, []
    for pair in corpus.token_pairs(64, shape["vocab_size"], seed=4):
        n += sum(map(len, pair))
        if n > _n_tokens(tiny):
            return pairs
        pairs.append(pair)
    return pairs


def _like_sft(shape: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """On the same rows: what is above SFT's memory is what a reference costs."""
    peaks = {way: _peak(way, shape, tiny) for way in ("ours-sft", "ours", "ours-live")}
    targets = []
    if peaks["ours"] and peaks["ours-sft"]:
        targets.append(target("ours takes of SFT's memory", peaks["ours"] / peaks["ours-sft"], at_most=1.02))
    if peaks["ours-live"] and peaks["ours-sft"]:
        print(f"  with a live reference: {peaks['ours-live'] / peaks['ours-sft']:.2f}")
    return {"peak_bytes": peaks, "targets": targets}


# -- the largest model -----------------------------------------------------------------------------------------------


def _parameters(shape: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in work.model_of(shape, torch.float32).parameters())


def _fit(shape: dict[str, Any], layers: tuple[int, int], peaks: list[int]) -> dict[str, Any]:
    less, more = (_parameters(shape | {"num_hidden_layers": n}) for n in layers)
    of_layer = (peaks[1] - peaks[0]) / (layers[1] - layers[0])
    rest = peaks[0] - layers[0] * of_layer
    found = {
        "bytes_per_layer": of_layer,
        "rest_bytes": rest,
        "bytes_per_parameter": (peaks[1] - peaks[0]) / (more - less),
    }
    of_one = (more - less) / (layers[1] - layers[0])
    for size in SIZES:
        n = (size * 1e9 * (1 - LEFT_FREE) - rest) / of_layer
        found[f"largest_at_{size}_gb"] = {"layers": n, "parameters": less + (n - layers[0]) * of_one}
    return found


def _say(way: str, layers: tuple[int, int], peaks: list[int], found: dict[str, Any]) -> None:
    measured = ", ".join(f"{n} layers {peak / 2**30:.2f} GiB" for n, peak in zip(layers, peaks, strict=True))
    largest = ", ".join(
        f"{found[f'largest_at_{size}_gb']['parameters'] / 1e9:.2f} billion in {size} GB" for size in SIZES
    )
    print(f"  {way:24} {measured}; {found['bytes_per_parameter']:.1f} bytes a parameter; at most {largest}", flush=True)


def _try_largest(shape: dict[str, Any], found: dict[str, Any], tiny: bool) -> dict[str, Any] | None:
    """The largest that is said to fit here, trained."""
    if "why" in found["ours"]:
        return None
    n_layers = 5
    if ON_GPU:
        room = torch.cuda.get_device_properties(machine.DEVICE).total_memory * (1 - LEFT_FREE)
        n_layers = int((room - found["ours"]["rest_bytes"]) / found["ours"]["bytes_per_layer"])
    larger = shape | {"num_hidden_layers": n_layers}
    said = found["ours"]["rest_bytes"] + n_layers * found["ours"]["bytes_per_layer"]
    peak = _peak("ours", larger, tiny)
    n = _parameters(larger)
    outcome = "out of memory" if peak is None else f"{peak / 2**30:.2f} GiB"
    print(
        f"  tried here: {n_layers} layers, {n / 1e9:.2f} billion parameters: {outcome}, said {said / 2**30:.2f} GiB",
        flush=True,
    )
    return {"layers": n_layers, "parameters": n, "said_bytes": said, "peak_bytes": peak}
