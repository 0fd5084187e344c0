"""What a run is made from, found and checked before any model is loaded: data, scores, settings, and where the policy starts.

`RunSetup.inputs` identify the run: where they are the same, the run is the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefcache.pipeline import identity
from prefcache.pipeline.config import Config, Train
from prefcache.pipeline.errors import IdentityError, UsageError
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.freshness import Freshness
from prefcache.pipeline.stored.model_ids import identify, identify_tower, is_same_model
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import Provenance, RunInputs, ScoredManifest, TrainSettings
from prefcache.pipeline.stored.scored import open_scored, refuse_other_cache, refuse_other_reference, retract_if_damaged
from prefcache.pipeline.training import existing_run, loss_columns, sample_answers
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.run_log import PROVENANCE
from prefcache.pipeline.training.selection import Selection

# Keys that change neither the order of the data nor, but for rounding, the outcome of a step.
_HARMLESS = {
    "run",
    "tokens_per_micro_batch",
    "rows",
    "checkpoint_every",
    "keep_checkpoints",
    "checkpoints_at_end",
    "eval_every",
    "alerts",
    "report_to",
    "kinds",
    "device",
    "shard",
    "gradient_checkpointing",
    "fuse_kernels",
    "compile",
    "release_gradients",
    "offload",
}


@dataclass(frozen=True)
class RunSetup:
    config: Config
    objective: Objective
    prepared: Prepared
    selection: Selection
    scored: ScoredManifest | None  # None, as is the cache, if neither loss nor selection reads the reference
    cache: Cache | None
    start: identity.Reference  # where the policy starts
    inputs: RunInputs


def collect(config: Config) -> RunSetup:
    objective, prepared = Objective(config.train), Prepared(config.prepared)
    loss_columns.refuse_missing(objective, prepared)
    selection = Selection(config.train, prepared.kind)
    reads_reference = objective.reference_answers or selection.reference_answers
    scored, cache = _open_scores(config, prepared, objective, selection) if reads_reference else (None, None)
    start = find_start(config)
    inputs = _identify_run(config, objective, prepared, selection, scored, start, remember=True)
    return RunSetup(config, objective, prepared, selection, scored, cache, start, inputs)


def check_freshness(config: Config) -> Freshness:
    """Compare the run with what its data, scores and settings give now. Changes nothing."""
    objective, prepared = Objective(config.train), Prepared(config.prepared)
    selection = Selection(config.train, prepared.kind)
    reads_reference = objective.reference_answers or selection.reference_answers
    scored = ScoredManifest.find(config.scored) if reads_reference else None
    if reads_reference and scored is None:
        raise UsageError(f"{config.prepared} has not been scored: {config.scored} does not exist.")
    start = find_start(config)
    inputs = _identify_run(config, objective, prepared, selection, scored, start, remember=False)
    return existing_run.check(config.run, inputs)


def _identify_run(
    config: Config,
    objective: Objective,
    prepared: Prepared,
    selection: Selection,
    scored: ScoredManifest | None,
    start: identity.Reference,
    *,
    remember: bool,
) -> RunInputs:
    own_prompts = config.train.samples_from
    excluded = _excluded_keys(config.train, has_images=bool(prepared.manifest.images))
    settings = config.train.model_dump(mode="json", exclude=excluded) | selection.identity
    if own_prompts:
        settings["samples_from"] = sample_answers.file_id(own_prompts)  # its content, not its path
    more: dict[str, Any] = {
        # As computed: naming a default does not make another run.
        "loss": objective.loss_arguments,
        "rewards": {"beta": objective.beta, "per_token": objective.per_token},
    }
    if prepared.manifest.images:
        tower = identify_tower(start, config.cache_folder, remember=remember)["tower_id"]
        more["vision"] = {"tower": tower, "processor": prepared.manifest.inputs.processor_id}
    inputs = RunInputs(
        prepared=prepared.id,
        reference=scored.reference.model_id if scored else None,
        numerics=scored.accepted_numerics if scored else None,
        policy=identify(start, config.cache_folder, remember=remember)["model_id"],
        train=TrainSettings(**settings),
        **more,
    )
    _refuse_unmixable_start(config.train, inputs.policy, inputs.reference)
    return _keep_older_ids(config, inputs, start, remember=remember)


def _open_scores(
    config: Config, prepared: Prepared, objective: Objective, selection: Selection
) -> tuple[ScoredManifest, Cache]:
    with retract_if_damaged(config.scored):
        opened = open_scored(config.scored, every_byte=False, remember="all", allowed_signers=config.signers_file)
    if opened is None:
        reader = ""
        if not objective.reference_answers:
            key, column = next(iter(selection.readers.items()))
            reader = f"{key} reads {column}, which scoring gives: "
        raise UsageError(
            f"{reader}{config.prepared} has not been scored: {config.scored} does not exist. Score first (prefcache score CONFIG)."
        )
    scored, cache = opened
    if scored.inputs.prepared != prepared.id:
        raise IdentityError(
            f"{config.scored} belongs to other data than {config.prepared} holds now. Score it (prefcache score CONFIG)."
        )
    if config.train.model is None or Path(config.model).exists():
        refuse_other_reference(config, scored, remember=True)
    refuse_other_cache(config, scored, cache)
    return scored, cache


def find_start(config: Config, *, weights: bool = True) -> identity.Reference:
    """Find what the policy starts from; an adapter or quantized weights only if an adapter is trained."""
    start = identity.find_start(config, weights=weights)
    problem = "an adapter" if start.adapter else start.quantization and "quantized weights"
    if problem and config.train.lora is None:
        raise UsageError(
            f"The policy would start from {start.adapter or start.folder}, which has {problem}; training all weights starts from "
            "a whole model. Train an adapter (train.lora={}: an existing one is trained further), name a whole model "
            "(train.model), or merge the adapter (prefcache merge) and set model to the result."
        )
    return start


def _excluded_keys(train: Train, *, has_images: bool) -> dict[str, Any]:
    """Keys of train that do not identify a run, or that `inputs` holds elsewhere.

    The size of micro-batches matters where statistics are taken over them, and the times of evaluations where they choose the best
    checkpoint or a moving reference scores what they will read. Earlier versions, which had float32 weights and no adapters of
    experts, did not record that. Epochs mean nothing where max_steps replaces them.
    """
    harmless = _HARMLESS | {"loss", "loss_args", "beta"}
    harmless |= {"micro_batch_size"} if train.scope == "batch" else set()
    harmless |= {"weights"} if train.weights == "float32" else set()
    harmless |= {"epochs"} if train.max_steps else set()
    harmless |= set() if has_images else {"vision"}
    harmless -= {"eval_every"} if train.best or train.moving_reference else set()
    adapts_layers_only = train.lora and not train.lora.target_parameters
    return dict.fromkeys(harmless, True) | ({"lora": {"target_parameters"}} if adapts_layers_only else {})


def _refuse_unmixable_start(train: Train, policy: str, reference: str | None) -> None:
    """The first mixture needs the reference's weights, and training only has those that the policy starts from."""
    if train.moving_reference and train.moving_reference.alpha < 1 and policy != reference:
        raise UsageError(
            f"train.moving_reference.alpha={train.moving_reference.alpha:g} mixes the policy's weights with the reference's, and the "
            "policy starts from others, while training loads no reference. Set alpha to 1, or let the policy start from the "
            "reference (leave train.model out)."
        )


def _keep_older_ids(config: Config, inputs: RunInputs, start: identity.Reference, *, remember: bool) -> RunInputs:
    """Name models as a run of an earlier version, which identified whole files, has recorded these same models."""
    record = config.run / PROVENANCE
    if not record.exists():
        return inputs
    recorded = Provenance.read(record, f"Move {config.run} away, or name another run.").inputs
    models = {"policy": start}
    if inputs.reference and (config.train.model is None or Path(config.model).exists()):
        models["reference"] = identity.find_reference(config)
    older = {
        name: older_id
        for name, model in models.items()
        if (older_id := getattr(recorded, name))
        and older_id != getattr(inputs, name)
        and is_same_model(older_id, model, config.cache_folder, remember=remember)
    }
    return inputs.model_copy(update=older)
