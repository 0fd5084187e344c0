"""What was made when a model's id was of whole weight files, and a tokenizer's of every byte, is still found and used.

Such an id serves only where it tells what loaded: it did not see the index, nor the order of an adapter's patterns.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file, save_file

import prefcache.commands.score
from prefcache.pipeline import model_files, older_ids
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.preparing import prepared_inputs
from prefcache.pipeline.safetensors_files import Digests
from prefcache.pipeline.scoring import scorer
from prefcache.pipeline.stored import artifact, scored
from prefcache.pipeline.stored.memos import WeightsMemo
from prefcache.pipeline.stored.records import PreparedInputs
from prefcache.pipeline.training import run_inputs
from tests.helpers.project import write_config, write_pairs

# Ids of this folder as the versions before computed them, with the code they had.
OLDER_MODEL = "c202c99c4185fb98def5ed84e651f832"


def test_the_id_of_a_folder_of_an_older_kind_is_what_it_was(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "dtype": "bfloat16", "transformers_version": "5.16.0"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    weights = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"  # sha256 of b"weights"
    # What the first version hashed, written out: keys sorted, nothing of the dtype, nothing of what a model may lack.
    content = f'{{"config": {{"hidden_size": 8}}, "weights": {{"model.safetensors": "{weights}"}}}}'
    found = older_ids.older_identity(Reference(tmp_path), Digests())["model_id"]
    assert found == hashlib.sha256(content.encode()).hexdigest()[:32] == OLDER_MODEL


def test_the_id_of_a_tokenizer_of_an_older_kind_is_what_it_was(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"is_local": true}')
    content = b"tokenizer.json\0" + b"2\0{}" + b"tokenizer_config.json\0" + b'18\0{"is_local": true}'
    assert older_ids.older_tokenizer_id(tmp_path) == hashlib.sha256(content).hexdigest()[:32]


class _NoFingerprint(PreparedInputs):
    """What has no place for a fingerprint."""

    def model_copy(self, *, update=None, deep=False):
        kept = {name: value for name, value in (update or {}).items() if name != "fingerprint"}
        return super().model_copy(update=kept, deep=deep)


def older_inputs(config, model, opened):
    """What a preparation was made from."""
    found = current_inputs(config, model, opened).facts() | {"tokenizer_id": older_ids.older_tokenizer_id(model)}
    return _NoFingerprint(**found)


current_inputs = prepared_inputs.find_inputs


def older_identify(reference, root, *, remember=True):
    """What identify gave and wrote, whether the id tells what loaded or not."""
    made, hashes = older_ids.older_facts(reference), Digests()
    made["weights"] = {name: hashes.hash_whole(reference.folder / name) for name in made["weights"]}
    if reference.adapter:
        made["adapter"]["weights"] = hashes.hash_whole(reference.adapter / model_files.ADAPTER_WEIGHTS)
    root.mkdir(exist_ok=True)
    (root / ".weights.json").write_text(json.dumps(dict(hashes.files)))  # without a seal
    return {"model_id": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32], **made}


def is_same_older_model(model_id, reference, root, *, remember=True):
    return older_identify(reference, root)["model_id"] == model_id


@contextlib.contextmanager
def before():
    """Within it, ids are of the older kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_inputs, "find_inputs", older_inputs)
        for module in (scored, prefcache.commands.score, run_inputs):
            patch.setattr(module, "identify", older_identify)
        for module in (scored, scorer, run_inputs):
            patch.setattr(module, "is_same_model", is_same_older_model)
        yield


@pytest.fixture
def experiment(prefcache, model, tmp_path, monkeypatch):
    """Its config. The model is a copy, which a test may change."""
    shutil.copytree(model, tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 30)
    return write_config(tmp_path, Path("model"), epochs=1, checkpoint_every=2)


def older_reference(root: Path) -> dict:
    (file,) = root.glob("cache/*/reference.json")
    return artifact.unseal(file)


def test_caches_preparations_and_runs_of_before_are_used_as_they_are(prefcache, experiment, tmp_path, monkeypatch):
    with before():
        for command in ("prepare", "score", "train"):
            prefcache(command, experiment)
    made = older_reference(tmp_path)
    data = (tmp_path / "model/model.safetensors").read_bytes()
    assert made["weights"] == {"model.safetensors": hashlib.sha256(data).hexdigest()}
    assert "fingerprint" not in json.loads(Path("runs/tiny/prepared/manifest.json").read_text())["inputs"]
    stored = {path: path.read_bytes() for path in Path("cache").glob("*/*")}

    for command in ("prepare", "score", "train"):
        assert "nothing to do" in prefcache(command, experiment).stderr
    # Of a memo without a seal nothing is believed.
    assert WeightsMemo.recall(Path("cache/.weights.json")) is not None
    shutil.rmtree("runs/tiny/scored")
    result = json.loads(prefcache("score", experiment, "--json").stdout)
    assert (result["scored"], result["tokens"], result["cached_before"]) == (0, 0, 60)
    assert {path: path.read_bytes() for path in Path("cache").glob("*/*")} == stored
    prefcache("export", experiment, "--output", "scores.parquet")

    # More data is scored into that cache, under its id.
    write_pairs(tmp_path / "pairs.jsonl", 10, start=30, mode="a")
    prefcache("prepare", experiment)
    assert json.loads(prefcache("score", experiment, "--json").stdout)["scored"] == 20
    assert older_reference(tmp_path) == made


@pytest.mark.parametrize("start", [None, "start"])
def test_a_run_that_was_begun_before_goes_on(prefcache, experiment, tmp_path, other_model, start):
    shutil.copytree(other_model, tmp_path / "start")
    settings = ["--set", f"train.model={start}"] if start else []
    with before():
        for command in ("prepare", "score", "train"):
            prefcache(command, experiment, *(settings if command == "train" else []))
    run = Path("runs/tiny/trained")
    whole = (run / "model/model.safetensors").read_bytes()
    # As it was before its last checkpoint.
    (run / "manifest.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    assert "unfinished" not in prefcache("train", experiment, *settings).stderr
    assert (run / "model/model.safetensors").read_bytes() == whole
    assert not run.with_name("trained-1").exists()
    # Another start is another run.
    save_file(load_file("model/model.safetensors"), "start/model.safetensors", {"format": "pt"})
    (run / "manifest.json").unlink()
    if start:
        done = prefcache("train", experiment, *settings, code=2)
        assert "holds an unfinished run with policy" in done.stderr


def rewritten(folder: Path) -> None:
    """The very same tensors in a file of other bytes."""
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "by": "me"})


def test_other_bytes_than_those_of_before_are_scored_anew(prefcache, experiment, tmp_path):
    with before():
        prefcache("prepare", experiment)
        prefcache("score", experiment)
    rewritten(tmp_path / "model")
    assert json.loads(prefcache("score", experiment, "--json").stdout)["scored"] == 60
    assert len(list(Path("cache").glob("*/reference.json"))) == 2
    # From then on it is found, in whatever files it lies.
    rewritten(tmp_path / "model")
    assert json.loads(prefcache("score", experiment, "--json").stdout)["scored"] == 0


def two_files(folder: Path, other: Path) -> None:
    os.replace(folder / "model.safetensors", folder / "a.safetensors")
    shutil.copy(other / "model.safetensors", folder / "b.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_id_of_before_that_does_not_tell_what_loaded_is_not_believed(prefcache, experiment, tmp_path, other_model):
    two_files(tmp_path / "model", other_model)
    with before():
        prefcache("prepare", experiment)
        prefcache("score", experiment)
    assert json.loads(prefcache("score", experiment, "--json").stdout)["scored"] == 60


@pytest.mark.parametrize(("patterns", "n_scored"), [({"q_proj": 8}, 0), ({"q_proj": 8, ".*_proj": 64}, 60)])
def test_an_adapter_of_before_is_found_where_the_order_of_its_patterns_is_no_question(
    prefcache, experiment, tmp_path, patterns, n_scored
):
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, alpha_pattern=patterns)
    peft.get_peft_model(plain, settings).save_pretrained(tmp_path / "adapter")
    tree = yaml.safe_load(experiment.read_text()) | {"adapter": "adapter"}
    experiment.write_text(yaml.safe_dump(tree))
    with before():
        prefcache("prepare", experiment)
        prefcache("score", experiment)
    assert json.loads(prefcache("score", experiment, "--json").stdout)["scored"] == n_scored


def test_whole_files_are_hashed_only_where_a_cache_of_before_may_be_theirs(prefcache, experiment, tmp_path):
    prefcache("prepare", experiment)
    prefcache("score", experiment)
    memo = WeightsMemo.recall(Path("cache/.weights.json"))
    assert len(memo.tensors) == 1 and not memo.files


# -- what is remembered of weights ----------------------------------------------------------------------------------


def test_a_memo_that_is_not_valid_is_built_anew_and_doctor_says_so(prefcache, experiment):
    prefcache("prepare", experiment)
    prefcache("score", experiment)
    path = Path("cache/.weights.json")
    whole = path.read_bytes()
    digest = next(iter(next(iter(WeightsMemo.recall(path).tensors.values())).values()))[2]
    one_digit = digest[:-1] + "01"[digest[-1] == "0"]
    unsealed = json.dumps({"/model.safetensors|1|2|3|4": digest}).encode()  # as it was before
    garbage = [b"[]", b"null", b"3", b"{}", b"\x00", b"[" * 100_000, artifact.seal({"tensors": 3}), unsealed]
    for content in [*garbage, whole.replace(digest.encode(), one_digit.encode())]:
        path.write_bytes(content)
        said = prefcache("doctor", experiment, code=None).stdout
        assert ".weights.json" in said and "It is ignored, and built anew when it is next needed" in said
        assert path.read_bytes() == content  # doctor changes nothing
        assert "nothing to do" in prefcache("score", experiment).stderr
        assert path.read_bytes() == whole
    assert ".weights.json" not in prefcache("doctor", experiment, code=None).stdout
