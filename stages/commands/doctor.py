"""doctor: what is installed, which engines and kernels would be used, and the state of an experiment, each with its remedy.

It changes nothing and loads no weights.
"""

import contextlib
import ctypes
import importlib.util
import os
import runpy
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from prefcache.command_results import DoctorResult, Finding, State, Why
from prefcache.pipeline import identity, model_files
from prefcache.pipeline.config import Config, engine_names
from prefcache.pipeline.errors import PrefcacheError
from prefcache.pipeline.preparing import prepared_inputs, record_outcomes
from prefcache.pipeline.progress import working
from prefcache.pipeline.scoring import scored_inputs
from prefcache.pipeline.scoring.engines import find_engine
from prefcache.pipeline.stored import cache_maintenance
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.freshness import Freshness, check_rows, check_scoring
from prefcache.pipeline.stored.memos import TokenizersMemo, WeightsMemo
from prefcache.pipeline.stored.mirror import open_root
from prefcache.pipeline.stored.model_ids import identify
from prefcache.pipeline.stored.prepared import Prepared, sequence_table
from prefcache.pipeline.stored.records import Provenance, RunManifest, ScoredManifest
from prefcache.pipeline.stored.scored import find_scored_cache
from prefcache.pipeline.stored.scoring_plan import plan_scoring
from prefcache.pipeline.training import checkpoints, existing_run
from prefcache.pipeline.training.run_log import PROVENANCE
from prefcache.pipeline.visible_text import count

_GIB = 1 << 30
_MIN_FREE = 2 * _GIB  # of disk; a checkpoint of a small model may not fit in less


def run(config: Config | None, why: bool = False) -> DoctorResult:
    """Examine the environment, and the config's experiment if there is one; with `why`, also what is out of date."""
    findings = [*_check_packages(), *_check_machine(config)]
    if config is not None:
        findings += _guard("reference", _check_reference(config))
        findings += _guard("data", _check_prepared(config))
        findings += _guard("scores", _check_scores(config))
        findings += _guard("training", _check_memory(config))
        for path in sorted(Path(config.out).glob(f"*/{PROVENANCE}")):
            findings += _guard("runs", _check_run(path.parent))
    with working("look for what is out of date"):
        reasons = [*_check_freshness(config)] if config is not None and why else None
    return DoctorResult(findings, sum(finding.state == "problem" for finding in findings), reasons)


def _guard(area: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings; an error that ends them is a problem of its area."""
    with working(f"look at the {area}"):
        try:
            yield from findings
        except PrefcacheError as error:
            yield Finding(area, "problem", str(error))


# -- the environment -------------------------------------------------------------------------------------------------


def _check_packages() -> Iterator[Finding]:
    """Compare what is installed with prefcache's own metadata."""
    extras = distribution("prefcache").metadata.get_all("Provides-Extra") or []
    installed = [f"prefcache {version('prefcache')}"]
    missing: dict[str, str | None] = {}
    for requirement in map(Requirement, distribution("prefcache").requires or []):
        marker = requirement.marker
        extra = None
        if marker is not None and not marker.evaluate({"extra": ""}):
            extra = next((name for name in extras if marker.evaluate({"extra": name})), None)
        if extra == "test":
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            missing[requirement.name] = extra
            continue
        if found.partition("+")[0] not in requirement.specifier:
            what = f"{requirement.name} is {found}; {requirement.specifier} is required"
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding("packages", "problem", what, remedy)
        installed.append(f"{requirement.name} {found}")
    yield Finding("packages", "ok", ", ".join(dict.fromkeys(installed)))
    for name, extra in missing.items():
        package = f"'prefcache[{extra}]'" if extra else name
        state: State = "absent" if extra else "problem"
        yield Finding("packages", state, f"{name} is not installed", f"pip install {package}")


def _check_machine(config: Config | None) -> Iterator[Finding]:
    total, free = (
        os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") / _GIB for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    )
    yield Finding("machine", "ok", f"{os.cpu_count()} cores, {total:.1f} GiB of memory, {free:.1f} free")
    yield from _check_gpus()
    for place in dict.fromkeys((config.out, str(config.cache_folder)) if config else (".",)):
        path = Path(place)
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        n_bytes = shutil.disk_usage(existing).free
        what = f"{n_bytes / _GIB:.1f} GiB of disk are free for {place}"
        if n_bytes < _MIN_FREE:
            yield Finding("machine", "problem", what, "Free some, or name another place.")
        else:
            yield Finding("machine", "ok", what)


def _check_gpus() -> Iterator[Finding]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return  # a missing package, which is reported
    # What PyTorch was built for. Importing it takes seconds.
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if not _may_see_gpu(build) or not _sees_gpu():
        built = f"built for CUDA {build['cuda']}" if build["cuda"] else "built without CUDA"
        what = f"no GPU: PyTorch {build['__version__']}, {built}, sees none; the CPU is used"
        yield Finding("machine", "absent", what)
        return
    import torch

    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield Finding("machine", "ok", f"GPU {number}: {gpu.name}, {gpu.total_memory / _GIB:.0f} GiB")
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        what = "packed rows in half precision: varlen_attn, one call; in float32: SDPA, two calls per pair"
        yield Finding("machine", "ok", what)
    else:
        what = "this PyTorch has no torch.nn.attention.varlen, which packed rows use"
        yield Finding("machine", "problem", what, "pip install -U torch")


def _may_see_gpu(build: Mapping[str, Any]) -> bool:
    """Return whether PyTorch may see a GPU: a build for CUDA needs the driver's library."""
    if build["cuda"]:
        with contextlib.suppress(OSError):
            ctypes.CDLL("libcuda.so.1")
            return True
    return build.get("hip") is not None


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# -- the experiment --------------------------------------------------------------------------------------------------


def _check_reference(config: Config) -> Iterator[Finding]:
    from prefcache.pipeline.model.weights import check_tensors

    reference = identity.find_reference(config)
    adapter = f" with {reference.adapter}" if reference.adapter else ""
    limit = model_files.longest_sequence(reference.folder)
    yield Finding("reference", "ok", f"{reference.folder}{adapter}, sequences of up to {limit:,} tokens")
    yield _check_layout(reference.folder)
    try:
        if reference.unconverted is not None:
            what = f"{reference.unconverted} is not converted yet: its weights are written as safetensors into {config.cache}"
            yield Finding("reference", "absent", what, "prefcache prepare CONFIG")
        elif reason := check_tensors(reference):
            yield Finding("reference", "absent", reason)
    except PrefcacheError as error:
        yield Finding("reference", "problem", str(error))
    yield from _check_engines(config, reference)


def _check_layout(folder: Path) -> Finding:
    from transformers import AutoConfig

    from prefcache.pipeline.model import attention

    kernel = attention.choose_kernel(folder, "sdpa")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Transformers raises many types for a config that does not fit its model
        text = " ".join(str(error).split())[:300]
        return Finding("reference", "problem", f"{folder}: Transformers accepts no model with this config ({text})")
    if reason := attention.unsupported_reason(config):
        what = f"rows are padded, attention {kernel}: prompts are not shared, because {reason}"
        return Finding("reference", "absent", what)
    what = "rows are shared or packed, whichever is exact on the data when a stage starts"
    return Finding("reference", "ok", what)


def _check_engines(config: Config, reference: identity.Reference) -> Iterator[Finding]:
    for name in engine_names():
        spec, is_used = find_engine(name), name == config.score.engine
        if spec.is_remote and not is_used:
            continue
        try:
            numerics, python = spec.numerics(reference, config.score), spec.interpreter(config.score)
        except PrefcacheError as error:
            yield Finding("engines", "problem" if is_used else "absent", f"{name}: {error}")
            continue
        facts = ", ".join(f"{key} {value}" for key, value in numerics.items() if key != "engine")
        where = f"{python.path} ({python.reason})" if python.path else python.reason
        yield Finding("engines", "ok", f"{name}{' (this config)' if is_used else ''}: {facts}; runs in {where}")


def _check_prepared(config: Config) -> Iterator[Finding]:
    # Memos only save time: without a valid one a stage takes longer and computes the same.
    if reason := TokenizersMemo.damage(TokenizersMemo.path(Path(config.out))):
        yield Finding("data", "problem", reason, "prefcache prepare CONFIG rebuilds it")
    if not config.prepared.exists():
        yield Finding("data", "absent", f"{config.prepared} does not exist yet", "prefcache prepare CONFIG")
        return
    prepared = Prepared(config.prepared)
    prepared.quarantine()
    manifest = prepared.manifest
    rows = sum(shard.rows for shard in manifest.shards)
    n_pictures = sum(entry.rows for entry in manifest.images)
    pictures = f" with {count(n_pictures, 'picture')}" if n_pictures else ""
    what = f"{config.prepared}: {rows:,} {manifest.kind}{pictures}, {manifest.quarantine.rows:,} records in quarantine"
    yield Finding("data", "ok", what)


def _check_scores(config: Config) -> Iterator[Finding]:
    if reason := WeightsMemo.damage(WeightsMemo.path(config.cache_folder)):
        yield Finding("scores", "problem", reason, "prefcache score CONFIG rebuilds it")
    if (manifest := ScoredManifest.find(config.scored)) is None:
        yield Finding("scores", "absent", f"{config.prepared} has not been scored", "prefcache score CONFIG")
        return
    if manifest.inputs.prepared != Prepared(config.prepared).id:
        what = f"{config.scored} belongs to data that has changed since"
        yield Finding("scores", "problem", what, "prefcache score CONFIG")
        return
    folder = find_scored_cache(config.scored, manifest)
    cache = Cache(folder, manifest.reference.model_id, remember="nothing", allowed_signers=config.signers_file)
    remedy = "prefcache score CONFIG scores again what these shards held"
    if cache.damaged:
        reason = next(iter(cache.damaged.values())).rstrip(".")
        verb = "is" if len(cache.damaged) == 1 else "are"
        what = f"{cache.place}: {len(cache.damaged):,} of its shards {verb} damaged. {reason}"
        yield Finding("scores", "problem", what, remedy)
        return
    cache.refuse_damage()
    if contradictions := cache_maintenance.find_contradictions(cache):
        what = f"{next(iter(contradictions.values()))}. Neither is served"
        yield Finding("scores", "problem", what, remedy)
        return
    for reason in list(cache.unsigned.values())[:1]:
        what = f"{count(len(cache.unsigned), 'shard')} of {cache.place} not used, because {reason}"
        yield Finding("scores", "absent", what, f"prefcache sign {cache.place} --key KEY, by somebody whom you trust")
    rows, n_shards = sum(record.rows for record in cache.records), len(cache.records)
    what = f"{cache.place}: {rows:,} sequences in {count(n_shards, 'shard')} (prefcache verify reads every byte)"
    yield Finding("scores", "ok", what)


def _check_memory(config: Config) -> Iterator[Finding]:
    """Say what a training step takes on a GPU; a problem only if a GPU is here that has no room for the longest example."""
    if not config.prepared.exists():
        return
    from prefcache.pipeline.training import run_estimate
    from prefcache.pipeline.training.step_estimate import UntraceableError

    try:
        found = run_estimate.RunEstimate(config, None, processes=1)
    except UntraceableError as error:
        yield Finding("training", "absent", str(error))
        return
    step, command = found.step, "prefcache train CONFIG --dry-run says what fits, and what would make it fit"
    what = (
        f"a step with {step.tokens:,} tokens a micro-batch takes {step.peak_bytes / _GIB:.1f} GiB of a GPU, by a trace"
    )
    here = run_estimate.find_gpus_here()
    if here and (fitting := min(found.tokens_that_fit(gpu.total_memory) for gpu in here)) < found.plan.longest:
        what += f"; here {fitting:,} tokens fit, and the longest example has {found.plan.longest:,}"
        yield Finding("training", "problem", what, command)
    else:
        yield Finding("training", "ok", what, command)


def _check_run(folder: Path) -> Iterator[Finding]:
    provenance = Provenance.read(folder / PROVENANCE, f"Move {folder} away.")
    resume = existing_run.resume_command(folder)
    if (manifest := RunManifest.find(folder)) is None:
        skipped: list[str] = []
        checkpoint = checkpoints.find_newest(folder, skipped.append)
        step = checkpoint[1].step if checkpoint else 0
        what = " ".join([f"{folder}: {provenance.loss}, not finished; it resumes at step {step}", *skipped])
        yield Finding("runs", "problem" if skipped else "absent", what, resume)
        return
    for file, reason, is_recoverable in existing_run.damaged_files(folder, manifest):
        is_remade = is_recoverable and existing_run.has_checkpoint(folder)
        remedy = resume if is_remade else existing_run.remedy(folder, is_recoverable=is_recoverable)
        yield Finding("runs", "problem", f"{file} {reason}", remedy)
        return
    n_alerts = sum(manifest.alerts.values())
    alerts = f", {count(n_alerts, 'alert')} (select * from alerts)" if n_alerts else ""
    yield Finding("runs", "ok", f"{folder}: {provenance.loss}, {manifest.steps:,} steps, finished{alerts}")


# -- up to date ------------------------------------------------------------------------------------------------------


def _check_freshness(config: Config) -> Iterator[Why]:
    """Ask each stage's question, whether there is anything to do, without doing it."""
    from prefcache.pipeline.training import run_inputs

    for what, check in (
        ("preparation", partial(_check_preparation, config)),
        ("scoring", partial(_check_scoring, config)),
        ("rows", partial(_check_rows, config)),
        ("run", partial(run_inputs.check_freshness, config)),
    ):
        try:
            freshness = check()
        except PrefcacheError as error:
            yield Why(what, False, str(error))
        else:
            yield Why(what, freshness.is_fresh, freshness.explain(), freshness.differences)


def _check_preparation(config: Config) -> Freshness:
    model = identity.find_reference(config).tokenizer
    sources = [record_outcomes.reopen_source(entry, Path(config.out)) for entry in config.prepare.sources]
    inputs = prepared_inputs.find_inputs(config.prepare, model, sources)
    return prepared_inputs.check_freshness(config, model, inputs, remember=False)


def _check_scoring(config: Config) -> Freshness:
    reference, cache = _preview_cache(config)
    inputs = scored_inputs.find_inputs(config, Prepared(config.prepared), reference, cache.reference.model_id)
    return check_scoring(config.scored, inputs, cache)


def _check_rows(config: Config) -> Freshness:
    reference, cache = _preview_cache(config)
    numerics = find_engine(config.score.engine).numerics(reference, config.score)
    accepted = [identity.numerics_id(numerics), *config.score.accept_numerics]
    sequences = sequence_table(Prepared(config.prepared).table())
    return check_rows(cache, plan_scoring(cache, sequences, accepted, config.score.tokens_per_shard), numerics)


def _preview_cache(config: Config) -> tuple[identity.Reference, Cache]:
    reference = identity.find_reference(config)
    root = open_root(config.cache)
    described = identify(reference, root, remember=False)
    return reference, Cache.preview(root, config.model, described, config.signers_file)
