"""doctor: what is installed, which engines and kernels would be used, and the state of an experiment, each with its remedy.

It changes nothing and loads no weights.
"""

import importlib.util
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from pipeline import identity
from pipeline.config import Config
from pipeline.errors import PrefcacheError
from pipeline.stored import artifact
from pipeline.stored.cache import Cache
from pipeline.stored.prepared import Prepared
from pipeline.training import checkpoints, runfolder
from pipeline.training.runlog import PROVENANCE

State = Literal["ok", "absent", "problem"]
_GIB = 1 << 30
_LITTLE = 2 * _GIB  # of disk, below which a checkpoint of a small model may not fit


@dataclass(frozen=True)
class Finding:
    """`absent` is what is not there and need not be."""

    area: str
    state: State
    what: str
    remedy: str | None = None


def run(config: Config | None) -> dict[str, Any]:
    """Without a config: the environment alone."""
    found = [*_packages(), *_machine(config)]
    if config is not None:
        found += [*_model(config), *_prepared(config), *_cache(config), *_runs(config)]
    return {"findings": [asdict(each) for each in found], "problems": sum(each.state == "problem" for each in found)}


# -- the environment -------------------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    """As prefcache's own metadata names them."""
    there, absent = [f"prefcache {version('prefcache')}"], {}
    for requirement in map(Requirement, distribution("prefcache").requires or []):
        extra = _extra_of(requirement)
        if extra == "test":
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            absent[requirement.name] = extra
            continue
        if found.partition("+")[0] not in requirement.specifier:
            yield Finding(
                "packages",
                "problem",
                f"{requirement.name} is {found}; {requirement.specifier} is wanted",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
        there.append(f"{requirement.name} {found}")
    yield Finding("packages", "ok", ", ".join(dict.fromkeys(there)))
    for name, extra in absent.items():
        state: State = "absent" if extra else "problem"
        remedy = f"pip install 'prefcache[{extra}]'" if extra else f"pip install {name}"
        yield Finding("packages", state, f"{name} is not installed", remedy)


def _extra_of(requirement: Requirement) -> str | None:
    """The extra that asks for it."""
    extras = distribution("prefcache").metadata.get_all("Provides-Extra") or []
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None
    return next((each for each in extras if requirement.marker.evaluate({"extra": each})), None)


def _machine(config: Config | None) -> Iterator[Finding]:
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding(
        "machine", "ok", f"{os.cpu_count()} cores, {memory / _GIB:.1f} GiB of memory, {available / _GIB:.1f} free"
    )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            yield Finding("machine", "ok", f"GPU {number}: {facts.name}, {facts.total_memory / _GIB:.0f} GiB")
        yield _kernel()
    else:
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        yield Finding(
            "machine", "absent", f"no GPU: PyTorch {torch.__version__} {built} and sees none; the CPU is used"
        )
    for place in dict.fromkeys((config.out, config.cache) if config else (".",)):
        free = shutil.disk_usage(_existing(Path(place))).free
        text = f"{free / _GIB:.1f} GiB of disk are free for {place}"
        yield (
            Finding("machine", "problem", text, "Make room, or name another place.")
            if free < _LITTLE
            else Finding("machine", "ok", text)
        )


def _kernel() -> Finding:
    """What packed rows attend with on a GPU."""
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        return Finding(
            "machine", "ok", "packed rows in half precision: varlen_attn, one call; in float32: SDPA, two calls a pair"
        )
    return Finding(
        "machine",
        "problem",
        "this PyTorch has no torch.nn.attention.varlen, which packed rows use",
        "pip install -U torch",
    )


def _existing(path: Path) -> Path:
    """It, or the nearest of its parents that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


# -- the experiment --------------------------------------------------------------------------------------------------


def _model(config: Config) -> Iterator[Finding]:
    try:
        reference = identity.find_reference(config)
    except PrefcacheError as error:
        yield Finding("reference", "problem", str(error))
        return
    adapter = f" with {reference.adapter}" if reference.adapter else ""
    limit = identity.longest_sequence(reference.folder)
    yield Finding("reference", "ok", f"{reference.folder}{adapter}, sequences of up to {limit:,} tokens")
    yield _rows(reference.folder)
    yield from _engines(config, reference)


def _rows(folder: Path) -> Finding:
    from transformers import AutoConfig

    from pipeline.model import attention

    kernel = identity.attention_kernel(folder, "sdpa")
    if reason := attention.why_not(AutoConfig.from_pretrained(folder)):
        return Finding(
            "reference", "absent", f"rows are padded, attention {kernel}: no sharing of prompts, for {reason}"
        )
    return Finding(
        "reference", "ok", "rows are shared or packed, whichever is found right on the data when a stage starts"
    )


def _engines(config: Config, reference: identity.Reference) -> Iterator[Finding]:
    from pipeline.scoring.engines import ENGINES, engine_module

    for name in ENGINES:
        used = name == config.score.engine
        if name == "server" and not used:
            continue  # there is none to ask
        try:
            numerics = engine_module(name).numerics(reference, config.score)
        except PrefcacheError as error:
            yield Finding("engines", "problem" if used else "absent", f"{name}: {error}")
            continue
        facts = ", ".join(f"{key} {value}" for key, value in numerics.items() if key != "engine")
        yield Finding("engines", "ok", f"{name}{' (this config)' if used else ''}: {facts}")


def _prepared(config: Config) -> Iterator[Finding]:
    def state() -> Finding:
        if not config.prepared.exists():
            return Finding("data", "absent", f"{config.prepared} is not there yet", "make prepare")
        manifest = Prepared(config.prepared).manifest
        rows = sum(shard["rows"] for shard in manifest["shards"])
        left_out = f", {manifest['quarantine']['rows']:,} records in quarantine"
        return Finding("data", "ok", f"{config.prepared}: {rows:,} {manifest['kind']}{left_out}")

    yield _or_problem("data", state)


def _cache(config: Config) -> Iterator[Finding]:
    def state() -> Finding:
        # Not open_scored, which takes a manifest back that a damaged shard makes wrong.
        if (manifest := artifact.read_manifest(config.scored)) is None:
            return Finding("scores", "absent", f"{config.prepared} has not been scored", "make score")
        if manifest["inputs"]["prepared"] != Prepared(config.prepared).id:
            return Finding("scores", "problem", f"{config.scored} belongs to data that has changed since", "make score")
        cache = Cache(Path(manifest["cache"]), manifest["reference"]["model_id"])
        if cache.damaged:
            some = next(iter(cache.damaged.values())).rstrip(".")
            text = f"{cache.folder}: {len(cache.damaged):,} of its shards are damaged. {some}"
            return Finding("scores", "problem", text, "make score: what is damaged is scored again")
        rows = sum(record["rows"] for record in cache.records)
        text = (
            f"{cache.folder}: {rows:,} sequences in {len(cache.records):,} shards (prefcache verify reads every byte)"
        )
        return Finding("scores", "ok", text)

    yield _or_problem("scores", state)


def _runs(config: Config) -> Iterator[Finding]:
    for record in sorted(Path(config.out).glob(f"*/{PROVENANCE}")):
        yield _or_problem("runs", partial(_run, record.parent))


def _run(run: Path) -> Finding:
    facts = artifact.unseal(run / PROVENANCE, f"Move {run} away.")
    if (manifest := artifact.read_manifest(run)) is None:
        passed_over: list[str] = []
        found = checkpoints.newest(run, passed_over.append)
        begun = f"{run}: {facts['loss']}, not finished; it goes on from step {found[1]['step'] if found else 0}"
        state: State = "problem" if passed_over else "absent"
        return Finding("runs", state, " ".join([begun, *passed_over]), _again(run))
    for file, reason, made_again in runfolder.damaged(run, manifest):
        remedy = _again(run) if made_again else f"Delete {run} and train again."
        return Finding("runs", "problem", f"{file} {reason}", remedy)
    alerts = sum(manifest["alerts"].values())
    raised = f", {alerts:,} alerts (select * from alerts)" if alerts else ""
    return Finding("runs", "ok", f"{run}: {facts['loss']}, {manifest['steps']:,} steps, finished{raised}")


def _again(run: Path) -> str:
    """By the run's own settings, which nobody has to remember."""
    # Under the name that it has now: a run that gave way to another was called otherwise when it was made.
    return shlex.join(["prefcache", "train", str(run / "config.yaml"), "--set", f"train.run={run.name}"])


def _or_problem(area: str, state: Callable[[], Finding]) -> Finding:
    try:
        return state()
    except PrefcacheError as error:
        return Finding(area, "problem", str(error))
