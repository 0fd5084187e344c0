"""model_id changes with every bit that changes a log-prob, and with nothing else."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefcache.pipeline import identity, older_ids
from prefcache.pipeline.config import Config
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.safetensors_files import Digests, hash_tensors


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def model_id(folder: Path) -> str:
    return identity.model_identity(Reference(folder))["model_id"]


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# -- model_id --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "model.safetensors.index.json", "model-2.safetensors", "README.md", "tokenizer.json"],
)
def test_a_copy_elsewhere_is_the_same_model_whatever_lies_beside_config_and_weights(model, copy, name):
    assert model_id(copy) == model_id(model)
    (copy / name).write_text("{}")
    assert model_id(copy) == model_id(model)


def test_other_weights_are_another_model(model, other_model):
    assert model_id(model) != model_id(other_model)


def test_a_tensor_is_known_by_name_dtype_shape_and_the_sha256_of_its_bytes(tmp_path):
    save_file({"x": np.array([[1.5, -2.0]], np.float32)}, tmp_path / "x.safetensors")
    expected = hashlib.sha256(struct.pack("<2f", 1.5, -2.0)).hexdigest()
    assert hash_tensors(tmp_path / "x.safetensors") == {"x": ("F32", (1, 2), expected)}


def shards_of(folder: Path, parts: dict[str, list[str]], source: Path | None = None) -> None:
    """Put the tensors of `source` into these files instead of one, with an index that names them."""
    tensors = load_file((source or folder) / "model.safetensors")
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    write_index(folder, {name: file for file, names in parts.items() for name in names})


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink(missing_ok=True)


def names_in(model: Path) -> list[str]:
    return sorted(load_file(model / "model.safetensors"))


@pytest.mark.parametrize("n_files", [1, 2, 5])
def test_in_how_many_files_the_weights_lie_does_not_count(model, copy, n_files):
    names = names_in(model)
    shards_of(copy, {f"part-{n}.safetensors": names[n::n_files] for n in range(n_files)})
    assert model_id(copy) == model_id(model)


def test_the_index_selects_which_of_two_files_with_the_same_names_is_the_model(model, other_model, copy):
    names = names_in(model)
    for file, source in (("a.safetensors", model), ("b.safetensors", other_model)):
        shards_of(copy, {file: names}, source)
    assert model_id(copy) == model_id(other_model)
    write_index(copy, dict.fromkeys(names, "a.safetensors"))
    assert model_id(copy) == model_id(model)
    # Transformers loads all of b, though the index names one tensor of it; another loader may not.
    write_index(copy, dict.fromkeys(names, "a.safetensors") | {names[0]: "b.safetensors"})
    with pytest.raises(UsageError, match=r"has two different tensors .* in files that both load"):
        model_id(copy)


def test_transformers_loads_what_the_id_is_of(model, other_model, copy):
    """The order of Transformers: transformers_weights in the config, model.safetensors, the index."""

    def loaded() -> bytes:
        found = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=False)
        return found.lm_head.weight.detach().numpy().tobytes()

    def known() -> set[bytes]:
        return {load_file(file)["lm_head.weight"].tobytes() for file in Reference(copy).weight_files}

    names = names_in(model)
    shards_of(copy, {"b.safetensors": names}, other_model)
    assert known() == {loaded()}
    shutil.copy(model / "model.safetensors", copy)
    assert model_id(copy) == model_id(model) and known() == {loaded()}
    edit(copy, lambda c: c.update(transformers_weights="b.safetensors"))
    assert model_id(copy) == model_id(other_model) and known() == {loaded()}


@pytest.mark.parametrize(
    ("weight_map", "found"),
    [
        ({"x": "gone.safetensors"}, "names gone.safetensors, which does not exist"),
        ({"x": "../copy/model.safetensors"}, "has no weight_map of tensors to names of files in its folder"),
        ({"x": 3}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([1], "has no weight_map"),
        ({"x": "a.safetensors"}, "lacks tensors that its index names: x"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(copy, weight_map, found):
    os.replace(copy / "model.safetensors", copy / "a.safetensors")
    write_index(copy, weight_map)
    with pytest.raises(UsageError, match=found):
        model_id(copy)


def test_weight_files_of_other_names_are_refused(copy):
    os.replace(copy / "model.safetensors", copy / "weights.safetensors")
    with pytest.raises(
        UsageError, match=r"has weights.safetensors; expected model.safetensors, or model.safetensors.index"
    ):
        model_id(copy)


def header(content: bytes, data: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(content)) + content + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"weights",
        struct.pack("<Q", 1 << 63) + b"{}",
        header(b"[" * 100_000),
        header(b"[1]"),
        header(b"\xff\xfe"),
        header(b"{}"),
        header(b'{"x": 3}'),
        header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}'),
        header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}'),
        header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}'),
        header(b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
        header(b'{"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}'),
        header(b'{"x": {"dtype": 4, "shape": [2], "data_offsets": [0, 8]}}'),
        header(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": {}}'),
        header(
            b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
            b'"y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
        ),
        header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    ],
)
def test_garbage_in_place_of_weights_is_refused_in_a_sentence(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors is not a whole safetensors file: .*fetch it again"):
        model_id(copy)


def test_one_number_in_any_file_of_a_sharded_model_is_another_model(model, tmp_path):
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {model_id(tmp_path)}
    for file in files:
        before, tensors = file.read_bytes(), load_file(file)
        name = max(tensors)
        save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
        found.add(model_id(tmp_path))
        file.write_bytes(before)
    assert len(found) == len(files) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["rope_parameters"].update(rope_theta=500000.0),
        lambda c: c.update(rms_norm_eps=1e-5),
        lambda c: c.update(sliding_window=8),
        lambda c: c.update(final_logit_softcapping=30.0),
        lambda c: c.update(quantization_config={"bits": 4}),
        lambda c: c.pop("hidden_act"),
        lambda c: c.update(pad_token_id=7),
        lambda c: c.update(image_token_id=7),
    ],
    ids=["rope_theta", "eps", "window", "soft cap", "quantization", "a key less", "padding", "image token"],
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
        lambda c: c.update(eos_token_id=7, bos_token_id=[1, 2]),
        lambda c: c.update(architectures=["Other"], auto_map={"AutoModel": "code.Other"}),
        lambda c: c.update(use_cache=not c.get("use_cache", True)),
        lambda c: [c.update({key: c.pop(key)}) for key in sorted(c, reverse=True)],
    ],
    ids=["dtype", "torch_dtype", "version", "path", "kernel", "ends", "class", "use_cache", "order of keys"],
)
def test_what_computes_the_same_is_the_same_model(model, copy, change):
    edit(copy, change)
    assert model_id(copy) == model_id(model)


def test_volatile_keys_of_a_nested_config_do_not_count(copy):
    edit(copy, lambda c: c.update(text_config={"dtype": "float32", "rope_theta": 1.0}))
    before = model_id(copy)
    edit(copy, lambda c: c["text_config"].update(dtype="bfloat16", eos_token_id=3))
    assert model_id(copy) == before
    edit(copy, lambda c: c["text_config"].update(rope_theta=2.0))
    assert model_id(copy) != before


def test_where_a_forward_reads_where_a_text_ends_that_counts(copy):
    edit(copy, lambda c: c.update(model_type="qwen4_exp_text", eos_token_id=3))
    before = model_id(copy)
    edit(copy, lambda c: c.update(eos_token_id=4))
    assert model_id(copy) != before


def test_no_other_causal_language_model_reads_where_a_text_ends():
    """What Transformers' own files say. Names of others' configs, generation and classifiers are not its forward."""
    read = re.compile(r"(?<!generation_)config\.(?:\w+\.)?(?:eos|bos)_token_id")
    others = re.compile(
        r"eos_mask = input_ids\.eq\(|shift_tokens_right\(|labels, |generation_config"
    )  # classifiers, made-up inputs
    root, found = Path(transformers.__file__).parent / "models", set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for file in (root / model_type_to_module_name(kind)).glob("modeling_*.py"):
            lines = file.read_text().splitlines()
            if any(read.search(line) and not others.search(line) for line in lines):
                found.add(kind)
    assert found == identity._READ_ENDS


def test_the_class_of_a_causal_language_model_depends_on_its_model_type_alone():
    # Where Transformers had several for one, it would choose by `architectures`.
    assert all(isinstance(name, str) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def test_a_broken_config_is_refused_by_name(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not JSON"):
        model_id(copy)


def test_unchanged_weights_are_not_hashed_again(copy):
    digests = Digests()
    first = identity.model_identity(Reference(copy), digests)["model_id"]
    (stamp,) = digests.tensors
    # What is remembered is believed.
    name = next(iter(digests.tensors[stamp]))
    digests.tensors[stamp][name] = digests.tensors[stamp][name]._replace(sha256="0" * 64)
    assert identity.model_identity(Reference(copy), digests)["model_id"] != first and list(digests.tensors) == [stamp]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_one_bit_of_a_weight_is_seen_although_size_and_time_are_as_before(copy, is_replaced):
    path, digests = copy / "model.safetensors", Digests()
    first = identity.model_identity(Reference(copy), digests)["model_id"]
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    changed = copy / "new" if is_replaced else path
    with open(changed, "wb" if is_replaced else "r+b") as file:
        file.write(data)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(changed, path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and (path.stat().st_ino == stat.st_ino) is not is_replaced
    assert identity.model_identity(Reference(copy), digests)["model_id"] != first
    assert len(digests.tensors) == 1  # what the file was before is forgotten


# -- a model's folder ------------------------------------------------------------------------------------------------


def find_start(name: str) -> Path:
    """The folder that a policy starts from."""
    sections = {"prepare": {"data": "pairs.jsonl"}, "train": {"model": name}}
    return identity.find_start(Config.model_validate({"model": "another", "out": "runs/x", **sections})).folder


def test_a_folder_with_a_model_is_found(model):
    assert find_start(str(model)) == model


ADAPTER = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def without(name):
    return lambda folder: (folder / name).unlink()


def as_pickle(folder):
    (weights,) = folder.glob("*.safetensors")
    os.replace(weights, weights.with_suffix(".bin"))


def of_kind(**settings):
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | settings))


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (of_kind(base_model_name_or_path="../copy"), "is an adapter; a whole model is needed.*Merge it"),
        (without("config.json"), "no config.json"),
        (without("model.safetensors"), "has no weights; expected .*safetensors"),
        (as_pickle, "pickle, which is never read"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(copy, breaks, found):
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        find_start(str(copy / "config.json"))
    breaks(copy)
    with pytest.raises(UsageError, match=found):
        find_start(str(copy))


def test_where_no_weights_are_needed_a_config_and_a_tokenizer_are_enough(copy):
    (copy / "model.safetensors").unlink()
    config = Config.model_validate({"model": str(copy), "out": "runs/x", "prepare": {"data": "d"}})
    assert identity.find_start(config, weights=False) == Reference(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        identity.find_start(config, weights=False)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "org/name@main"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(UsageError, match=r"expected a folder with config\.json, or a hub id such as org/name"):
        find_start(name)


@pytest.mark.parametrize("name", ["./nope", "../x/y z", "/no/where", "~/model", "./org/name"])
def test_a_path_that_leads_nowhere_is_no_hub_id(name):
    with pytest.raises(UsageError, match=rf"^No folder at {name}\.") as refused:
        find_start(name)
    assert "hub" not in str(refused.value)


def offline(hub: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Print the id of a reference in a process whose hub is a folder of this test's, without a network."""
    code = (
        "import sys; from prefcache.pipeline import config_file, identity; from prefcache.pipeline.errors import UsageError\n"
        "try: reference = identity.find_reference(config_file.load(None, ['out=o', 'prepare.data=d', *sys.argv[1:]]))\n"
        "except UsageError as error: print(error); sys.exit(2)\n"
        "print(identity.model_identity(reference)['model_id'], reference.folder)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *settings], env=environment, cwd=hub, capture_output=True, text=True, timeout=60
    )


def hub_with(tmp_path: Path, model: Path) -> Path:
    """The cache folder of huggingface_hub, holding `model` as org/tiny."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return tmp_path


def test_a_hub_id_that_was_fetched_before_is_found_offline_and_counts_by_what_its_revision_holds(
    tmp_path, model, other_model
):
    repository = hub_with(tmp_path, model) / "hub" / "models--org--tiny"
    for branch, commit, source in (("tuned", "1" * 40, other_model), ("again", "2" * 40, model)):
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs" / branch).write_text(commit)
    for revision, source in ((None, model), ("main", model), ("tuned", other_model), ("again", model)):
        done = offline(tmp_path, "model=org/tiny", *([f"revision={revision}"] if revision else []))
        assert done.returncode == 0, done.stdout + done.stderr
        found, folder = done.stdout.split()
        assert Path(folder).is_relative_to(tmp_path) and found == model_id(source)


def test_an_unknown_hub_id_offline_is_refused_in_words(tmp_path):
    done = offline(tmp_path, "model=org/unknown")
    assert done.returncode == 2, done.stderr
    assert "org/unknown is not a local folder and could not be downloaded from the hub" in done.stdout
    assert "Check the name and the network" in done.stdout


# -- find_reference --------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, base: str | None = None, **settings) -> Path:
    """The files of an adapter. Its weights are not looked into here."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": base} | settings))
    save_file({"lora_A": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def named(model, **keys) -> Reference:
    tree = {"model": str(model), "out": "out", "prepare": {"data": "pairs.jsonl"}, **keys}
    return identity.find_reference(Config.model_validate(tree))


def reference_id(reference: Reference) -> str:
    return identity.model_identity(reference)["model_id"]


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


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (without("adapter_config.json"), r"has no adapter_config\.json"),
        (without("adapter_model.safetensors"), r"has no weights; expected adapter_model\.safetensors"),
        (as_pickle, "pickle, which is never read"),
        (of_kind(peft_type="PREFIX_TUNING"), "is a PREFIX_TUNING adapter; supported are LORA"),
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
    with pytest.raises(UsageError, match="is quantized already"):
        named(copy, score={"quantization": "8bit"})


def test_adapter_quantization_and_both_are_references_of_their_own(model, tmp_path):
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
    save_file({"lora_A": np.ones(2, np.float32)}, tmp_path / "first" / "adapter_model.safetensors")
    assert reference_id(Reference(model, tmp_path / "first")) != first


@pytest.mark.parametrize("key", ["alpha_pattern", "rank_pattern"])
def test_the_order_of_an_adapters_patterns_counts(model, tmp_path, key):
    # PEFT takes the first that fits: q_proj gets 8 here, 64 there.
    first = write_adapter(tmp_path / "first", **{key: {"q_proj": 8, ".*_proj": 64}})
    second = write_adapter(tmp_path / "second", **{key: {".*_proj": 64, "q_proj": 8}})
    assert reference_id(Reference(model, first)) != reference_id(Reference(model, second))


# -- tokenizer and numerics ------------------------------------------------------------------------------------------


def test_the_tokenizer_has_an_id_of_its_own(model, other_model, copy):
    assert identity.tokenizer_id(model) == identity.tokenizer_id(other_model) == identity.tokenizer_id(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identity.tokenizer_id(copy) != identity.tokenizer_id(model)


def test_a_tokenizers_id_is_not_of_where_it_came_from(model, copy):
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    notes = {
        "is_local": True,
        "local_files_only": True,
        "name_or_path": "/x",
        "processor_class": "P",
        "padding_side": "left",
    }
    path.write_text(json.dumps(dict(reversed((settings | notes).items()))))
    assert identity.tokenizer_id(copy) == identity.tokenizer_id(model)
    path.write_text(json.dumps(settings | {"add_prefix_space": True}))
    assert identity.tokenizer_id(copy) != identity.tokenizer_id(model)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.4.0.0.json",
        "spm_char.model",
        "source.spm",
        "bpe.codes",
        "dict.txt",
        "emoji.json",
        "normalizer.json",
        "byte_maps.json",
        "vocab-src.json",
        "tokenizer.model.v3",
        "qwen.tiktoken",
    ],
)
def test_whatever_a_tokenizer_is_loaded_from_is_in_its_id(copy, name):
    def found() -> set[str]:
        return {identity.tokenizer_id(copy), identity.tokenizer_stamp(copy)}

    seen = [found()]
    for content in ("a", "b"):
        (copy / name).write_text(content)
        seen.append(found())
    assert len(set.union(*seen)) == 6


def test_a_tokenizer_without_further_files_keeps_its_id_and_its_older_one(tmp_path):
    # By hand: each file's name, its size and its bytes, in the order of the older list; each file once.
    files = {"tokenizer.json": b"{}", "tokenizer.model": b"m", "vocab.json": b"v", "vocab.txt": b"t"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    text = b"".join(f"{name}\0{len(data)}\0".encode() + data for name, data in files.items())
    expected = hashlib.sha256(text).hexdigest()[:32]
    assert identity.tokenizer_id(tmp_path) == older_ids.older_tokenizer_id(tmp_path) == expected
    (tmp_path / "dict.txt").write_bytes(b"d")
    assert older_ids.older_tokenizer_id(tmp_path) == expected != identity.tokenizer_id(tmp_path)


@pytest.mark.parametrize(
    ("record", "coarsest"),
    [
        ({"dtype": "float32"}, "float32"),  # as rows were recorded before the head had a dtype
        ({"dtype": "bfloat16", "head_dtype": "float32"}, "bfloat16"),
        ({"dtype": "float32", "head_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "head_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float8", "head_dtype": "float32"}, ""),
        ({"engine": "imported"}, ""),
    ],
)
def test_the_coarsest_dtype_bounds_the_rounding_of_numerics(record, coarsest):
    assert identity.coarsest_dtype(record) == coarsest


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


def test_a_missing_package_is_named():
    with pytest.raises(UsageError, match=r"needs the package no-such-package, which is not installed \(pip install"):
        identity.versions(["torch", "no-such-package"])
