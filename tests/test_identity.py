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
from pipeline.errors import UsageError


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def model_id(folder: Path) -> str:
    return identity.model_identity(folder, {})["model_id"]


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# -- model_id --------------------------------------------------------------------------------------------------------


def test_a_copy_elsewhere_is_the_same_model(model, copy):
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
    found = identity.model_identity(model, {})["weights"]
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
        lambda c: c.update(use_cache=not c.get("use_cache", True)),
        lambda c: [c.update({key: c.pop(key)}) for key in sorted(c, reverse=True)],
    ],
    ids=["dtype", "torch_dtype", "version", "path", "use_cache", "order of keys"],
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
    path = copy / "model.safetensors"
    memo: dict[str, str] = {}
    first = identity.model_identity(copy, memo)
    assert list(memo.values()) == list(first["weights"].values())
    # Same path, size, time and inode: the remembered hash is believed, so other bytes under them go unseen.
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity.model_identity(copy, memo) == first and len(memo) == 1
    # Another time: hashed again, and the change is seen.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identity.model_identity(copy, memo)["model_id"] != first["model_id"] and len(memo) == 2


def test_weights_replaced_within_the_same_time_and_size_are_hashed_again(copy):
    path = copy / "model.safetensors"
    memo: dict[str, str] = {}
    first = identity.model_identity(copy, memo)
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    (copy / "new").write_bytes(data)
    os.utime(copy / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(copy / "new", path)
    assert identity.model_identity(copy, memo)["model_id"] != first["model_id"]


# -- find_model ------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_model_is_found(model):
    assert identity.find_model(str(model)) == model


def break_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def break_config(folder):
    (folder / "config.json").unlink()


def break_weights(folder):
    (folder / "model.safetensors").unlink()


def break_pickle(folder):
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("breaks", "found"),
    [
        (break_adapter, "is an adapter.*Merge it"),
        (break_config, "no config.json"),
        (break_weights, "has no weights; expected .*safetensors"),
        (break_pickle, "pickle, which is never read"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(copy, breaks, found):
    breaks(copy)
    with pytest.raises(UsageError, match=found):
        identity.find_model(str(copy))


def test_a_file_is_no_model(model):
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        identity.find_model(str(model / "config.json"))


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "../x/y z", "org/name@main"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name):
    with pytest.raises(UsageError, match=r"expected a folder with config\.json, or a hub id such as org/name"):
        identity.find_model(name)


def offline(hub: Path, name: str) -> subprocess.CompletedProcess[str]:
    """find_model in a process whose hub is a folder of this test's, without a network."""
    code = (
        "import sys; from pipeline.errors import UsageError; from pipeline.identity import find_model\n"
        "try: print(find_model(sys.argv[1]))\n"
        "except UsageError as error: print(error); sys.exit(2)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, name], env=environment, cwd=hub, capture_output=True, text=True, timeout=60
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
