"""The configuration: one YAML file, one section per stage.

Frozen, unknown keys refused. The command line overrides any key with `--set train.beta=0.2`.
Relative paths are relative to where the command is run. Where to look next: data/demo/config.yaml.
"""

import datetime
import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UsageError


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class Source(Section):
    """Where records come from. A plain string in `data` is a path, or a hub id where no such path exists."""

    path: str | None = None
    """A file, a folder, a glob pattern, or - for standard input. Or what `load_from_disk` of datasets reads."""
    hub: str | None = None
    """A data set of the hub, by id."""
    name: str | None = None
    """Its subset, where it has several."""
    split: str = "train"
    """Its split; of a `load_from_disk` folder with several splits as well."""
    revision: str | None = None
    """Its branch, tag or commit. A commit never changes under you."""
    format: str | None = None
    """This source's own format. Unless said, prepare.format."""
    format_args: dict[str, Any] = {}
    """Options of the format, over prepare.format_args."""
    columns: dict[str, str] = {}
    """Renamed columns, over prepare.columns."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share of its examples used, chosen by a hash. Above 1, training examples are repeated (2.5: twice, half of them thrice)."""

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either a path or a hub id")
        return self


def _as_sources(value: Any) -> Any:
    # YAML reads a lone - as a list of nothing; here it is standard input.
    entries = ["-"] if value == [None] else value if isinstance(value, list | tuple) else [value]
    return [{"path": str(entry)} if isinstance(entry, str | int | float) else entry for entry in entries]


class Prepare(Section):
    data: Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]
    """Where the records are: a path, or a list of paths and of sources with keys of their own."""
    format: str = "auto"
    """How a record is read: a name that `prefcache formats` lists. auto: recognised from the columns."""
    format_args: dict[str, Any] = {}
    """Options of the format."""
    columns: dict[str, str] = {}
    """Renamed columns, as the format names them: as the data names them."""
    examples: Literal["auto", "pairs", "labels"] = "auto"
    """pairs of answers, or one answer with a label. labels: pairs are taken apart. auto: as the data has it."""
    pairing: Literal["best_worst", "best_rest", "adjacent", "all"] = "best_worst"
    """Which pairs are made of a ranking of several answers."""
    kl_pairs: bool = True
    """Beside each label, its prompt with another example's answer: what KTO's estimate of the divergence reads."""
    template: Literal["chat", "none"] = "chat"
    """chat: the tokenizer's chat template (a string is one turn). none: plain text, with the end token after answers."""
    chat_template: str | None = None
    """A Jinja file that takes the place of the tokenizer's own template."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """What a template that prints today's date prints, whatever the day."""
    max_length: Count = 2048
    """Most tokens of prompt and answer together."""
    max_prompt_length: Count | None = None
    """Most tokens of the prompt."""
    too_long: Literal["drop", "keep_start", "keep_end"] = "drop"
    """drop: to quarantine. keep_start: the answers' ends are cut. keep_end: the prompt's oldest turns are cut."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What is done with an example whose tokens are those of an earlier one."""
    ties: Literal["quarantine", "keep"] = "quarantine"
    """What is done with ties and with identical answers. keep: the one named first counts as chosen."""
    held_out: Fraction = 0.05
    """Share of prompts kept for evaluation, chosen by a hash of the prompt."""
    seed: int = 0
    """Of what kl_pairs and weights choose."""
    max_quarantine: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of unusable records before the stage refuses to go on."""
    rows_per_shard: Count = 50_000
    """Examples in one Arrow file."""
    workers: Count | None = None
    """Processes that prepare at once. Unless said, one per core. Never changes the result."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The entries of `data`, each with what it does not say itself."""
        return tuple(
            entry.model_copy(
                update={
                    "format": entry.format or self.format,
                    "format_args": self.format_args | entry.format_args,
                    "columns": self.columns | entry.columns,
                }
            )
            for entry in self.data
        )


class Vllm(Section):
    python: str = ".venv-vllm/bin/python"
    """The Python of the environment that vLLM lives in; `make vllm` builds one."""
    prefix_caching: bool = False
    """Compute a prompt once for all of its answers. Each answer that this could have spoilt is asked for again."""
    options: dict[str, Any] = {}
    """Further arguments of vllm.LLM, such as tensor_parallel_size or gpu_memory_utilization."""


class Server(Section):
    url: str | None = None
    """Where an OpenAI-compatible completions server answers, such as http://localhost:8000/v1."""
    model: str | None = None
    """The name under which it serves the reference. Unless said, the only one that it serves."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the server's key, where it wants one."""
    concurrency: Count = 32
    """Requests that are under way at once."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that a request may take."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Times that a request is tried again, after longer and longer pauses."""


class Ray(Section):
    actors: Count
    """Actors that score at once, each with a reference of its own."""
    address: str | None = None
    """Of a cluster that runs, such as 10.0.0.5:6379, or auto for the one that this machine is part of. Unless said, RAY_ADDRESS; without that, a Ray on this machine for as long as it is needed."""
    cpus: Count = 1
    """Cores that an actor takes, and threads that it computes with unless OMP_NUM_THREADS says otherwise."""
    gpus: Annotated[float, Field(gt=0)] | None = None
    """GPUs that an actor takes; 0.5 puts two on one. Unless said, 1 where this machine would score on a GPU, else none."""
    options: dict[str, Any] = {}
    """Further options of an actor, as Ray names them, such as memory (bytes) or resources."""


class Score(Section):
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """What computes the reference's log-probs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the reference's weights. auto: as saved on a GPU, float32 on a CPU. Log-probs are always float32."""
    quantization: Literal["4bit", "8bit"] | None = None
    """The reference's weights are quantised when they are loaded (bitsandbytes). It counts as another reference."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention kernel."""
    rows: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How sequences share a forward pass: shared: no padding, and a prompt once for all of its answers. packed: no padding. padded: neither. auto: the first of these that is right for the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    tokens_per_batch: Count | None = None
    """Most tokens of one forward pass. Unless said, 16,384 on a GPU and 2,048 on a CPU. Halved where memory does not suffice."""
    tokens_per_shard: Count = 250_000
    """Tokens behind one file of the cache, which is what an interruption can lose."""
    logps: bool = True
    """Keep every token's log-prob beside the sum."""
    parity_sample: Annotated[int, Field(ge=0)] = 32
    """Sequences whose log-probs are compared with a plain one-by-one float32 forward. 0: none."""
    accept_numerics: Strings = ()
    """Ids of other engines, versions or dtypes whose cached rows may be used beside this one's."""
    rescore: bool = False
    """Score again what the cache has from another engine, version or dtype."""
    vllm: Vllm = Vllm()
    server: Server = Server()
    ray: Ray | None = None
    """Actors of Ray score, on as many machines as its cluster has. They change no value."""


class Kinds(Section):
    """Patterns that an answer matches from end to end; an answer that matches neither is counted as neither."""

    preferred: str
    rejected: str

    @model_validator(mode="after")
    def _patterns_compile(self) -> "Kinds":
        for pattern in (self.preferred, self.rejected):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return self


class Tokens(Section):
    """How the log-probs of an answer's tokens become one number. Unless said, they are added up."""

    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens beyond the length of the pair's shorter answer (LD-DPO)."""
    ld_alpha_of: Literal["both", "policy"] = "both"
    """policy: the reference's tokens beyond it keep their weight, as some implementations have it."""
    sampo: bool = False
    """Of the longer answer only as many random tokens as the shorter one has (SamPO)."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each token's weight is so much of the one before it: earlier tokens count more (temporal decay)."""
    clamp: tuple[float, float] | None = None
    """Lowest and highest log-ratio to the reference that a token may count with, such as [-1.5, 1.5] (Humanline)."""

    @model_validator(mode="after")
    def _combine(self) -> "Tokens":
        # Where policy and reference agree the ratio is 0: limits beyond it would let nothing be learned from the start.
        if self.clamp is not None and not (self.clamp[0] <= 0 <= self.clamp[1] and self.clamp[0] < self.clamp[1]):
            raise ValueError(
                f"clamp: found {list(self.clamp)}, expected a lower and an upper limit with 0 between them"
            )
        if self.ld_alpha_of == "policy" and self.ld_alpha is None:
            raise ValueError("ld_alpha_of says whose tokens ld_alpha weighs, and there is no ld_alpha; say it too")
        if self.sampo and self.ld_alpha is not None:
            raise ValueError("sampo and ld_alpha both deal with the longer answer's tokens; take one of them")
        return self

    @property
    def weighs(self) -> bool:
        """Whether anything but plain sums is asked for."""
        return self.of_reference or self.ld_alpha is not None

    @property
    def of_reference(self) -> bool:
        """Whether the reference's single tokens are needed for it."""
        on_both = self.ld_alpha is not None and self.ld_alpha_of == "both"
        return on_both or self.sampo or self.decay is not None or self.clamp is not None


def _as_weights(value: Any) -> Any:
    """A list of names has weights of 1. What is neither a name nor a mapping of names to numbers is refused."""
    if isinstance(value, list):
        if twice := next((name for name in value if value.count(name) > 1), None):
            raise ValueError(f"names {twice} twice; say its weight, as in {{{twice}: 2}}")
        value = {str(name): 1.0 for name in value} if all(isinstance(name, str | int) for name in value) else None
    if isinstance(value, dict):
        return {str(name): _weight(str(name), weight) for name, weight in value.items()} or _expected_losses(value)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else _expected_losses(value)


def _weight(name: str, weight: Any) -> float:
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)  # YAML 1.1 reads 1e-1 as text
    except (TypeError, ValueError):
        number = math.nan
    if weight is None and ":" in name:
        raise ValueError(f"found {name}; YAML wants a space after the colon, as in {{sigmoid: 0.8, sft: 0.2}}")
    if not 0 <= number < math.inf:
        raise ValueError(f"the weight of {name} is {weight!r}; expected a number that is not negative")
    return number


def _expected_losses(value: Any) -> NoReturn:
    raise ValueError("expected the name of a loss, a list of names, or names with their weights")


def _as_budget(value: Any) -> Any:
    if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("expected a number of tokens of at least 1, or auto")


def _as_word(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads off as false


def _as_arguments(value: Any) -> Any:
    """`{loss: {key: value}}`, which is what --set train.loss_args.loss.key=value makes, as `{loss.key: value}`."""
    if not isinstance(value, dict):
        return value
    flat: dict[Any, Any] = {}
    for key, entry in value.items():
        flat |= {f"{key}.{name}": each for name, each in entry.items()} if isinstance(entry, dict) else {key: entry}
    for key, entry in flat.items():
        if not isinstance(entry, bool | int | float | str):
            raise ValueError(f"{key}: expected a number, a word, true or false; found {entry!r}")
    return flat


def _as_expression(value: Any) -> Any:
    # YAML reads a condition that is only true as a truth value.
    value = str(value).lower() if isinstance(value, bool) else value
    if isinstance(value, str) and not value.strip():
        raise ValueError("expected a SQL expression; leave the key out where there is none")
    return value


Expression = Annotated[str, BeforeValidator(_as_expression)]


class Lora(Section):
    """An adapter is trained, and the model's own weights stay as they are. Where the policy starts from a model that has an
    adapter already, that one is trained further, in its own shape."""

    r: Count = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """What the adapter adds is multiplied by alpha / r."""
    target_modules: Strings = ("all-linear",)
    """Names of the layers that get one, such as q_proj. all-linear: every linear layer but the head."""
    dora: bool = False
    """Direction and length of a weight's columns are learned apart (DoRA)."""
    rslora: bool = False
    """Multiply by alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """Of the adapter's input. Only 0 is taken, with the reason."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's own weights, which are not trained. The adapter is float32 always."""

    @model_validator(mode="after")
    def _no_dropout(self) -> "Lora":
        if self.dropout:
            raise ValueError(
                "dropout is not done: the policy would differ from its reference before it learnt anything, and micro-batches "
                "would change a step's result. Leave it out"
            )
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """What is said of an adapter that is yet to be made, by key of this section."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set - {"dropout", "base_dtype"})}


def _of_evaluation(name: Any) -> Any:
    return f"eval_{name}" if isinstance(name, str) and not name.startswith("eval_") else name


class Best(Section):
    """A metric alone has it as `metric`."""

    metric: Annotated[str, BeforeValidator(_of_evaluation)]
    """Of the evaluations of the held-out examples, such as eval_loss or eval_rewards/accuracies. eval_ may be left out."""
    greater_is_better: bool | None = None
    """Unless said, false for losses and true for all others."""
    patience: Count | None = None
    """Evaluations in a row without a better one after which training ends. Unless said, it goes on to its last step."""

    @property
    def is_greater_better(self) -> bool:
        is_loss = self.metric == "eval_loss" or self.metric.startswith("eval_loss/")
        return not is_loss if self.greater_is_better is None else self.greater_is_better


def _as_best(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


class MovingReference(Section):
    """The reference follows the policy in leaps (TR-DPO); {} takes the paper's."""

    every: Count = 512
    """Steps between two leaps."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The reference becomes alpha * policy + (1 - alpha) * reference. 1: it becomes the policy."""


class Train(Section):
    loss: Annotated[str | dict[str, float], BeforeValidator(_as_weights)] = "sigmoid"
    """A name that `prefcache losses` lists, or several with their weights: {sigmoid: 0.8, sft: 0.2}."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Strength of the pull towards the reference; also the scale of rewards. Unless said, the loss's own default."""
    loss_args: Annotated[dict[str, bool | float | str], BeforeValidator(_as_arguments)] = {}
    """Further hyperparameters of the loss. Of several losses, `key` is for all that have it, `loss.key` for one."""
    reference_free: bool = False
    """Take the reference's log-probs to be 0: no scores are read."""
    tokens: Tokens = Tokens()
    """How the log-probs of an answer's tokens become one number."""
    weighting: Literal["wpo"] | None = None
    """wpo: weigh each example by how likely the policy would be to write its answers (WPO)."""
    density_ratio: bool = False
    """For bco: weigh undesirable answers by how much likelier their prompts are among the desirable ones."""
    where: Expression | None = None
    """SQL: train on the training examples for which it is true, such as margin < 5 and n_chosen < 200. Evaluation keeps all."""
    only: str | None = None
    """A file whose column example_id names the training examples to keep: .parquet, .arrow, .jsonl or .csv (prefcache ask)."""
    weight: Expression | None = None
    """SQL: how much each counts, beside the average, such as if(source = 'a.jsonl', 2, 1). 0: it is not visited."""
    order_by: Expression | None = None
    """SQL: the order of each epoch, such as n_chosen, score_gap desc. Equal ones are shuffled. `epoch` is a column, 1 at first."""
    scope: Literal["batch", "micro"] = "batch"
    """What a loss's statistics are taken over: the whole batch of a step, or each micro-batch, as other trainers do."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """At its peak, after the warm-up."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Times that every pair is seen."""
    batch_size: Count = 32
    """Pairs per optimizer step, over all processes."""
    tokens_per_micro_batch: Annotated[int | Literal["auto"] | None, BeforeValidator(_as_budget)] = None
    """Most tokens of one forward and backward. Unless said, 16,384 on a GPU and 1,024 on a CPU. auto: on a GPU, what fits there, tried out at the start. Halved where memory does not suffice; never changes the result."""
    rows: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How sequences share a forward pass, as score.rows. auto: the first that is right for the model."""
    micro_batch_size: Count | None = None
    """Most examples of one forward and backward."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps in which the learning rate rises."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to zero after the warm-up; constant: it does not."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_4bit"] = "adamw"
    """Its two moments take 8 bytes for every value that is trained; in 8 bits 2, in 4 bits 1 (torchao's)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    lora: Lora | None = None
    """Train an adapter (LoRA, DoRA) instead of all weights; {} has it with the defaults."""
    moving_reference: MovingReference | None = None
    """Let the reference move: {every: 512, alpha: 0.6}. What it scores anew are the examples that come until it moves again."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more arithmetic, the same gradients."""
    router_aux_loss: Annotated[float, Field(ge=0)] | None = None
    """Of a mixture of experts: weight of its load-balancing loss, which is added. Unless said, router_aux_loss_coef of the model's config, where that has output_router_logits on."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Of the order of the data."""
    run: Annotated[str, Field(pattern=r"^[\w.=+-]+$")] = "trained"
    """Name of the run: its folder in `out`."""
    model: str | None = None
    """What the policy starts from, a model or a PEFT adapter of one. Unless said, the reference."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the arithmetic; what is trained stays float32. auto: bf16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    shard: Literal["none", "fsdp"] | None = None
    """fsdp: each of several processes holds a part of the model, its gradients and optimizer state (FSDP2). none: all of it. Unless said, as `accelerate launch` was told."""
    alerts: Annotated[Literal["off", "warn", "strict"], BeforeValidator(_as_word)] = "warn"
    """What is done where metrics say that something goes wrong. strict: the run stops there, with exit code 7 and a checkpoint."""
    eval_every: Count | None = None
    """Steps between evaluations on the held-out pairs. Always evaluated: before the first step and after the last."""
    best: Annotated[Best | None, BeforeValidator(_as_best)] = None
    """End with the weights of the best evaluation after a step, not with the last ones: a metric, such as eval_loss."""
    checkpoint_every: Count = 200
    """Steps between checkpoints, from which an interrupted run goes on."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; train.best is kept beside them."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_as_list)] = ()
    """Where metrics go beside the Parquet files: tensorboard (in the run's folder), wandb, trackio, or several of them."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Held-out prompts answered before and after training."""
    sample_tokens: Count = 64
    """Longest sample answer."""
    kinds: Kinds | None = None
    """How to tell the preferred kind of answer from the rejected one in samples."""


class Config(Section):
    model: str
    """The reference: a folder with a Transformers model or a PEFT adapter, or the hub's id of one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """A PEFT adapter that belongs to the reference, on top of `model`: a folder or a hub id."""
    out: str
    """Folder of this experiment: prepared/, scored/ and its runs."""
    cache: str = "cache"
    """Folder of the reference log-probs, one folder per reference; share it between experiments."""
    prepare: Prepare
    score: Score = Score()
    train: Train = Train()

    @property
    def prepared(self) -> Path:
        return Path(self.out) / "prepared"

    @property
    def scored(self) -> Path:
        return Path(self.out) / "scored"

    @property
    def run(self) -> Path:
        return Path(self.out) / self.train.run

    @model_validator(mode="after")
    def _run_has_a_folder_of_its_own(self) -> "Config":
        if self.train.run in ("prepared", "scored", ".", ".."):
            raise ValueError(f"train.run: {self.train.run!r} is the folder of another stage; name the run otherwise")
        return self


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration in `path` (none: empty) with `key=value` overrides on top."""
    tree = read_yaml(Path(path)) if path else {}
    for override in overrides:
        _set(tree, override)
    return validated(tree, f"{path}: " if path else "")


def validated(tree: dict[str, Any], where: str = "") -> Config:
    """A tree as a configuration, or UsageError that begins with `where`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(where + "; ".join(_explain(problem) for problem in error.errors())) from None


def to_yaml(config: Config) -> str:
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"No config at {path}. Name a YAML file; data/demo/config.yaml is one to start from."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as a config: {error}. Name a YAML file; data/demo/config.yaml is one to start from."
        ) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise UsageError(f"{path}: found {found}, expected sections such as `prepare:`.")
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override}: expected KEY=VALUE, as in --set train.beta=0.2.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not YAML: {' '.join(str(error).split())}.") from None
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section.")
    tree[last] = value


def _explain(problem: Any) -> str:
    keys = [str(part) for part in problem["loc"]]
    name = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"{name} is no key of the configuration{_nearest(keys)}"
    if problem["type"] == "missing":
        name = "prepare.data" if name == "prepare" else name
        option = f" (or --set {name}=...)" if name else ""
        return f"{name} is missing; say it in the config{option}"
    if problem["type"] == "model_type":
        section, path = _section_at(keys), "a path or " if keys[:2] == ["prepare", "data"] else ""
        known = f" of {', '.join(section.model_fields)}" if section else ""
        return f"{name}: found {problem['input']!r}, expected {path}a mapping{known}"
    if problem["type"] == "too_short":
        return f"{name}: names nothing; expected a path or a list of them"
    found = "" if isinstance(problem["input"], dict) else f", found {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message}{found}" if name else message


def _nearest(keys: list[str]) -> str:
    section = _section_at(keys[:-1])
    if section is None:
        return ""
    names = list(section.model_fields)
    near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
    if near:
        return f"; the nearest is {'.'.join([*keys[:-1], near[0]])}"
    elsewhere = [f"{at}.{keys[-1]}" for at, kind in _sections().items() if keys[-1] in kind.model_fields]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(names)}"


def _sections() -> dict[str, type[Section]]:
    return {"prepare": Prepare, "score": Score, "train": Train}


def _section_at(keys: list[str]) -> type[Section] | None:
    """The section that these keys lead to."""
    section: type[Section] | None = Config
    for key in keys:
        # The number of an entry follows the list that it is in.
        if section is not None and not key.isdigit():
            section = _section_in(section.model_fields[key].annotation) if key in section.model_fields else None
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """Section itself, or that of `Section | None` and `tuple[Section, ...]`."""
    kinds = [
        kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Section)
    ]
    return kinds[0] if kinds else None
