"""One YAML file, unknown keys refused with the nearest one, and --set on top."""

import pydantic
import pytest

from prefcache.pipeline import config, config_file
from prefcache.pipeline.errors import UsageError

SMALLEST = "model: m\nout: runs/x\nprepare: {data: a.jsonl}\n"


def load(tmp_path, text=SMALLEST, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return config_file.load(path, overrides)


def paths(c: config.Config) -> list[str | None]:
    return [source.path for source in c.prepare.data]


def refusal(tmp_path, text=SMALLEST, *overrides) -> str:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_three_keys_are_enough(tmp_path):
    c = load(tmp_path)
    assert (c.model, c.out, paths(c)) == ("m", "runs/x", ["a.jsonl"])
    # The defaults that change a result, written down.
    assert (c.prepare.format, c.prepare.examples, c.prepare.too_long) == ("auto", "auto", "drop")
    assert (c.prepare.duplicates, c.prepare.ties, c.prepare.pairing) == ("keep", "quarantine", "best_worst")
    assert (c.prepare.kl_pairs, c.prepare.seed, c.prepare.max_quarantine) == (True, 0, 0.05)
    assert (c.prepare.template, c.prepare.max_length, c.prepare.held_out) == ("chat", 2048, 0.05)
    assert (c.score.engine, c.score.dtype, c.score.logps) == ("transformers", "auto", True)
    assert (c.train.loss, c.train.beta, c.train.learning_rate, c.train.epochs) == ("sigmoid", None, 1e-6, 1.0)
    assert (c.train.batch_size, c.train.warmup_ratio, c.train.seed, c.train.run) == (32, 0.1, 0, "trained")
    assert (c.train.loss_args, c.train.reference_free, c.train.weighting, c.train.scope) == ({}, False, None, "batch")
    assert (c.train.density_ratio, c.train.micro_batch_size, c.train.tokens) == (False, None, config.Tokens())
    assert (c.train.lora, c.train.gradient_checkpointing) == (None, False)
    assert (c.train.tokens.weighs, c.train.tokens.of_reference) == (False, False)


def test_every_stage_has_its_folder(tmp_path):
    c = load(tmp_path, SMALLEST, "train.run=beta=0.2")
    assert [str(path) for path in (c.prepared, c.scored, c.run)] == [
        "runs/x/prepared",
        "runs/x/scored",
        "runs/x/beta=0.2",
    ]


def test_a_config_cannot_be_changed_after_it_is_loaded(tmp_path):
    with pytest.raises(pydantic.ValidationError):
        load(tmp_path).train.beta = 0.2


# -- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.learning_rte", "did you mean train.learning_rate?"),
        ("train.bta", "did you mean train.beta?"),
        ("modell", "did you mean model?"),
        ("scor", "did you mean score?"),
        ("prepare.max_len", "did you mean prepare.max_length?"),
        # The right name at the wrong place: its section is named.
        ("beta", "did you mean train.beta?"),
        ("max_length", "did you mean prepare.max_length?"),
        ("train.attention", "did you mean score.attention?"),
        # Nothing near: what there is.
        (
            "zzz",
            "known here: model, revision, adapter, out, cache, allowed_signers, prepare, score, train (see `prefcache config`)",
        ),
        # Names that other trainers use.
        ("train.lr", "use train.learning_rate"),
        ("base_model", "use model"),
        ("train.dpo", "use train.loss: sigmoid"),
        ("logging_steps", "it needs no setting: every step is recorded"),
        ("eval_dataset", "use prepare.held_out_data (your own data) or prepare.held_out (a share of the prompts)"),
        (
            "train.gradient-accumulation-steps",
            "use train.batch_size (of a whole step; it is accumulated within train.tokens_per_micro_batch)",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(tmp_path, key, hint):
    message = refusal(tmp_path, SMALLEST, f"{key}=1")
    assert message == f"--set {key}: not a key of the configuration; {hint}"


def test_a_key_of_a_section_within_a_section_has_its_nearest(tmp_path):
    kinds = "train.kinds={preferred: a, rejected: b, rejectd: c}"
    assert "did you mean train.kinds.rejected?" in refusal(tmp_path, SMALLEST, kinds)
    assert "did you mean train.tokens.clamp?" in refusal(tmp_path, SMALLEST, "train.tokens.clmp=[-1, 1]")


def test_actors_of_ray_are_absent_unless_named(tmp_path):
    assert load(tmp_path).score.ray is None
    c = load(tmp_path, SMALLEST, "score.ray.actors=2", "score.ray.gpus=0.5")
    assert (c.score.ray.actors, c.score.ray.gpus, c.score.ray.cpus, c.score.ray.address) == (2, 0.5, 1, None)
    assert "score.ray.actors is missing" in refusal(tmp_path, SMALLEST, "score.ray.gpus=1")
    assert "did you mean score.ray.actors?" in refusal(tmp_path, SMALLEST, "score.ray.actor=1")
    message = refusal(tmp_path, SMALLEST, "score.ray=2")
    assert "score.ray: found 2, expected a mapping of actors, address, cpus, gpus, options" in message


def test_the_file_is_blamed_for_what_it_says_and_set_for_the_rest(tmp_path):
    text = "model: m\nout: o\nprepare: {data: a.jsonl, held_out: 2}\n"
    message = refusal(tmp_path, text, "train.beta=strong", "train.lerning_rate=1", "train.run=prepared")
    # Each part is told apart by what it begins with: the file's own mistake first.
    of_file, _, of_set = message.partition("; --set ")
    assert of_file.startswith(f"{tmp_path / 'config.yaml'}: prepare.held_out: ") and "train" not in of_file
    assert (
        of_set.startswith("train.beta: ")
        and "; --set train.lerning_rate: " in of_set
        and "did you mean train.learning_rate?" in of_set
    )
    assert "config.yaml" not in refusal(tmp_path, SMALLEST, "train.run=prepared")
    # Where only the section is wrong, either may be to blame.
    message = refusal(tmp_path, SMALLEST, "train.tokens.ld_alpha_of=policy")
    assert message.startswith("train.tokens: ld_alpha_of says whose tokens")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "pairs.csv", "pairs.jsonl.gz", "pairs.json"])
def test_data_in_the_place_of_a_config_is_called_data(tmp_path, name):
    (tmp_path / name).write_text('[{"prompt": "a"}]')
    with pytest.raises(UsageError, match=rf"{name} is data, not a config\. Name a config, or --set prepare\.data="):
        config_file.load(tmp_path / name)
    (tmp_path / "lines.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(UsageError, match="is data, not a config"):
        config_file.load(tmp_path / "lines.json")
    (tmp_path / "config.json").write_text('{"model": "m", "out": "o", "prepare": {"data": "a.jsonl"}}')
    assert config_file.load(tmp_path / "config.json").model == "m"


def test_every_mistake_is_named_at_once(tmp_path):
    message = refusal(tmp_path, "model: m\nprepare: {data: a.jsonl, held_out: 2}\ntrain: {batch_size: 0, bta: 1}\n")
    for name in ("config.yaml", "out is missing", "prepare.held_out", "found 2", "train.batch_size", "train.bta"):
        assert name in message


# -- --set -----------------------------------------------------------------------------------------------------------


def test_set_overrides_the_file_and_the_last_one_wins(tmp_path):
    c = load(tmp_path, SMALLEST + "train: {beta: 0.3, seed: 5}\n", "train.beta=0.2", "train.beta=0.4", "out=o")
    assert (c.train.beta, c.train.seed, c.out) == (0.4, 5, "o")


def test_set_makes_the_sections_it_needs():
    c = config_file.load(
        None,
        ["model=m", "out=o", "prepare.data=[a.jsonl, b.jsonl]", "train.kinds.preferred=y.*", "train.kinds.rejected=n"],
    )
    assert paths(c) == ["a.jsonl", "b.jsonl"] and c.train.kinds.preferred == "y.*"


def test_set_fills_a_section_that_the_file_leaves_empty(tmp_path):
    assert load(tmp_path, SMALLEST + "train:\n", "train.beta=0.2").train.beta == 0.2


def test_set_keeps_what_follows_the_first_equals_sign(tmp_path):
    assert load(tmp_path, SMALLEST, "train.run=a=b").train.run == "a=b"


def test_set_of_nothing_means_absent(tmp_path):
    assert load(tmp_path, SMALLEST + "train: {eval_every: 5}\n", "train.eval_every=").train.eval_every is None


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.beta", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("train.beta=[1", "not YAML"),
        ("model.name=x", "model is a value, not a section"),
        ("prepare.data.x=1", "data is a value, not a section"),
    ],
)
def test_a_wrong_override_is_refused_by_name(tmp_path, override, found):
    message = refusal(tmp_path, SMALLEST, override)
    assert f"--set {override}" in message and found in message


# -- values ----------------------------------------------------------------------------------------------------------


def test_1e_6_is_a_number_although_yaml_1_1_reads_text(tmp_path):
    assert load(tmp_path, SMALLEST + "train: {learning_rate: 1e-6}\n").train.learning_rate == 0.000001
    assert load(tmp_path, SMALLEST, "train.learning_rate=5e-7").train.learning_rate == 0.0000005


def test_loss_args_keep_yes_and_no(tmp_path):
    assert load(tmp_path, SMALLEST, "train.loss_args.per_token=false").train.loss_args["per_token"] is False


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("train.beta=high", "train.beta"),
        ("train.beta=0", "train.beta"),
        ("train.beta=-1", "train.beta"),
        ("train.beta=.nan", "train.beta"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.batch_size=2.5", "train.batch_size"),
        ("train.batch_size=[1]", "train.batch_size"),
        ("prepare.held_out=1", "prepare.held_out"),
        ("prepare.template=chatml", "prepare.template"),
        ("prepare.data=[]", "prepare.data"),
        ("prepare.data=", "prepare.data"),
        ("score.dtype=float64", "score.dtype"),
        ("score.parity_sample=-1", "score.parity_sample"),
        ("score.logps=maybe", "score.logps"),
        ("train=3", "train"),
        ("model=", "model"),
        ("train.run=a/b", "train.run"),
        ("train.run=..", "train.run"),
        ("train.run=prepared", "train.run"),
        ("train.kinds={preferred: '(', rejected: b}", "'(' is not a regular expression"),
        (
            "train.loss={sigmoid:0.8,sft:0.2}",
            "found sigmoid:0.8; YAML wants a space after the colon, as in {sigmoid: 0.8",
        ),
        ("train.scope=all", "train.scope: Input should be 'batch' or 'micro', found 'all'"),
        ("train.weighting=wp", "train.weighting: Input should be 'wpo', found 'wp'"),
        ("train.micro_batch_size=0", "train.micro_batch_size"),
        (
            "train.tokens_per_micro_batch=0",
            "train.tokens_per_micro_batch: expected a number of tokens of at least 1, or auto",
        ),
        ("train.tokens_per_micro_batch=most", "a number of tokens of at least 1, or auto, found 'most'"),
        ("train.density_ratio=often", "train.density_ratio"),
        ("train.reference_free=3", "train.reference_free"),
        ("train.tokens.ld_alpha=1.5", "train.tokens.ld_alpha"),
        ("train.tokens.ld_alpha=-0.1", "train.tokens.ld_alpha"),
        ("train.tokens.ld_alpha_of=policy", "but ld_alpha is not set; set it too"),
        ("train.tokens.ld_alpha_of=reference", "train.tokens.ld_alpha_of: Input should be 'both' or 'policy'"),
        ("train.tokens.decay=0", "train.tokens.decay"),
        ("train.tokens.decay=1.1", "train.tokens.decay"),
        ("train.tokens.sampo=4", "train.tokens.sampo"),
        ("train.tokens.clamp=1.5", "train.tokens.clamp"),
        ("train.tokens.clamp=[-.inf, 1]", "train.tokens.clamp"),
        (
            "train.tokens.clamp=[1.5, -1.5]",
            "found [1.5, -1.5], expected a lower and an upper limit with 0 between them",
        ),
        # Nothing would ever be learned: where policy and reference agree, every token is beyond it.
        ("train.tokens.clamp=[0.5, 1.5]", "found [0.5, 1.5], expected a lower and an upper limit with 0 between them"),
        ("train.tokens.clamp=[0, 0]", "found [0.0, 0.0], expected a lower and an upper limit"),
        ("train.tokens={sampo: true, ld_alpha: 0.5}", "sampo and ld_alpha both deal with the longer answer's tokens"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, override, name):
    assert name in refusal(tmp_path, SMALLEST, override)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), (0.1, None)),
        (("train.warmup_ratio=null",), (0.1, None)),
        (("train.warmup_steps=20",), (None, 20)),
        (("train.warmup_steps=0", "train.warmup_ratio=null"), (None, 0)),
    ],
)
def test_a_warm_up_in_steps_leaves_no_ratio(settings, expected):
    found = train(*settings)
    assert (found.warmup_ratio, found.warmup_steps) == expected
    # As a run's folder records it.
    assert config.Train.model_validate(found.model_dump(mode="json")) == found


def test_two_lengths_of_the_warm_up_are_refused(tmp_path):
    message = refusal(tmp_path, SMALLEST, "train.warmup_steps=20", "train.warmup_ratio=0.1")
    assert "warmup_steps: 20 and warmup_ratio: 0.1 both say how long the warm-up is" in message


@pytest.mark.parametrize("key", ["beta", "learning_rate", "epochs", "weight_decay"])
def test_infinity_is_refused_where_it_has_no_meaning(tmp_path, key):
    assert f"train.{key}" in refusal(tmp_path, SMALLEST, f"train.{key}=.inf")


@pytest.mark.parametrize("key", ["model", "out", "prepare.data"])
def test_what_must_be_said_is_asked_for(tmp_path, key):
    kept = [line for line in SMALLEST.splitlines() if not line.startswith(key.partition(".")[0])]
    message = refusal(tmp_path, "\n".join(kept) + "\n")
    assert f"{key} is missing" in message and f"--set {key}=" in message


# -- losses ----------------------------------------------------------------------------------------------------------


def train(*overrides: str) -> config.Train:
    return config_file.load(None, ["model=m", "out=o", "prepare.data=a", *overrides]).train


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("sigmoid", "sigmoid"),
        ("{sigmoid: 0.8, sft: 0.2}", {"sigmoid": 0.8, "sft": 0.2}),
        ("{sigmoid: 1e-1, sft: 0}", {"sigmoid": 0.1, "sft": 0.0}),  # which YAML 1.1 reads as text
        ("[sigmoid, sft]", {"sigmoid": 1.0, "sft": 1.0}),
    ],
)
def test_a_loss_is_a_name_or_several_with_their_weights(said, expected):
    assert train(f"train.loss={said}").loss == expected


def test_weights_can_be_set_one_by_one():
    assert train("train.loss.sigmoid=0.8", "train.loss.sft=0.2").loss == {"sigmoid": 0.8, "sft": 0.2}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("{}", "expected the name of a loss, a list of names, or names with their weights"),
        ("[]", "names with their weights, found []"),
        ("", "names with their weights, found None"),
        ("true", "names with their weights, found True"),
        ("[{sigmoid: 0.8}, {sft: 0.2}]", "names with their weights, found [{'sigmoid': 0.8}, {'sft': 0.2}]"),
        ("[sigmoid, null]", "names with their weights"),
        ("[sigmoid, sft, sigmoid]", "names sigmoid twice; give it a weight, as in {sigmoid: 2}"),
        ("{sigmoid: much}", "the weight of sigmoid is 'much'; expected a number that is not negative"),
        ("{sigmoid: 1, sft: }", "the weight of sft is None"),
        ("{sigmoid: true}", "the weight of sigmoid is True"),
        ("{sigmoid: -1}", "the weight of sigmoid is -1; expected a number that is not negative"),
        ("{sigmoid: .inf}", "the weight of sigmoid is inf"),
        ("{sigmoid: .nan}", "the weight of sigmoid is nan"),
    ],
)
def test_what_names_no_loss_is_refused_in_one_sentence(tmp_path, said, found):
    message = refusal(tmp_path, SMALLEST, f"train.loss={said}")
    assert found in message and message.count("train.loss") == 1  # not once for each type that it might have had


def test_an_argument_of_one_loss_can_be_said_in_three_ways():
    expected = {"label_smoothing": 0.1, "robust.label_smoothing": 0.2}
    for said in (
        ["train.loss_args={label_smoothing: 0.1, robust.label_smoothing: 0.2}"],
        ["train.loss_args={label_smoothing: 0.1, robust: {label_smoothing: 0.2}}"],
        ["train.loss_args.label_smoothing=0.1", "train.loss_args.robust.label_smoothing=0.2"],
    ):
        assert train(*said).loss_args == expected


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("3", "train.loss_args"),
        ("{tau: }", "train.loss_args: tau: expected a number, a word, true or false; found None"),
        ("{tau: [1]}", "tau: expected a number, a word, true or false; found [1]"),
        ("{discopop: {tau: {x: 1}}}", "discopop.tau: expected a number, a word, true or false; found {'x': 1}"),
    ],
)
def test_an_argument_that_is_no_value_is_refused_in_one_sentence(tmp_path, said, found):
    assert found in refusal(tmp_path, SMALLEST, f"train.loss_args={said}")


def test_tokens_say_whether_they_weigh_and_whether_the_references_are_needed():
    def of(**said):
        return config.Tokens(**said).weighs, config.Tokens(**said).of_reference

    assert of(ld_alpha=0.5) == (True, True) and of(ld_alpha=0.5, ld_alpha_of="policy") == (True, False)
    assert of(sampo=True) == of(decay=0.9) == of(clamp=(-1, 1)) == (True, True)
    assert of(ld_alpha=0.0) == (True, True)  # 0 is a weight, not nothing


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.tokens=3", "train.tokens: found 3, expected a mapping of ld_alpha, ld_alpha_of, sampo, decay, clamp"),
        ("train.tokens=", "train.tokens: found None, expected a mapping of ld_alpha"),
        ("train.kinds=3", "train.kinds: found 3, expected a mapping of preferred, rejected"),
        ("score=3", "score: found 3, expected a mapping of engine, dtype"),
    ],
)
def test_a_value_in_the_place_of_a_section_is_refused_with_the_sections_keys(tmp_path, override, found):
    assert found in refusal(tmp_path, SMALLEST, override)


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("\tmodel: m", "is not YAML"),
        ("", "found nothing"),
        ("- model", "found list"),
        ("just text", "found str"),
        ("model: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, found):
    message = refusal(tmp_path, text)
    assert "config.yaml" in message and found in message


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("model_name_or_path: m\ndataset_name: d\nlearning_rate: 1e-6\n", "from-trl"),
        ("base_model: m\nrl: dpo\nlearning_rate: 1e-6\ndatasets: [{path: d, type: chatml.intel}]\n", "from-axolotl"),
        ("model_name_or_path: m\nstage: dpo\ndataset: d\ntemplate: qwen\n", "from-llamafactory"),
    ],
)
def test_another_programs_file_leads_to_the_command_that_converts_it(tmp_path, text, command):
    """And to nothing else: a list of its keys would say the same of each of them."""
    message = refusal(tmp_path, text)
    file = tmp_path / "config.yaml"
    assert message.endswith(f"Convert them with `prefcache {command} {file} --output my.yaml`, and use my.yaml.")
    assert "not a key" not in message


def test_a_config_of_ours_with_another_programs_key_is_still_ours(tmp_path):
    message = refusal(tmp_path, "model: m\nout: o\nprepare: {data: d}\nmicro_batch_size: 2\n")
    assert message.startswith(f"{tmp_path / 'config.yaml'}: micro_batch_size is not a key of the configuration")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"No config at .*nowhere\.yaml"):
        config_file.load(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"config\.yaml cannot be read"):
        config_file.load(tmp_path / "config.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        config_file.load(tmp_path)


def test_the_resolved_config_reloads_to_itself(tmp_path):
    said = ["train.kinds={preferred: 'ü.*', rejected: 'no\\n'}", "train.loss_args={per_token: false}"]
    said += ["train.learning_rate=1e-6", "score.accept_numerics=[a, b]", "prepare.data=[a.jsonl, 'b: c.jsonl']"]
    said += [
        "train.loss={sft: 0.2, ipo: 1}",
        "train.loss_args.ipo.beta=0.2",
        "train.tokens={clamp: [-1.5, 1], decay: 0.9}",
    ]
    c = load(tmp_path, SMALLEST, *said)
    again = load(tmp_path, config_file.to_yaml(c))
    assert again == c
    assert again.train.learning_rate == 1e-6 and again.train.kinds.preferred == "ü.*"
    assert list(again.train.loss.items()) == [("sft", 0.2), ("ipo", 1.0)]  # in their order: the first has the beta


# -- sources ---------------------------------------------------------------------------------------------------------


def sources(*overrides: str) -> tuple[config.Source, ...]:
    return config_file.load(None, ["model=m", "out=o", *overrides]).prepare.sources


def test_data_is_a_path_or_a_list_of_paths_and_sources():
    (one,) = sources("prepare.data=a.jsonl")
    assert (one.path, one.hub, one.weight, one.format) == ("a.jsonl", None, 1.0, "auto")
    several = sources("prepare.data=[a.jsonl, 7, {path: b, weight: 2}, {hub: org/set, split: test, revision: 1a}]")
    assert [source.path or source.hub for source in several] == ["a.jsonl", "7", "b", "org/set"]
    assert (several[2].weight, several[3].split, several[3].revision) == (2.0, "test", "1a")


def test_a_source_has_its_own_before_what_is_said_for_all():
    said = ["prepare.format=pairs", "prepare.columns={prompt: q, chosen: good}", "prepare.format_args={by: safer}"]
    first, second = sources("prepare.data=[a, {path: b, format: hh, columns: {prompt: ask}}]", *said)
    assert (first.format, first.columns, first.format_args) == (
        "pairs",
        {"prompt": "q", "chosen": "good"},
        {"by": "safer"},
    )
    assert (second.format, second.columns) == ("hh", {"prompt": "ask", "chosen": "good"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[{}]", "either a path or a hub id"),
        ("[{path: a, hub: org/set}]", "either a path or a hub id"),
        ("[{path: a, weight: 0}]", "prepare.data.0.weight"),
        ("[{path: a, weight: .inf}]", "prepare.data.0.weight"),
        ("[{path: a, wieght: 2}]", "wieght"),
        ("[[a]]", "expected a path or a mapping"),
    ],
)
def test_a_wrong_source_is_refused_by_name(tmp_path, data, message):
    assert message in refusal(tmp_path, SMALLEST, f"prepare.data={data}")
