"""What was wanted of a step, and what the ledger has: bytes, arithmetic, kernels, bounds of time on an H100."""

from typing import Any, NamedTuple

GIB = 2**30
CARD_80_GB = 80e9 / GIB
Rows = list[dict[str, Any]]


class Target(NamedTuple):
    name: str
    value: float
    wanted: float
    at_most: bool

    @property
    def is_met(self) -> bool:
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def __str__(self) -> str:
        bound = f"{'at most' if self.at_most else 'at least'} {self.wanted:g}"
        return f"  {self.name:75} {self.value:9.4g}  {'' if self.is_met else 'MISSED: '}{bound}"


def list_targets(rows: Rows) -> list[Target]:
    """The targets of which the ledger has all rows."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = _memory_targets(rows)
    for model in models:
        found += _sft_targets([row for row in rows if row["model"] == model])
        found += _speed_targets([row for row in rows if row["model"] == model])
    return found


def _memory_targets(rows: Rows) -> list[Target]:
    wanted = {
        "8B bf16 AdamW, GiB": (62, {"model": "8B", "optimizer": "adamw", "lora": None, "checkpointing": True}),
        "8B 8-bit moments, GiB": (48, {"model": "8B", "optimizer": "adamw_8bit", "release_gradients": False}),
        "8B 8-bit moments, released gradients, GiB": (34, {"model": "8B", "release_gradients": True}),
        "8B LoRA r=16, GiB": (18, {"model": "8B", "lora": 16}),
        "70B over 8, an 80 GB card in GiB": (CARD_80_GB, {"model": "70B", "processes": 8, "release_gradients": False}),
        "70B over 8, released gradients, GiB": (
            CARD_80_GB,
            {"model": "70B", "processes": 8, "release_gradients": True},
        ),
    }
    targets = []
    for name, (most, settings) in wanted.items():
        settings |= {"trainer": "prefcache", "reference": "cached", "weights": "bfloat16"}
        targets += [Target(name, row["peak_bytes"] / GIB, most, at_most=True) for row in _select(rows, **settings)]
    return targets


def _sft_targets(rows: Rows) -> list[Target]:
    """Compared with supervised fine-tuning by the same means, row by row, and with Transformers' own."""
    targets = []
    names = ("weights", "optimizer", "lora", "release_gradients", "checkpointing", "processes")
    for ours in _select(rows, trainer="prefcache", reference="cached"):
        same = {name: ours[name] for name in names}
        label = f"{ours['model']} {ours['weights']} {ours['optimizer']}" + (" lora" if ours["lora"] else "")
        label += " released" if ours["release_gradients"] else ""
        label += f" /{ours['processes']}" if ours["processes"] > 1 else ""
        for sft in _select(rows, trainer="sft", **same):
            targets.append(
                Target(f"{label}: bytes of SFT's", ours["peak_bytes"] / sft["peak_bytes"], 1.02, at_most=True)
            )
            targets.append(Target(f"{label}: kernels of SFT's", ours["kernels"] / sft["kernels"], 1.15, at_most=True))
        for sft in _select(rows, trainer="plain-sft", **same):
            ratio = ours["kernels"] / sft["kernels"]
            targets.append(Target(f"{label}: kernels of Transformers' SFT", ratio, 1.15, at_most=True))
        share = ours["flops"]["float32"] / sum(ours["flops"].values())
        targets.append(Target(f"{label}: share of float32 arithmetic", share, 1e-3, at_most=True))
    return targets


def _speed_targets(rows: Rows) -> list[Target]:
    """The larger of both bounds, each trainer at its fastest."""
    targets = []
    ours = _select(rows, trainer="prefcache", reference="cached", weights="bfloat16", lora=None, processes=1)
    if not ours:
        return []
    fastest = min(ours, key=step_ms)
    wanted = {"8B": 0.45, "0.5B": 0.40}.get(fastest["model"])
    if wanted:
        targets.append(
            Target(f"{fastest['model']}: MFU by the roofline", fastest["mfu"]["H100"], wanted, at_most=False)
        )
    for reference, times in (("live", 2.5), ("precomputed", 1.8)):
        theirs = _select(rows, trainer="trl", reference=reference, lora=None)
        if theirs:
            ratio = min(map(step_ms, theirs)) / step_ms(fastest)
            targets.append(Target(f"{fastest['model']}: times TRL {reference}", ratio, times, at_most=False))
    return targets


def step_ms(row: dict[str, Any]) -> float:
    return float(max(row["roofline_ms"]["H100"], row["launch_ms"]))


def _select(rows: Rows, **settings: Any) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in settings.items())]
