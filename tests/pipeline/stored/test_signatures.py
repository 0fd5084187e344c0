"""Only what an allowed signer has signed counts as signed, whatever else lies in a cache's folder."""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact, signatures
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.records import ShardRecord, Statement
from prefcache.pipeline.stored.signatures import Signatures, SigningKey, sign_records
from tests.helpers.caches import BUDGET, MINE, MODEL, NUMERICS, OTHER, PAIRS, Cache, create, fill, scored
from tests.helpers.kills import killed_at
from tests.helpers.ssh_keys import agent, allow, make_key


@pytest.fixture
def ann(tmp_path) -> Path:
    return make_key(tmp_path / "ann")


@pytest.fixture
def allowed(tmp_path, ann) -> Path:
    return allow(tmp_path / "allowed", ann)


@pytest.fixture
def cache(tmp_path) -> Cache:
    cache = fill(create(tmp_path), PAIRS)
    assert len(cache.records) > 2
    return cache


def sign(cache: Cache, key: Path) -> Path:
    records = [signatures.describe(cache.folder, record) for record in cache.records]
    statement = sign_records(cache.folder, cache.reference, records, SigningKey(key))
    assert statement is not None
    return statement


def refused(cache: Cache, allowed: Path) -> list[str | None]:
    found = Signatures.read(cache.folder, cache.reference, allowed)
    return [found.why_refused(record) for record in cache.records]


def test_what_an_allowed_signer_signed_is_signed(cache, ann, allowed):
    statement = sign(cache, ann)
    assert refused(cache, allowed) == [None] * len(cache.records)
    found = Signatures.read(cache.folder, cache.reference, allowed)
    assert found.signers == {statement: "ann@example.com"} and not found.refused


def test_what_came_after_the_statement_is_not(cache, ann, allowed):
    sign(cache, ann)
    more = fill(cache, PAIRS, OTHER)
    by_numerics = {
        record.numerics_id: reason for record, reason in zip(more.records, refused(more, allowed), strict=True)
    }
    assert by_numerics[MINE] is None and "is not signed by anybody in" in by_numerics[OTHER]


def test_a_record_that_was_another_when_it_was_read_is_refused(cache, ann, allowed):
    """Whoever may write there puts the signed one back before it is compared."""
    sign(cache, ann)
    found = Signatures.read(cache.folder, cache.reference, allowed)
    (record, *_) = cache.records
    other = ShardRecord.make(**{**record.facts(), "parity": {"max": 0.0}})
    reason = found.why_refused(other)
    assert reason is not None and "has been replaced" in reason
    assert found.why_refused(record) is None


def changed_statement(cache, statement, tmp_path):
    content = artifact.unseal(statement)
    content["name"] = "another"
    statement.write_bytes(artifact.seal(content))


def renamed_changed_statement(cache, statement, tmp_path):
    content = artifact.unseal(statement) | {"name": "another"}
    data = Statement.make(**content).seal()
    path = cache.folder / f"signed-{signatures.hashlib.sha256(data).hexdigest()[:32]}.json"
    path.write_bytes(data)
    signatures.signature_path(statement).rename(signatures.signature_path(path))
    statement.unlink()


def spaced_statement(cache, statement, tmp_path):
    """The same content, written in another way: not the bytes that were signed."""
    statement.write_text(json.dumps(json.loads(statement.read_bytes())))


def missing_signature(cache, statement, tmp_path):
    signatures.signature_path(statement).unlink()


def long_signature(cache, statement, tmp_path):
    with open(signatures.signature_path(statement), "ab") as file:
        file.write(b" " * (1 << 17))


def signature_by_another_key(cache, statement, tmp_path):
    eve = SigningKey(make_key(tmp_path / "eve"))
    signatures.signature_path(statement).write_bytes(eve.sign(statement.read_bytes()))


def signature_for_another_purpose(cache, statement, tmp_path):
    """As git makes one: the same key, another namespace."""
    made = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-q", "-f", tmp_path / "ann", "-n", "git"],
        input=statement.read_bytes(),
        capture_output=True,
        check=True,
    )
    signatures.signature_path(statement).write_bytes(made.stdout)


def signature_of_other_bytes(cache, statement, tmp_path):
    ann = SigningKey(tmp_path / "ann")
    signatures.signature_path(statement).write_bytes(ann.sign(b"other"))


def statement_about_another_reference(cache, statement, tmp_path):
    content = artifact.unseal(statement) | {"model_id": "b" * 32}
    data = Statement.make(**content).seal()
    path = cache.folder / f"signed-{signatures.hashlib.sha256(data).hexdigest()[:32]}.json"
    path.write_bytes(data)
    signatures.signature_path(path).write_bytes(SigningKey(tmp_path / "ann").sign(data))
    statement.unlink()


def statement_behind_a_link(cache, statement, tmp_path):
    shutil.move(statement, tmp_path / "elsewhere.json")
    statement.symlink_to(tmp_path / "elsewhere.json")


def signature_behind_a_link(cache, statement, tmp_path):
    path = signatures.signature_path(statement)
    shutil.move(path, tmp_path / "elsewhere.sig")
    path.symlink_to(tmp_path / "elsewhere.sig")


def signature_that_is_a_pipe(cache, statement, tmp_path):
    path = signatures.signature_path(statement)
    path.unlink()
    os.mkfifo(path)


def newer_statement(cache, statement, tmp_path):
    statement.write_bytes(artifact.seal(artifact.unseal(statement) | {"schema_version": 99}))


@pytest.mark.parametrize(
    "tamper",
    [
        changed_statement,
        renamed_changed_statement,
        spaced_statement,
        missing_signature,
        long_signature,
        signature_by_another_key,
        signature_for_another_purpose,
        signature_of_other_bytes,
        statement_about_another_reference,
        statement_behind_a_link,
        signature_behind_a_link,
        signature_that_is_a_pipe,
        newer_statement,
    ],
    ids=lambda tamper: tamper.__name__,
)
def test_a_statement_that_does_not_hold_counts_for_nothing(cache, ann, allowed, tmp_path, tamper):
    statement = sign(cache, ann)
    assert not any(refused(cache, allowed))
    tamper(cache, statement, tmp_path)
    assert all("is not signed by anybody in" in reason for reason in refused(cache, allowed))
    found = Signatures.read(cache.folder, cache.reference, allowed)
    assert not found.signed and len(found.refused) == 1


@pytest.mark.parametrize(
    "options",
    ['valid-before="20200101"', 'valid-after="29990101"', 'namespaces="git"'],
    ids=["expired", "early", "git"],
)
def test_a_key_that_is_allowed_at_another_time_or_for_something_else_does_not_count(cache, ann, tmp_path, options):
    sign(cache, ann)
    limited = allow(tmp_path / "limited", ann, options=options)
    assert all(refused(cache, limited))
    assert not any(refused(cache, allow(tmp_path / "now", ann, options='namespaces="prefcache-cache"')))


def test_a_record_or_shard_that_was_swapped_after_signing_does_not_count(cache, ann, allowed):
    sign(cache, ann)
    first, second, *_ = cache.records
    # The same size and, for a checksum that is not cryptographic, what an attacker could give the same checksum.
    shard = cache.folder / first.file
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    record = cache.folder / second.name
    record.write_bytes(artifact.seal({**artifact.unseal(record), "generation": 1}))
    found = Signatures.read(cache.folder, cache.reference, allowed)
    reasons = [found.why_refused(ShardRecord.read(cache.record_path(record))) for record in cache.records]
    assert f"{first.file} is not what was signed" in reasons[0]
    assert f"{second.name} is not what was signed" in reasons[1]
    assert not any(reasons[2:])


def test_statements_that_are_merged_while_they_are_read_still_count(cache, ann, allowed, monkeypatch):
    key, verify, n = SigningKey(ann), signatures._verify, len(cache.records)
    writer = CacheWriter(cache, key)
    for record in cache.records:
        writer.sign([signatures.describe(cache.folder, record)], key)
    before = signatures.list_statements(cache.folder)
    assert len(before) == n

    def merge_and_verify(path, data, allowed):
        if path == before[n // 2]:
            writer.merge_statements()
        return verify(path, data, allowed)

    monkeypatch.setattr(signatures, "_verify", merge_and_verify)
    assert refused(cache, allowed) == [None] * n
    assert len(signatures.list_statements(cache.folder)) == 1


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_a_signing_scorer_is_killed_no_record_stands_unsigned(tmp_path, ann, allowed, stride):
    key, n_killed = SigningKey(ann), 0
    for step in itertools.count(0, stride):
        empty = create(tmp_path / str(step))
        rows = scored(PAIRS, empty.plan(PAIRS, [MINE], BUDGET).chunks[0])

        def commit(cache, rows=rows):
            writer = CacheWriter(cache, key)
            if not writer.has_chunk(rows["key"].to_pylist(), MINE):
                writer.commit(rows, NUMERICS[MINE], MINE, None)

        was_killed = killed_at(step, lambda cache=empty, commit=commit: commit(cache))
        n_killed += was_killed
        reopened = Cache(empty.folder, MODEL, allowed_signers=allowed)
        assert not reopened.unsigned and not reopened.damaged
        commit(reopened)
        assert [each.rows for each in Cache(empty.folder, MODEL, allowed_signers=allowed).records] == [len(rows)]
        if not was_killed:
            break
    assert n_killed > 20 // stride


def test_two_people_may_sign_the_same_records(cache, ann, allowed, tmp_path):
    eve = make_key(tmp_path / "eve")
    assert sign(cache, ann) != sign(cache, eve)
    assert not any(refused(cache, allowed)) and not any(refused(cache, allow(tmp_path / "only-eve", eve)))


def test_a_missing_file_of_allowed_signers_is_an_error_and_an_empty_one_allows_nobody(cache, ann, tmp_path):
    sign(cache, ann)
    with pytest.raises(UsageError, match="There is no file of allowed signers at nowhere"):
        Signatures.read(cache.folder, cache.reference, Path("nowhere"))
    (tmp_path / "empty").write_text("")
    assert all(refused(cache, tmp_path / "empty"))


def test_gc_leaves_signed_shards_as_they_are_and_merges_the_others(prefcache, cache, ann, allowed):
    sign(cache, ann)
    signed = {record.name for record in cache.records}
    n_free = len(fill(cache, PAIRS, OTHER).records) - len(signed)
    (result,) = json.loads(prefcache("gc", "--json").stdout)["caches"]
    assert (result["merged"], result["into"], result["shards"]) == (n_free, 1, len(signed) + 1)
    assert not any(refused(cache, allowed))


# -- the command -----------------------------------------------------------------------------------------------------


def test_sign_covers_each_shard_once_for_each_key(prefcache, cache, ann, allowed, tmp_path):
    n = len(cache.records)
    first = json.loads(prefcache("sign", "cache", "--key", ann, "--json").stdout)
    assert [(each["signed"], each["already"]) for each in first["caches"]] == [(n, 0)]
    assert not any(refused(cache, allowed))
    said = prefcache("sign", "cache", "--key", ann).stdout
    assert "0 shards signed by SHA256:" in said and f", {n} were already" in said
    more = fill(cache, PAIRS, OTHER)
    (second,) = json.loads(prefcache("sign", more.folder, "--key", ann, "--json").stdout)["caches"]
    assert (second["signed"], second["already"]) == (len(more.records) - n, n)
    eve = make_key(tmp_path / "eve")
    (by_eve,) = json.loads(prefcache("sign", "--key", eve, "--json").stdout)["caches"]
    assert (by_eve["signed"], by_eve["already"]) == (len(more.records), 0)
    # One statement for each key: what Ann had signed before is in her second one, too.
    assert len(signatures.list_statements(cache.folder)) == 2
    assert not any(refused(more, allowed)) and not any(refused(more, allow(tmp_path / "only-eve", eve)))


def test_a_planted_statement_in_my_name_does_not_keep_me_from_signing(prefcache, cache, ann, tmp_path):
    statement = sign(cache, ann)
    signature_by_another_key(cache, statement, tmp_path)
    (result,) = json.loads(prefcache("sign", "--key", ann, "--json").stdout)["caches"]
    assert result["signed"] == len(cache.records)


def test_damage_is_not_signed(prefcache, cache, ann):
    (cache.folder / cache.records[0].file).write_bytes(b"no")
    assert "so nothing of it was signed" in prefcache("sign", "--key", ann, code=4).stderr
    assert not signatures.list_statements(cache.folder)


def test_a_key_that_cannot_sign_is_refused_before_anything_is_read(prefcache, cache, tmp_path, monkeypatch):
    assert "There is no key nowhere" in prefcache("sign", "--key", "nowhere", code=2).stderr
    (tmp_path / "text").write_text("not a key\n")
    assert "text is not an SSH key" in prefcache("sign", "--key", "text", code=2).stderr
    assert "holds no cache" in prefcache("sign", tmp_path / "empty", "--key", "text", code=2).stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    make_nothing = prefcache("sign", "--key", "text", code=2).stderr
    assert "Signatures need ssh-keygen, which is not installed" in make_nothing


def test_a_passphrase_is_never_asked_for_and_the_agent_signs_instead(process, cache, tmp_path):
    bob = make_key(tmp_path / "bob", "secret")
    alone = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
    done = process("sign", "--key", bob, code=2, env=alone)
    assert "cannot sign" in done.stderr and f"ssh-add {bob}" in done.stderr
    (tmp_path / "ask").write_text("#!/bin/sh\necho secret\n")
    (tmp_path / "ask").chmod(0o755)
    with agent() as variables:
        answers = {"SSH_ASKPASS": str(tmp_path / "ask"), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(["ssh-add", "-q", bob], env={**alone, **variables, **answers}, check=True)
        bob.unlink()  # as with a key that never leaves the agent
        process("sign", "--key", f"{bob}.pub", env={**alone, **variables})
    assert not any(refused(cache, allow(tmp_path / "allowed", bob)))
