"""One YAML file, unknown keys refused with the nearest one, and --set on top."""

import pydantic
import pytest

from pipeline import config
from pipeline.errors import UsageError

SMALLEST = "model: m\nout: runs/x\nprepare: {data: a.jsonl}\n"


def load(tmp_path, text=SMALLEST, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides)


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
    assert (c.train.loss, c.train.beta, c.train.learning_rate, c.train.epochs) == ("sigmoid", 0.1, 1e-6, 1.0)
    assert (c.train.batch_size, c.train.warmup_ratio, c.train.seed, c.train.run) == (32, 0.1, 0, "trained")


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
        ("train.learning_rte", "the nearest is train.learning_rate"),
        ("train.bta", "the nearest is train.beta"),
        ("modell", "the nearest is model"),
        ("scor", "the nearest is score"),
        ("prepare.max_len", "the nearest is prepare.max_length"),
        # The right name at the wrong place: its section is named.
        ("beta", "did you mean train.beta?"),
        ("max_length", "did you mean prepare.max_length?"),
        ("train.attention", "did you mean score.attention?"),
        # Nothing near: what there is.
        ("zzz", "known here: model, revision, adapter, out, cache, prepare, score, train"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(tmp_path, key, hint):
    message = refusal(tmp_path, SMALLEST, f"{key}=1")
    assert f"{key} is no key of the configuration" in message and hint in message


def test_a_key_of_a_section_within_a_section_has_its_nearest(tmp_path):
    kinds = "train.kinds={preferred: a, rejected: b, rejectd: c}"
    assert "the nearest is train.kinds.rejected" in refusal(tmp_path, SMALLEST, kinds)


def test_actors_of_ray_are_absent_unless_named(tmp_path):
    assert load(tmp_path).score.ray is None
    c = load(tmp_path, SMALLEST, "score.ray.actors=2", "score.ray.gpus=0.5")
    assert (c.score.ray.actors, c.score.ray.gpus, c.score.ray.cpus, c.score.ray.address) == (2, 0.5, 1, None)
    assert "score.ray.actors is missing" in refusal(tmp_path, SMALLEST, "score.ray.gpus=1")
    assert "the nearest is score.ray.actors" in refusal(tmp_path, SMALLEST, "score.ray.actor=1")
    message = refusal(tmp_path, SMALLEST, "score.ray=2")
    assert "score.ray: found 2, expected a mapping of actors, address, cpus, gpus, options" in message


def test_every_mistake_is_named_at_once(tmp_path):
    message = refusal(tmp_path, "model: m\nprepare: {data: a.jsonl, held_out: 2}\ntrain: {batch_size: 0, bta: 1}\n")
    for name in ("config.yaml", "out is missing", "prepare.held_out", "found 2", "train.batch_size", "train.bta"):
        assert name in message


# -- --set -----------------------------------------------------------------------------------------------------------


def test_set_overrides_the_file_and_the_last_one_wins(tmp_path):
    c = load(tmp_path, SMALLEST + "train: {beta: 0.3, seed: 5}\n", "train.beta=0.2", "train.beta=0.4", "out=o")
    assert (c.train.beta, c.train.seed, c.out) == (0.4, 5, "o")


def test_set_makes_the_sections_it_needs():
    c = config.load(
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
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, override, name):
    assert name in refusal(tmp_path, SMALLEST, override)


@pytest.mark.parametrize("key", ["beta", "learning_rate", "epochs", "weight_decay"])
def test_infinity_is_refused_where_it_has_no_meaning(tmp_path, key):
    assert f"train.{key}" in refusal(tmp_path, SMALLEST, f"train.{key}=.inf")


@pytest.mark.parametrize("key", ["model", "out", "prepare.data"])
def test_what_must_be_said_is_asked_for(tmp_path, key):
    kept = [line for line in SMALLEST.splitlines() if not line.startswith(key.partition(".")[0])]
    message = refusal(tmp_path, "\n".join(kept) + "\n")
    assert f"{key} is missing" in message and f"--set {key}=" in message


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


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"No config at .*nowhere\.yaml"):
        config.load(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"config\.yaml cannot be read"):
        config.load(tmp_path / "config.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        config.load(tmp_path)


def test_the_resolved_config_reloads_to_itself(tmp_path):
    said = ["train.kinds={preferred: 'ü.*', rejected: 'no\\n'}", "train.loss_args={per_token: false}"]
    said += ["train.learning_rate=1e-6", "score.accept_numerics=[a, b]", "prepare.data=[a.jsonl, 'b: c.jsonl']"]
    c = load(tmp_path, SMALLEST, *said)
    again = load(tmp_path, config.to_yaml(c))
    assert again == c
    assert again.train.learning_rate == 1e-6 and again.train.kinds.preferred == "ü.*"


# -- sources ---------------------------------------------------------------------------------------------------------


def sources(*overrides: str) -> tuple[config.Source, ...]:
    return config.load(None, ["model=m", "out=o", *overrides]).prepare.sources


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
