"""The configuration: one YAML file, one section per stage.

Sections are frozen and refuse unknown keys. Each field has one line of documentation below it, which `prefcache config` and
the JSON Schema show (config_settings.py). Reading files and overrides: config_file.py.
"""

import datetime
import difflib
import itertools
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from prefcache.pipeline import cache_place
from prefcache.pipeline.errors import UsageError


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class Source(Section):
    """Where records come from. A plain string in `data` is a path, or a hub id where no such path exists."""

    path: str | None = None
    """A file, a folder, a glob pattern, - for standard input, or a folder that datasets' `save_to_disk` wrote."""
    hub: str | None = None
    """Id of a data set on the hub."""
    name: str | None = None
    """Subset of the data set."""
    split: str = "train"
    """Split to read, on the hub or in a `save_to_disk` folder."""
    revision: str | None = None
    """Branch, tag or commit. Only a commit is guaranteed to stay the same."""
    format: str | None = None
    """Format of this source. Default: prepare.format."""
    format_args: dict[str, Any] = {}
    """Options of the format; they override prepare.format_args."""
    columns: dict[str, str] = {}
    """Column names; they override prepare.columns."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share of the examples to use, chosen by a hash. Above 1, training examples are repeated: 2.5 uses each twice and half of them a third time."""
    max_records: Count | None = None
    """Maximum number of records to read, the first ones. Default: prepare.max_records."""

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either a path or a hub id")
        return self


def _as_sources(value: Any) -> Any:
    # YAML reads a lone - as a list of nothing; here it is standard input.
    entries = ["-"] if value == [None] else value if isinstance(value, list | tuple) else [value]
    return [{"path": str(entry)} if isinstance(entry, str | int | float) else entry for entry in entries]


TrainOn = Literal["assistant", "last_turn", "all"]
OWN_SET = "data"  # name of evaluation data to which the config gives no name


def _as_evaluation_sets(value: Any) -> Any:
    """Name a set of sources that has no name."""
    if value is None:
        return {}
    if not isinstance(value, dict) or "path" in value or "hub" in value:
        value = {OWN_SET: value}
    for name in value:
        if not re.fullmatch("[a-z][a-z0-9_]{0,39}", str(name)) or name in ("train", "held_out"):
            raise ValueError(
                f"{str(name)!r} names a set of examples; expected lower-case letters, digits and _, beginning with a letter, "
                "and neither train nor held_out"
            )
    return value


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1),
]


class Prepare(Section):
    NEUTRAL: ClassVar = {"workers", "fast_tokenizer"}  # settings that never change the result

    data: Sources
    """Where the records are: a path, or a list of paths and of mappings with `path` or `hub` and further keys."""
    format: str = "auto"
    """Name of the data format (see `prefcache formats`). auto: recognised from the columns."""
    format_args: dict[str, Any] = {}
    """Options of the format."""
    columns: dict[str, str] = {}
    """Column names that differ: {name in the format: name in the data}."""
    examples: Literal["auto", "pairs", "labels"] = "auto"
    """pairs: a chosen and a rejected answer. labels: one answer and true or false; pairs are split into two labels. auto: as in the data."""
    pairing: Literal["best_worst", "best_rest", "adjacent", "all"] = "best_worst"
    """Which pairs to make from a ranking of several answers."""
    kl_pairs: bool = True
    """For labels: also prepare each prompt with another example's answer, from which KTO estimates the KL divergence."""
    kl_batch_size: Annotated[int, Field(ge=2)] | None = None
    """For labels: choose these answers within batches of this many, as TRL's KTOTrainer does with its per_device_train_batch_size. Default: among all examples."""
    template: Literal["chat", "none"] = "chat"
    """chat: use the tokenizer's chat template (a plain string is one turn). none: plain text, with the end token after answers."""
    train_on: TrainOn = "assistant"
    """Which tokens of an answer count in losses and statistics. assistant: what the model wrote, not the user turns, tool results and headers between. last_turn: the last assistant turn only. all: everything after the prompt, as in TRL. Never changes what is scored."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's own chat template."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """Date for templates that print today's date, so that token ids do not change from day to day."""
    max_length: Count = 2048
    """Maximum number of tokens in prompt and answer together."""
    max_prompt_length: Count | None = None
    """Maximum number of tokens in the prompt."""
    too_long: Literal["drop", "keep_start", "keep_end"] = "drop"
    """What to do with longer examples. drop: put them into quarantine. keep_start: cut the ends of the answers. keep_end: cut the oldest turns of the prompt."""
    image_hosts: Strings = ()
    """Hosts (HOST, or HOST:PORT) from which images given as http(s) addresses are fetched: up to 64 MiB and 60 seconds each, with redirects within the host. Default: none, and records with such images go to quarantine."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What to do with an example that has the same tokens as an earlier one."""
    ties: Literal["quarantine", "keep"] = "quarantine"
    """What to do with ties and identical answers. keep: the first one counts as chosen."""
    held_out: Fraction = 0.05
    """Share of the prompts to hold out for evaluation, chosen by a hash of the prompt."""
    held_out_data: Annotated[
        dict[str, Sources],
        BeforeValidator(
            _as_evaluation_sets,
            json_schema_input_type=str | Source | list[str | Source] | dict[str, str | Source | list[str | Source]],
        ),
    ] = {}
    """Evaluation data of your own, in addition to held_out: entries as in data, or {NAME: entries} for several sets. Metrics: eval_NAME_loss and so on; without a name, eval_data_loss. Never trained on."""
    max_records: Count | None = None
    """Maximum number of records to read from each source, the first ones, for a quick trial. Default: all."""
    seed: int = 0
    """Seed for the choices of kl_pairs and of source weights."""
    max_quarantine: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Maximum share of unusable records; above it, the stage fails."""
    rows_per_shard: Count = 50_000
    """Number of examples per Arrow file."""
    workers: Count | None = None
    """Number of worker processes. Default: one per core, or fewer where the data are too small for that. Never changes the result."""
    fast_tokenizer: bool = True
    """Tokenize large data with the package fastokens, if it is installed (pip install 'prefcache[fast]'), and compare a part of the texts with the usual tokenizer. Never changes the result."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The entries of `data`, then those of `held_out_data`, with the stage's defaults filled in."""
        return tuple(
            entry.model_copy(
                update={
                    "format": entry.format or self.format,
                    "format_args": self.format_args | entry.format_args,
                    "columns": self.columns | entry.columns,
                    "max_records": entry.max_records or self.max_records,
                }
            )
            for entry in itertools.chain(self.data, *self.held_out_data.values())
        )

    @property
    def source_splits(self) -> tuple[str | None, ...]:
        """The set to which the examples of each source belong; None: a hash of the prompt decides."""
        own = [name for name, entries in self.held_out_data.items() for _ in entries]
        return (*(None for _ in self.data), *own)


class Vllm(Section):
    python: str = ".venv-vllm/bin/python"
    """Python of an environment in which vLLM is installed. Not needed if prefcache's own has it: pip install 'prefcache[vllm]'."""
    prefix_caching: bool = False
    """Compute a prompt once for all of its answers. Answers whose values this could make wrong are requested again."""
    options: dict[str, Any] = {}
    """Further arguments to vllm.LLM, such as tensor_parallel_size or gpu_memory_utilization."""


class Server(Section):
    url: str | None = None
    """Base URL of an OpenAI-compatible completions server, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name under which the server serves the reference. Default: the only model that it serves."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's API key, if it needs one."""
    concurrency: Count = 32
    """Number of concurrent requests."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Timeout of a request in seconds."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Number of retries per request, with growing pauses."""


class Ray(Section):
    actors: Count
    """Number of actors, each with its own copy of the reference."""
    address: str | None = None
    """Address of a running cluster, such as 10.0.0.5:6379; auto: the one this machine belongs to. Default: RAY_ADDRESS, else a local Ray for the duration of the command."""
    cpus: Count = 1
    """CPU cores per actor; also its number of threads unless OMP_NUM_THREADS is set."""
    gpus: Annotated[float, Field(gt=0)] | None = None
    """GPUs per actor; 0.5 puts two on one GPU. Default: 1 if this machine would score on a GPU, else none."""
    options: dict[str, Any] = {}
    """Further Ray options for the actors, such as memory (bytes) or resources."""


def engine_names() -> list[str]:
    """Return the scoring engines: one file each in scoring/engines. None is imported."""
    return sorted(file.stem for file in (Path(__file__).parent / "scoring/engines").glob("[!_]*.py"))


def _as_engine(name: str) -> str:
    if name not in (names := engine_names()):
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise ValueError(f"expected one of {', '.join(names)}{hint}")
    return name


Engine = Annotated[str, AfterValidator(_as_engine), WithJsonSchema({"enum": engine_names()})]


class Score(Section):
    engine: Engine = "transformers"
    """Engine that computes the reference's log-probs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the reference's weights. auto: as saved on a GPU, float32 on a CPU. Log-probs are always float32."""
    head_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the LM head's operands, for engine transformers; sums and logits are float32. Default: that of the weights on a GPU, float32 on a CPU and for an adapter."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantize the reference when it is loaded (bitsandbytes). A quantized model is a different reference, with its own cache."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel. Models without an SDPA implementation (BLOOM, GPT-J, Mamba, Gemma 2) use eager instead."""
    rows: Literal["auto", "shared", "packed", "padded"] = "auto"
    """Layout of a forward pass. shared: no padding, and what the answers to a prompt begin with is computed once, together with the prompt. packed: no padding. padded: ordinary padded batches. auto: the first of these that is exact for the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    tokens_per_batch: Count | None = None
    """Maximum number of tokens per forward pass. Default: 16,384 on a GPU, 2,048 on a CPU. Halved when memory runs out."""
    tokens_per_shard: Count = 250_000
    """Number of tokens per cache shard. An interruption loses at most one unfinished shard."""
    logps: bool = True
    """Store per-token log-probs in addition to the sums. Training needs them where only some tokens of an answer count (prepare.train_on)."""
    parity_sample: Annotated[int, Field(ge=0)] = 32
    """Number of sequences to compare with the plain one-by-one float32 forward. 0: none."""
    accept_numerics: Strings = ()
    """Numerics ids of other engines, versions or dtypes whose cached rows may be used too."""
    sign_with: str | None = None
    """SSH key with which each shard is signed when it is written, or its .pub file if the agent holds it. See `prefcache guide sharing`."""
    rescore: bool = False
    """Score sequences again that the cache has only from another engine, version or dtype."""
    vllm: Vllm = Vllm()
    """Settings of engine vllm."""
    server: Server = Server()
    """Settings of engine server."""
    ray: Ray | None = None
    """Score with Ray actors, on as many machines as the cluster has. Values stay the same."""


class Kinds(Section):
    """Regular expressions for whole answers; an answer may match neither."""

    preferred: str
    """Pattern of the preferred kind."""
    rejected: str
    """Pattern of the rejected kind."""

    @model_validator(mode="after")
    def _patterns_compile(self) -> "Kinds":
        for pattern in (self.preferred, self.rejected):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return self


class Tokens(Section):
    """How the log-probs of an answer's tokens that count become one number; by default their sum."""

    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens beyond the length of the pair's shorter answer (LD-DPO)."""
    ld_alpha_of: Literal["both", "policy"] = "both"
    """Whose tokens ld_alpha weighs. policy: the reference's tokens keep weight 1, as in some implementations."""
    sampo: bool = False
    """Sample as many tokens of the longer answer as the shorter one has (SamPO)."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Ratio of each token's weight to that of the token before it: earlier tokens count more (temporal decay)."""
    clamp: tuple[float, float] | None = None
    """Lower and upper limit of each token's log-ratio to the reference, such as [-1.5, 1.5] (Humanline)."""

    @model_validator(mode="after")
    def _combine(self) -> "Tokens":
        # Where policy and reference agree the ratio is 0: limits beyond it would let nothing be learned from the start.
        if self.clamp is not None and not (self.clamp[0] <= 0 <= self.clamp[1] and self.clamp[0] < self.clamp[1]):
            raise ValueError(
                f"clamp: found {list(self.clamp)}, expected a lower and an upper limit with 0 between them"
            )
        if self.ld_alpha_of == "policy" and self.ld_alpha is None:
            raise ValueError("ld_alpha_of says whose tokens ld_alpha weighs, but ld_alpha is not set; set it too")
        if self.sampo and self.ld_alpha is not None:
            raise ValueError("sampo and ld_alpha both deal with the longer answer's tokens; take one of them")
        return self

    @property
    def weighs(self) -> bool:
        """Whether the settings ask for anything but plain sums."""
        return self.of_reference or self.ld_alpha is not None

    @property
    def of_reference(self) -> bool:
        """Whether the settings need the reference's per-token log-probs."""
        on_both = self.ld_alpha is not None and self.ld_alpha_of == "both"
        return on_both or self.sampo or self.decay is not None or self.clamp is not None


def _as_weights(value: Any) -> Any:
    """Give listed names weight 1; refuse what is neither a name nor a mapping of names to numbers."""
    if isinstance(value, list):
        if twice := next((name for name in value if value.count(name) > 1), None):
            raise ValueError(f"names {twice} twice; give it a weight, as in {{{twice}: 2}}")
        value = {str(name): 1.0 for name in value} if all(isinstance(name, str | int) for name in value) else None
    if isinstance(value, dict) and value:
        return {str(name): _weight(str(name), weight) for name, weight in value.items()}
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("expected the name of a loss, a list of names, or names with their weights")


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


def _as_budget(value: Any) -> Any:
    if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("expected a number of tokens of at least 1, or auto")


def _as_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads off as false


def _as_arguments(value: Any) -> Any:
    """Flatten `{loss: {key: value}}`, which --set train.loss_args.loss.key=value makes, to `{loss.key: value}`."""
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


Expression = Annotated[str, BeforeValidator(_as_expression, json_schema_input_type=str | bool)]


class Lora(Section):
    """Train an adapter and leave the model's own weights unchanged. If the policy starts from a model that already has an
    adapter, that adapter is trained further in its own shape."""

    r: Count = 16
    """Rank of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by alpha / r."""
    target_modules: Strings = ("all-linear",)
    """Names of the layers to adapt, such as q_proj. all-linear: every linear layer except the head. Layers of a vision tower are never adapted."""
    target_parameters: Strings = ()
    """Names of fused expert weights to adapt as well, such as gate_up_proj and down_proj: parameters that hold all experts of a layer."""
    dora: bool = False
    """Learn direction and magnitude of the weights separately (DoRA)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rank-stabilized LoRA)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    """Only 0 is accepted: with dropout, the policy would differ from its reference before the first step."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the model's own, frozen weights. The adapter is always float32."""

    @model_validator(mode="after")
    def _no_dropout(self) -> "Lora":
        if self.dropout:
            raise ValueError(
                "dropout is not supported: the policy would differ from its reference before it learned anything, and micro-batches "
                "would change a step's result. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _has_targets(self) -> "Lora":
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules and target_parameters are both empty; name what to adapt")
        if self.dora and self.target_parameters:
            raise ValueError(
                "dora does not work with target_parameters: PEFT has no DoRA of fused experts. Drop one of them"
            )
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """Settings that shape a new adapter, as far as they were given."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set - {"dropout", "base_dtype"})}


def _with_eval_prefix(name: Any) -> Any:
    return f"eval_{name}" if isinstance(name, str) and not name.startswith("eval_") else name


class Best(Section):
    """Choice of the best evaluation. A plain string is its `metric`."""

    metric: Annotated[str, BeforeValidator(_with_eval_prefix, json_schema_input_type=str)]
    """Metric of the evaluations, such as eval_loss, eval_rewards/accuracies, or eval_NAME_loss of prepare.held_out_data. The prefix eval_ may be omitted."""
    greater_is_better: bool | None = None
    """Default: false for losses, true for all other metrics."""
    patience: Count | None = None
    """Stop training after this many evaluations in a row without improvement. Default: train to the last step."""

    @property
    def is_greater_better(self) -> bool:
        is_loss = re.fullmatch(r"eval_(\w+_)?loss(/.*)?", self.metric) is not None
        return not is_loss if self.greater_is_better is None else self.greater_is_better


def _as_best(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


class MovingReference(Section):
    """Move the reference towards the policy at intervals (TR-DPO); {} uses the paper's settings."""

    every: Count = 512
    """Steps between two updates of the reference."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The reference becomes alpha * policy + (1 - alpha) * reference; with 1 it becomes the policy."""


Tracker = Literal["tensorboard", "wandb", "trackio"]
Offload = Literal["activations", "optimizer"]


class Train(Section):
    loss: Annotated[
        str | dict[str, float], BeforeValidator(_as_weights, json_schema_input_type=str | list[str] | dict[str, float])
    ] = "sigmoid"
    """Name of a loss (see `prefcache losses`), or several with weights: {sigmoid: 0.8, sft: 0.2}. DPO is sigmoid."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Strength of the pull towards the reference, and scale of the rewards. Default: the loss's own."""
    loss_args: Annotated[
        dict[str, bool | float | str], BeforeValidator(_as_arguments, json_schema_input_type=dict[str, Any])
    ] = {}
    """Further hyperparameters of the loss. With several losses, `key` sets it for all that have it, `loss.key` for one."""
    reference_free: bool = False
    """Take the reference's log-probs as 0; no cache is read."""
    tokens: Tokens = Tokens()
    """How the log-probs of an answer's tokens become one number."""
    weighting: Literal["wpo"] | None = None
    """wpo: weight each example by how likely the policy is to write its answers (WPO)."""
    density_ratio: bool = False
    """For bco: weight undesirable answers by how much likelier their prompts are among the desirable ones."""
    where: Expression | None = None
    """SQL condition on training examples, such as margin < 5 and n_chosen < 200. Evaluation still uses all held-out examples."""
    only: str | None = None
    """File whose column example_id names the training examples to keep: .parquet, .arrow, .jsonl or .csv, as `prefcache ask --out` writes."""
    weight: Expression | None = None
    """SQL expression for the relative weight of each example, such as if(source = 'a.jsonl', 2, 1). 0: skip it."""
    order_by: Expression | None = None
    """SQL order of each epoch, such as n_chosen, score_gap desc. Ties are shuffled. The column `epoch` starts at 1."""
    scope: Literal["batch", "micro"] = "batch"
    """Scope of a loss's batch statistics: the whole batch of a step, or each micro-batch as other trainers do."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate, after warm-up."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Number of passes over the training examples; fractions are allowed."""
    max_steps: Count | None = None
    """Number of optimizer steps. Replaces epochs: passes over the examples follow one another until then, and the learning rate's schedule ends there."""
    batch_size: Count = 32
    """Examples per optimizer step, over all processes."""
    tokens_per_micro_batch: Annotated[
        int | Literal["auto"] | None, BeforeValidator(_as_budget, json_schema_input_type=Count | Literal["auto"] | None)
    ] = None
    """Maximum number of tokens per forward and backward. Default: 16,384 on a GPU, 1,024 on a CPU. auto: on a GPU, what fits, found by trial at the start. Halved when memory runs out; never changes the result."""
    rows: Literal["auto", "shared", "packed", "padded"] = "auto"
    """Layout of a forward pass, as in score.rows. auto: the first that is exact for the model."""
    micro_batch_size: Count | None = None
    """Maximum number of examples per forward and backward."""
    warmup_ratio: Fraction | None = 0.1
    """Share of the steps used for warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Number of steps used for warm-up, instead of warmup_ratio."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate to zero after warm-up; constant: no decay."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_4bit"] = "adamw"
    """AdamW keeps 8 bytes of state per trained value, 4 with weights in bfloat16; the 8-bit version 2, the 4-bit version 1 (torchao)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down. null: no clipping."""
    lora: Lora | None = None
    """Train an adapter (LoRA, DoRA) instead of all weights; {} uses the defaults."""
    router_aux_loss: Annotated[float, Field(ge=0)] | None = None
    """Weight of a mixture of experts' load-balancing loss. Default: the model config's router_aux_loss_coef if its output_router_logits is on, else 0."""
    vision: Literal["frozen", "trained"] = "frozen"
    """How to treat the vision tower and projector. frozen: the features of each image are computed once, for all runs, and the tower is not loaded for training. trained: they are trained with the language model."""
    moving_reference: MovingReference | None = None
    """Move the reference during training: {every: 512, alpha: 0.6}. After each update, the examples up to the next one are scored again."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more arithmetic, the same gradients."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Data type of trained weights, their gradients and, with adamw, its moments. bfloat16: half the memory; updates are rounded stochastically. An adapter is always float32."""
    release_gradients: bool = False
    """Update each parameter in the backward pass and free its gradient at once. Excludes clipping (set max_grad_norm: null) and micro-batches: a step is one forward and backward."""
    offload: Annotated[
        tuple[Offload, ...], BeforeValidator(_as_list, json_schema_input_type=Offload | list[Offload])
    ] = ()
    """What to keep in host memory while the GPU does not need it, at the cost of copies in every step: activations (inputs of recomputed layers; needs gradient_checkpointing), optimizer (its moments), or both."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the arithmetic with float32 weights. auto: bf16 on a GPU, float32 on a CPU."""
    head_dtype: Literal["float32", "bfloat16"] | None = None
    """Data type of the LM head's operands; sums and logits are float32. Default: that of the arithmetic on a GPU, float32 on a CPU."""
    fuse_kernels: bool = True
    """On a GPU, compute RMSNorm and rotary embeddings in fewer kernels. Tried at the start, and turned off if log-probs change by more than rounding."""
    compile: bool = False
    """On a GPU, compile each layer with torch.compile: fewer passes over memory, at the cost of compiling at the start. Not measured on a GPU yet."""
    seed: int = 0
    """Seed for the order of the data, SamPO's samples, a new adapter, and the stochastic rounding of bf16 weights."""
    run: Annotated[str, Field(pattern=r"^[\w.=+-]+$")] = "trained"
    """Name of the run, which is its folder in `out`."""
    model: str | None = None
    """Model or PEFT adapter that the policy starts from. Default: the reference."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    shard: Literal["none", "fsdp"] | None = None
    """fsdp: each process holds a part of the model, gradients and optimizer state (FSDP2). none: each holds everything. Default: what `accelerate launch` was configured with."""
    alerts: Annotated[
        Literal["off", "warn", "strict"],
        BeforeValidator(_as_off, json_schema_input_type=Literal["off", "warn", "strict"]),
    ] = "warn"
    """What to do when metrics show that training goes wrong. strict: save a checkpoint and stop with exit code 7."""
    eval_every: Count | None = None
    """Steps between evaluations on the held-out examples. The first and last step are always evaluated."""
    best: Annotated[Best | None, BeforeValidator(_as_best, json_schema_input_type=str | Best | None)] = None
    """Keep the weights of the best evaluation instead of the last ones: a metric, such as eval_loss."""
    checkpoint_every: Count = 200
    """Steps between checkpoints, from which an interrupted run resumes."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep while the run lasts, in addition to the best one (train.best)."""
    checkpoints_at_end: Literal["remove", "keep"] = "remove"
    """What happens to the checkpoints when the run is finished. remove: only its model stays. keep: they stay, so that a damaged model can be written again. A run that a callback stopped keeps the last one in any case, so that it can be continued."""
    report_to: Annotated[
        tuple[Tracker, ...], BeforeValidator(_as_list, json_schema_input_type=Tracker | list[Tracker])
    ] = ()
    """Where to send metrics in addition to the Parquet files: tensorboard (in the run's folder), wandb, trackio, or several of them."""
    samples: Annotated[int, Field(ge=0)] = 8
    """Number of held-out prompts to answer before and after training."""
    samples_from: str | None = None
    """File of prompts of your own to answer as well: .txt with one a line, or .jsonl or .json with text, lists of messages, or records with a prompt. With samples: 0, only these."""
    sample_tokens: Count = 64
    """Maximum number of tokens per sample answer."""
    kinds: Kinds | None = None
    """Patterns that tell the preferred kind of sample answer from the rejected kind."""

    @model_validator(mode="before")
    @classmethod
    def _warm_up_is_a_share_or_a_number(cls, value: Any) -> Any:
        """Set the ratio to null where steps are given, so that neither key says what the other one overrules."""
        if not isinstance(value, dict):
            return value
        ratio, steps = value.get("warmup_ratio"), value.get("warmup_steps")
        if ratio is not None and steps is not None:
            raise ValueError(
                f"warmup_steps: {steps} and warmup_ratio: {ratio} both say how long the warm-up is. Leave one of them out, or set it "
                "to null"
            )
        others = {key: each for key, each in value.items() if key != "warmup_ratio"}
        return value if ratio is not None else others if steps is None else {**others, "warmup_ratio": None}

    @model_validator(mode="after")
    def _released_gradients_are_used_at_once(self) -> "Train":
        if not self.release_gradients:
            return self
        if self.max_grad_norm is not None:
            raise ValueError(
                "release_gradients: gradients cannot be clipped, because the norm of all of them is known only after the first were "
                f"used; max_grad_norm is {self.max_grad_norm:g}. Set max_grad_norm: null"
            )
        for name in ("micro_batch_size", "tokens_per_micro_batch"):
            if getattr(self, name) is not None:
                raise ValueError(
                    "release_gradients: the gradients of micro-batches cannot add up, so a step is one forward and backward, and "
                    f"{name} is {getattr(self, name)}. Leave it out; if memory runs out, lower batch_size"
                )
        if self.lora is not None:
            raise ValueError(
                "release_gradients: the gradients of an adapter are as small as the adapter, so there is little to save. "
                "Leave release_gradients out"
            )
        return self

    @model_validator(mode="after")
    def _adapters_leave_the_tower_alone(self) -> "Train":
        if self.vision == "trained" and self.lora is not None:
            raise ValueError(
                "vision: trained trains the tower's own weights, and lora trains an adapter of the language model alone. Leave one of "
                "the two out"
            )
        return self

    @model_validator(mode="after")
    def _offloads_recomputed_layers(self) -> "Train":
        if "activations" in self.offload and not self.gradient_checkpointing:
            raise ValueError(
                "offload: activations keeps the inputs of recomputed layers on the host, and layers are not recomputed. Set "
                "gradient_checkpointing: true"
            )
        return self

    @model_validator(mode="after")
    def _bf16_weights_are_trained_in_bf16(self) -> "Train":
        if self.weights == "float32":
            return self
        if self.lora is not None:
            raise ValueError(
                "weights: bfloat16 is for training all weights; an adapter is always float32. For the frozen weights under it, "
                "set lora.base_dtype: bfloat16 instead"
            )
        if self.precision == "float32":
            raise ValueError("weights: bfloat16 computes in bf16, and precision is float32. Leave one of the two out")
        return self


class Config(Section):
    model: str
    """The reference: folder or hub id of a Transformers model or a PEFT adapter, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    adapter: str | None = None
    """PEFT adapter on top of `model` that belongs to the reference: folder or hub id."""
    out: str
    """Folder of the experiment: prepared/, scored/ and its runs."""
    cache: str = "cache"
    """Folder of the cached log-probs, with one subfolder per reference. Share it between experiments; with others, as a URL (s3://bucket/refs, gs://, az://)."""
    allowed_signers: str | None = None
    """File of SSH keys, as `ssh-keygen -Y verify` takes it. If set, a cached row is used only if one of these people has signed it (score.sign_with, `prefcache sign`)."""
    prepare: Prepare
    """From data to token ids."""
    score: Score = Score()
    """From token ids to the reference's log-probs."""
    train: Train = Train()
    """From log-probs to a trained policy."""

    @property
    def cache_folder(self) -> Path:
        """The folder in which the cache is read and written: of a URL, the mirror on this machine."""
        return cache_place.local_folder(self.cache)

    @property
    def signers_file(self) -> Path | None:
        return None if self.allowed_signers is None else Path(self.allowed_signers).expanduser()

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
    def _url_of_the_cache_is_one(self) -> "Config":
        try:
            cache_place.local_folder(self.cache)
        except UsageError as error:
            raise ValueError(f"cache: {error}") from None
        return self

    @model_validator(mode="after")
    def _run_has_a_folder_of_its_own(self) -> "Config":
        if self.train.run in ("prepared", "scored", ".", ".."):
            raise ValueError(f"train.run: {self.train.run!r} is the folder of another stage; choose another name")
        return self
