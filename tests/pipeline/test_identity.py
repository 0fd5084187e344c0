"""model_id changes with every bit that changes a log-prob, and with nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline import identity
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.identity import Reference


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def model_id(folder: Path) -> str:
    return identity.model_identity(Reference(folder), {})["model_id"]


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# -- model_id --------------------------------------------------------------------------------------------------------


def test_a_copy_elsewhere_is_the_same_model(model, copy):
    assert model_id(copy) == model_id(model)


def test_a_plain_model_keeps_the_id_that_its_caches_were_made_under(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "dtype": "bfloat16", "transformers_version": "5.16.0"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    weights = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"  # sha256 of b"weights"
    # What the first version hashed, written out: keys sorted, nothing of the dtype, nothing of what a model may lack.
    content = f'{{"config": {{"hidden_size": 8}}, "weights": {{"model.safetensors": "{weights}"}}}}'
    assert model_id(tmp_path) == hashlib.sha256(content.encode()).hexdigest()[:32] == "c202c99c4185fb98def5ed84e651f832"


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "model.safetensors.index.json", "README.md", "tokenizer.json", "training_args.bin"],
)
def test_what_lies_beside_config_and_weights_does_not_count(model, copy, name):
    (copy / name).write_text("{}")
    assert model_id(copy) == model_id(model)


def test_other_weights_are_another_model(model, other_model):
    assert model_id(model) != model_id(other_model)


def test_one_bit_of_a_weight_is_another_model(model, copy):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert model_id(copy) != model_id(model)


def test_weights_are_known_by_their_sha256(model):
    found = identity.model_identity(Reference(model), {})["weights"]
    data = (model / "model.safetensors").read_bytes()
    assert found == {"model.safetensors": hashlib.sha256(data).hexdigest()}


def test_every_weight_file_counts(model, copy):
    (copy / "model-2.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert model_id(copy) != model_id(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["rope_parameters"].update(rope_theta=500000.0),
        lambda c: c.update(rms_norm_eps=1e-5),
        lambda c: c.update(sliding_window=8),
        lambda c: c.update(final_logit_softcapping=30.0),
        lambda c: c.update(quantization_config={"bits": 4}),
        lambda c: c.pop("hidden_act"),
    ],
    ids=["rope_theta", "eps", "window", "soft cap", "quantization", "a key less"],
)
def test_a_config_that_computes_otherwise_is_another_model(model, copy, change):
    edit(copy, change)
    assert model_id(copy) != model_id(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(dtype="bfloat16"),
        lambda c: c.update(torch_dtype="bfloat16"),
        lambda c: c.update(transformers_version="0.0.1"),
        lambda c: c.update(_name_or_path="/elsewhere"),
        lambda c: c.update(_attn_implementation="eager"),
        lambda c: c.update(use_cache=not c.get("use_cache", True)),
        lambda c: [c.update({key: c.pop(key)}) for key in sorted(c, reverse=True)],
    ],
    ids=["dtype", "torch_dtype", "version", "path", "kernel", "use_cache", "order of keys"],
)
def test_what_computes_the_same_is_the_same_model(model, copy, change):
    edit(copy, change)
    assert model_id(copy) == model_id(model)


def test_volatile_keys_of_a_nested_config_do_not_count(copy):
    edit(copy, lambda c: c.update(text_config={"dtype": "float32", "rope_theta": 1.0}))
    before = model_id(copy)
    edit(copy, lambda c: c["text_config"].update(dtype="bfloat16"))
    assert model_id(copy) == before
    edit(copy, lambda c: c["text_config"].update(rope_theta=2.0))
    assert model_id(copy) != before


def test_a_broken_config_is_refused_by_name(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not JSON"):
        model_id(copy)


def test_unchanged_weights_are_not_hashed_again(copy):
    memo: dict[str, str] = {}
    first = identity.model_identity(Reference(copy), memo)
    assert list(memo.values()) == list(first["weights"].values())
    # What is remembered is believed.
    memo[next(iter(memo))] = "0" * 64
    assert identity.model_identity(Reference(copy), memo)["model_id"] != first["model_id"] and len(memo) == 1


def test_weights_edited_in_place_are_seen_although_their_time_was_put_back(copy):
    path = copy / "model.safetensors"
    memo: dict[str, str] = {}
    first = identity.model_identity(Reference(copy), memo)
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_ino == stat.st_ino
    assert identity.model_identity(Reference(copy), memo)["model_id"] != first["model_id"] and len(memo) == 2


def test_weights_replaced_within_the_same_time_and_size_are_hashed_again(copy):
    path = copy / "model.safetensors"
    memo: dict[str, str] = {}
    first = identity.model_identity(Reference(copy), memo)
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    (copy / "new").write_bytes(data)
    os.utime(copy / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(copy / "new", path)
    assert identity.model_identity(Reference(copy), memo)["model_id"] != first["model_id"]


# -- a model's folder ------------------------------------------------------------------------------------------------


def find_start(name: str) -> Path:
    """The folder that a policy starts from."""
    sections = {"prepare": {"data": "pairs.jsonl"}, "train": {"model": name}}
    return identity.find_start(Config.model_validate({"model": "another", "out": "runs/x", **sections})).folder


def test_a_folder_with_a_model_is_found(model):
    assert find_start(str(model)) == model


def break_adapter(folder):
    """A base that is an adapter itself."""
    adapter = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def break_config(folder):
    (folder / "config.json").unlink()


def break_weights(folder):
    (folder / "model.safetensors").unlink()


def break_pickle(folder):
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (break_adapter, "is an adapter; a whole model is needed.*Merge it"),
        (break_config, "no config.json"),
        (break_weights, "has no weights; expected .*safetensors"),
        (break_pickle, "pickle, which is never read"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(copy, breaks, found):
    breaks(copy)
    with pytest.raises(UsageError, match=found):
        find_start(str(copy))


def test_a_file_is_no_model(model):
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        find_start(str(model / "config.json"))


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "../x/y z", "org/name@main"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(UsageError, match=r"expected a folder with config\.json, or a hub id such as org/name"):
        find_start(name)


def offline(hub: Path, name: str) -> subprocess.CompletedProcess[str]:
    """find_reference in a process whose hub is a folder of this test's, without a network."""
    code = (
        "import sys; from pipeline.config import Config; from pipeline.errors import UsageError\n"
        "from pipeline.identity import find_reference\n"
        "config = Config(model=sys.argv[1], out='runs/x', prepare={'data': 'pairs.jsonl'})\n"
        "try: print(find_reference(config).folder)\n"
        "except UsageError as error: print(error); sys.exit(2)\n"
    )
    return in_a_process(hub, code, name)


def in_a_process(hub: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=hub, capture_output=True, text=True, timeout=60
    )


def hub_with(tmp_path: Path, model: Path) -> Path:
    """The cache folder of huggingface_hub, holding `model` as org/tiny."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return tmp_path


def test_a_hub_id_that_was_fetched_before_is_found_offline(tmp_path, model):
    done = offline(hub_with(tmp_path, model), "org/tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path) and model_id(folder) == model_id(model)


def test_an_unknown_hub_id_offline_is_refused_in_words(tmp_path):
    done = offline(tmp_path, "org/unknown")
    assert done.returncode == 2, done.stderr
    assert "org/unknown is no folder here, and the hub gave none" in done.stdout
    assert "Check the name and the network" in done.stdout


# -- find_reference --------------------------------------------------------------------------------------------------


ADAPTER = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def write_adapter(folder: Path, base: str | None = None, **settings) -> Path:
    """The files of an adapter. Its weights are not looked into here."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": base} | settings))
    (folder / "adapter_model.safetensors").write_bytes(b"weights of the adapter")
    return folder


def named(model, **keys) -> Reference:
    tree = {"model": str(model), "out": "out", "prepare": {"data": "pairs.jsonl"}, **keys}
    return identity.find_reference(Config.model_validate(tree))


def reference_id(reference: Reference) -> str:
    return identity.model_identity(reference, {})["model_id"]


def test_a_reference_is_a_model_or_an_adapter_with_its_base(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", str(model))
    assert named(model) == Reference(model)
    assert named(adapter) == named(model, adapter=str(adapter)) == Reference(model, adapter)
    assert named(model, score={"quantization": "4bit"}) == Reference(model, None, "4bit")
    assert named(adapter).weight_files == [model / "model.safetensors", adapter / "adapter_model.safetensors"]


def test_the_base_of_an_adapter_may_be_named_relative_to_it(copy, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", "../copy")
    assert named(adapter).folder.samefile(copy)


def test_an_adapters_own_tokenizer_goes_before_its_bases(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", str(model))
    assert named(adapter).tokenizer == model
    shutil.copy(model / "tokenizer.json", adapter)
    assert named(adapter).tokenizer == adapter


def without(name):
    return lambda folder: (folder / name).unlink()


def as_pickle(folder):
    os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin")


def of_kind(**settings):
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | settings))


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (without("adapter_config.json"), r"is no adapter: it has no adapter_config\.json"),
        (without("adapter_model.safetensors"), r"has no weights; expected adapter_model\.safetensors"),
        (as_pickle, "pickle, which is never read"),
        (of_kind(peft_type="PREFIX_TUNING"), "is a PREFIX_TUNING adapter; known are LORA"),
        (of_kind(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"adapter_config\.json is not JSON"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_rightly_is_refused_before_anything_is(model, tmp_path, breaks, found):
    adapter = write_adapter(tmp_path / "adapter")
    breaks(adapter)
    with pytest.raises(UsageError, match=found):
        named(model, adapter=str(adapter))


def test_names_that_contradict_each_other_are_refused(model, copy, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", str(model))
    with pytest.raises(UsageError, match="is an adapter already"):
        named(adapter, adapter=str(adapter))
    with pytest.raises(UsageError, match="revision main is a hub id's"):
        named(model, revision="main")
    with pytest.raises(UsageError, match="does not say of which model"):
        named(write_adapter(tmp_path / "orphan"))
    with pytest.raises(UsageError, match="an adapter of no/such/model, which is not found"):
        named(write_adapter(tmp_path / "lost", "no/such/model"))
    with pytest.raises(UsageError, match="a whole model is needed here"):
        named(write_adapter(tmp_path / "second", str(adapter)))
    edit(copy, lambda c: c.update(quantization_config={"bits": 4}))
    with pytest.raises(UsageError, match="is quantised already"):
        named(copy, score={"quantization": "8bit"})


def test_adapter_quantisation_and_both_are_references_of_their_own(model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    all_of_them = [Reference(model, a, q) for a in (None, adapter) for q in (None, "4bit", "8bit")]
    assert len({reference_id(each) for each in all_of_them}) == 6


def test_an_adapter_is_known_by_its_weights_and_by_what_its_config_computes(model, tmp_path):
    def changed(name, **settings):
        return reference_id(Reference(model, write_adapter(tmp_path / name, **settings)))

    first = changed("first")
    paths = {"base": "/elsewhere", "inference_mode": True, "revision": "main", "peft_version": "9", "task_type": None}
    assert changed("elsewhere", **paths) == first
    # PEFT saves sets, in whatever order.
    assert changed("reordered", target_modules=["v_proj", "q_proj"]) == first
    assert len({first, changed("rank", r=8), changed("alpha", lora_alpha=32), changed("dora", use_dora=True)}) == 4
    (tmp_path / "first" / "adapter_model.safetensors").write_bytes(b"weights of the adaptes")
    assert reference_id(Reference(model, tmp_path / "first")) != first


def test_a_revision_is_fetched_and_counts_by_what_it_holds(tmp_path, model, other_model):
    hub = hub_with(tmp_path, model)
    repository = hub / "hub" / "models--org--tiny"
    for branch, commit, source in (("tuned", "1" * 40, other_model), ("again", "2" * 40, model)):
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs" / branch).write_text(commit)
    found = {name: offline_reference(hub, name) for name in (None, "main", "tuned", "again")}
    assert found == {
        None: model_id(model),
        "main": model_id(model),
        "tuned": model_id(other_model),
        "again": model_id(model),
    }


def offline_reference(hub: Path, revision: str | None) -> str:
    code = (
        "import sys; from pipeline import config, identity\n"
        "c = config.load(None, ['model=org/tiny', 'out=o', 'prepare.data=d', *sys.argv[1:]])\n"
        "print(identity.model_identity(identity.find_reference(c), {})['model_id'])\n"
    )
    return in_a_process(hub, code, *([f"revision={revision}"] if revision else [])).stdout.strip()


# -- tokenizer and numerics ------------------------------------------------------------------------------------------


def test_the_tokenizer_has_an_id_of_its_own(model, other_model, copy):
    assert identity.tokenizer_id(model) == identity.tokenizer_id(other_model) == identity.tokenizer_id(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identity.tokenizer_id(copy) != identity.tokenizer_id(model)


def test_numerics_name_engine_and_versions_and_hash_to_an_id():
    record = identity.numerics("transformers", ["torch"], dtype="float32")
    # A local label such as +cpu is no version of the arithmetic.
    assert record == {"engine": "transformers", "torch": version("torch").split("+")[0], "dtype": "float32"}
    reordered = dict(sorted(record.items(), reverse=True))
    assert identity.numerics_id(record) == identity.numerics_id(reordered)
    assert identity.numerics_id(record) != identity.numerics_id(record | {"dtype": "bfloat16"})


def test_differences_name_what_differs():
    mine, other = {"torch": "2.13.0", "dtype": "float32", "new": "x"}, {"torch": "2.11.0", "dtype": "float32"}
    assert identity.differences(mine, other) == "new None -> x, torch 2.11.0 -> 2.13.0"
    assert identity.differences(mine, mine) == "nothing"
