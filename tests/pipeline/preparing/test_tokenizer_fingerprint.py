"""A preparation is of the ids that its tokenizer gives now: neither the files alone nor the software alone tell."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prefcache.pipeline import identity
from prefcache.pipeline.preparing import tokenizer_facts, tokenizer_fingerprint
from prefcache.pipeline.preparing.encoder import Encoder
from prefcache.pipeline.preparing.probe_texts import PROBES
from prefcache.pipeline.preparing.tokenizer_fingerprint import read_fingerprint
from prefcache.pipeline.stored.memos import TokenizersMemo
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.tokenizers import FAMILIES, build, facts, saved


@pytest.fixture
def loads(monkeypatch) -> list[Path]:
    """The tokenizers that were loaded."""
    real, found = tokenizer_facts.load_facts, []

    def spied(folder: Path):
        found.append(folder)
        return real(folder)

    monkeypatch.setattr(tokenizer_facts, "load_facts", spied)
    return found


def upgrade(monkeypatch, normalizer: dict | None = None) -> None:
    """Another version of Transformers, which may build the tokenizer of the same files with another normalizer."""
    real_version, real_load = identity.version, tokenizer_facts.load_facts

    def load(folder: Path):
        made = real_load(folder)
        backend = json.loads(made.backend)
        return replace(made, backend=json.dumps(backend | {"normalizer": normalizer})) if normalizer else made

    monkeypatch.setattr(identity, "version", lambda name: "99.0" if name == "transformers" else real_version(name))
    monkeypatch.setattr(tokenizer_facts, "load_facts", load)


def test_software_that_builds_the_tokenizer_otherwise_makes_a_new_preparation(prefcache, config, monkeypatch, tmp_path):
    prefcache("prepare", config)
    assert "nothing to do" in prefcache("prepare", config).stderr
    before = Prepared(Path("runs/tiny/prepared")).table()["prompt_ids"]
    # Llama 2's: spaces become a character that the vocabulary spells otherwise.
    upgrade(monkeypatch, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    said = prefcache("prepare", config).stderr
    assert "runs/tiny/prepared is out of date: its tokenizer gives other ids in these versions (transformers 99" in said
    assert Prepared(Path("runs/tiny/prepared")).table()["prompt_ids"] != before
    assert "nothing to do" in prefcache("prepare", config).stderr


def test_software_that_gives_the_same_ids_makes_no_new_preparation(prefcache, config, monkeypatch, loads, model):
    prefcache("prepare", config)
    manifest = Path("runs/tiny/prepared/manifest.json").read_bytes()
    upgrade(monkeypatch)
    loads.clear()
    for n_loads in (1, 1):  # the first time it is looked at, and then remembered
        assert "nothing to do" in prefcache("prepare", config).stderr
        assert len(loads) == n_loads
    assert Path("runs/tiny/prepared/manifest.json").read_bytes() == manifest


def test_with_nothing_to_do_no_tokenizer_is_loaded(prefcache, config):
    prefcache("prepare", config)
    code = f"import sys; from prefcache.cli import main; main(['prepare', {str(config)!r}], standalone_mode=False)"
    code += "; assert not {'transformers', 'tokenizers', 'torch'} & set(sys.modules), 'it was loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing to do" in done.stderr, done.stderr


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_tokenizer_that_was_loaded_and_saved_has_the_same_fingerprint(family, tmp_path):
    tokenizer = build(family, bos=True)
    # As a training loop leaves it.
    tokenizer.pad_token = tokenizer.eos_token
    first = tmp_path / "first"
    tokenizer.save_pretrained(first)
    tokenizer("x", truncation=True, max_length=4, padding="max_length")
    tokenizer.save_pretrained(tmp_path / "again")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert "max_length" in (tmp_path / "again/tokenizer.json").read_text()
    found = [read_fingerprint(each, tmp_path) for each in (first, tmp_path / "again")]
    assert found[0] == found[1] and found[0].loads is not None
    assert [loaded(text)["input_ids"] for text in PROBES] == [tokenizer(text)["input_ids"] for text in PROBES]


def test_the_probes_tell_every_family_from_every_other():
    # But for those that split alike: the regular expression of one is what the other has built in.
    found = {
        tokenizer_fingerprint._encode(Encoder(facts(family))).ids for family in FAMILIES if family != "byte-level split"
    }
    assert len(found) == len(FAMILIES) - 1


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Lowercase"},
        {"type": "NFC"},
        {"type": "NFKC"},
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Prepend", "prepend": "x"},
        {"type": "Replace", "pattern": {"String": "\r\n"}, "content": "\n"},
        {"type": "Replace", "pattern": {"String": "\t"}, "content": " "},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Replace", "pattern": {"String": "\u200d"}, "content": ""},
    ],
    ids=str,
)
def test_the_probes_see_every_kind_of_normalizer(normalizer):
    plain = facts("byte-level")
    backend = json.loads(plain.backend) | {"normalizer": normalizer}
    changed = replace(plain, backend=json.dumps(backend))
    assert tokenizer_fingerprint._encode(Encoder(changed)).ids != tokenizer_fingerprint._encode(Encoder(plain)).ids


@pytest.mark.parametrize("garbage", ["[]", "null", "3", "{}", '{"encoded": {}}', "\x00", "[" * 100_000])
def test_a_memo_of_tokenizers_that_is_not_valid_is_built_anew(garbage, tmp_path, loads):
    folder, _ = saved(sorted(FAMILIES)[0])
    first = read_fingerprint(folder, tmp_path)
    path = TokenizersMemo.path(tmp_path)
    whole = path.read_bytes()
    path.write_text(garbage)
    assert TokenizersMemo.damage(path)
    assert read_fingerprint(folder, tmp_path) == first and path.read_bytes() == whole and len(loads) == 2
    # One digit, which the seal sees.
    path.write_bytes(whole.replace(first.ids.encode(), first.ids[::-1].encode()))
    assert read_fingerprint(folder, tmp_path) == first and len(loads) == 3


def test_doctor_names_a_memo_that_is_not_valid(prefcache, config):
    prefcache("prepare", config)
    path = TokenizersMemo.path(Path("runs/tiny"))
    path.write_bytes(path.read_bytes().replace(b'"ids": "', b'"ids": "0'))
    assert ".tokenizers.json" in prefcache("doctor", config, code=None).stdout
    assert "nothing to do" in prefcache("prepare", config).stderr
    assert ".tokenizers.json" not in prefcache("doctor", config, code=None).stdout


def test_scoring_takes_what_a_tokenizer_of_other_files_prepared_if_it_is_the_same(prefcache, config, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    path = copy / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # no line breaks
    assert identity.tokenizer_id(copy) != identity.tokenizer_id(model)
    prefcache("prepare", config)
    prefcache("score", config, "--set", f"model={copy}")
    assert "nothing to do" in prefcache("prepare", config, "--set", f"model={copy}").stderr
    shutil.rmtree("runs/tiny/scored")
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    path.write_text(json.dumps(tokenizer))
    assert "another tokenizer" in prefcache("score", config, "--set", f"model={copy}", code=5).stderr
    assert "out of date: its tokenizer has changed" in prefcache("prepare", config, "--set", f"model={copy}").stderr
