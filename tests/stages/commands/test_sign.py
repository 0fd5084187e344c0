"""With allowed_signers, only rows that one of them has signed are used: by score, train, sql and report."""

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import shards
from prefcache.pipeline.stored.cache_writer import CacheWriter
from prefcache.pipeline.stored.signatures import list_statements
from tests.helpers.project import PREFCACHE, options, start, write_pairs
from tests.helpers.published import rewrite
from tests.helpers.scored import cache_folder
from tests.helpers.ssh_keys import allow, make_key

N = 120


@pytest.fixture
def ann(tmp_path) -> Path:
    return make_key(tmp_path / "ann")


@pytest.fixture
def demand(tmp_path, ann) -> list[str]:
    """Options that demand Ann's signature; the file's name is relative to the config's place, as others are."""
    allow(tmp_path / "team.signers", ann)
    return options("allowed_signers=team.signers")


@pytest.fixture
def signing(demand, ann) -> list[str]:
    return [*demand, *options(f"score.sign_with={ann}")]


def score(prefcache, config, *arguments) -> dict:
    return json.loads(prefcache("score", "-q", config, "--json", *arguments).stdout)


def shrink(rows):
    """Other values, of which every checksum will be right."""
    for row in rows:
        row |= {"logps": [-0.5] * row["n_completion"], "logp_sum": -0.5 * row["n_completion"]}


def test_what_is_scored_with_a_key_is_signed_and_used(prefcache, prepared, signing, demand, tmp_path):
    assert score(prefcache, prepared, *signing)["scored"] == N
    folder = cache_folder(tmp_path)
    assert len(list_statements(folder)) == 1 < len(shards.list_records(folder))
    assert len(list(folder.glob("*.sig"))) == 1
    assert score(prefcache, prepared, *signing)["tokens"] == 0
    prefcache("train", "-q", prepared, *demand, "--set", "train.max_steps=2")
    rows = json.loads(prefcache("sql", "select count(*) n from sequences", "runs/tiny", "--json").stdout)
    assert rows == [{"n": N}]


def test_rows_that_nobody_signed_are_not_used_and_the_error_says_what_to_do(prefcache, scored, demand, ann, tmp_path):
    message = prefcache("score", "-q", scored, *demand, code=2).stderr
    assert "what this writes would not be signed" in message and "score.sign_with" in message
    assert "is not signed by anybody in team.signers" in prefcache("train", "-q", scored, *demand, code=4).stderr
    in_the_way = prefcache("score", "-q", scored, *demand, *options(f"score.sign_with={ann}"), code=4).stderr
    assert "stand where this would write" in in_the_way and "prefcache sign" in in_the_way
    prefcache("sign", "--key", ann)
    assert score(prefcache, scored, *demand)["tokens"] == 0
    prefcache("train", "-q", scored, *demand, "--set", "train.max_steps=2")


def test_a_key_that_would_not_be_accepted_is_refused_before_anything_is_scored(prefcache, prepared, demand, tmp_path):
    eve = make_key(tmp_path / "eve")
    message = prefcache("score", "-q", prepared, *demand, *options(f"score.sign_with={eve}"), code=2).stderr
    assert "is not among the keys of team.signers" in message
    assert not list(tmp_path.glob("cache/*/*.parquet"))
    missing = options("allowed_signers=nowhere", f"score.sign_with={eve}")
    assert (
        "There is no file of allowed signers at nowhere" in prefcache("score", "-q", prepared, *missing, code=2).stderr
    )


def test_rows_that_were_changed_after_signing_serve_nothing(prefcache, prepared, signing, demand, tmp_path):
    score(prefcache, prepared, *signing)
    folder = cache_folder(tmp_path)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    rewrite(folder, shrink)
    for command in (
        ["train", prepared, *demand],
        ["sql", "select count(*) from reference", "runs/tiny"],
        ["report", "runs/tiny"],
    ):
        message = prefcache(*command, code=4).stderr
        assert "is not what was signed" in message and "allowed_signers demands a signature" in message
    for path in folder.iterdir():
        path.unlink()
    for path, data in whole.items():
        path.write_bytes(data)
    prefcache("sql", "select count(*) from reference", "runs/tiny")
    # Ann leaves the team.
    (tmp_path / "team.signers").write_text("")
    assert (
        "is not signed by anybody in" in prefcache("sql", "select count(*) from reference", "runs/tiny", code=4).stderr
    )
    (tmp_path / "team.signers").unlink()
    assert (
        "no file of allowed signers" in prefcache("sql", "select count(*) from reference", "runs/tiny", code=2).stderr
    )


def test_unsigned_rows_of_other_data_in_the_same_cache_are_no_hindrance(prefcache, prepared, signing, demand, tmp_path):
    write_pairs(tmp_path / "more.jsonl", 20, start=200)
    more = options("prepare.data=more.jsonl", "out=runs/more")
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", prepared, *more)
    done = prefcache("score", prepared, *signing, "--json")
    assert json.loads(done.stdout)["scored"] == N
    assert "not used, because" in done.stderr
    prefcache("train", "-q", prepared, *demand, "--set", "train.max_steps=2")


def test_an_interrupted_scorer_leaves_no_shard_that_is_not_signed(prefcache, prepared, signing, tmp_path, monkeypatch):
    commit, left = CacheWriter.commit, iter(range(4))

    def interrupt(self, *arguments, **further):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return commit(self, *arguments, **further)

    monkeypatch.setattr(CacheWriter, "commit", interrupt)
    prefcache("score", "-q", prepared, *signing, code=130)
    assert len(list_statements(cache_folder(tmp_path))) == 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = score(prefcache, prepared, *signing)
    assert result["scored"] < N and result["sequences"] == N
    assert len(list_statements(cache_folder(tmp_path))) == 1
    assert score(prefcache, prepared, *signing)["tokens"] == 0


@pytest.mark.slow  # three processes, each of which loads PyTorch
def test_scorers_that_share_the_work_and_a_key_leave_everything_signed(prefcache, prepared, signing, tmp_path):
    commands = [[PREFCACHE, "score", "-q", "config.yaml", *signing] for _ in range(3)]
    scorers = [start(*command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [(each.wait(200), each.communicate()[1]) for each in scorers] == [(0, "")] * 3
    assert score(prefcache, prepared, *signing)["tokens"] == 0
    rows = json.loads(prefcache("sql", "select count(*) n from sequences", "runs/tiny", "--json").stdout)
    assert rows == [{"n": N}]


def test_what_is_fetched_is_signed_by_who_fetched_it(prefcache, scored, signing, ann, tmp_path):
    cache_folder(tmp_path).rename(tmp_path / "theirs")
    assert "is not signed by anybody" in prefcache("fetch", "-q", scored, "theirs", *signing, code=4).stderr
    prefcache("sign", "theirs", "--key", ann)
    assert "score.sign_with" in prefcache("fetch", "-q", scored, "theirs", *signing[:2], code=2).stderr
    result = json.loads(prefcache("fetch", "-q", scored, "theirs", *signing, "--json").stdout)
    assert (result["rows"], result["signers"]) == (N, ["ann@example.com"])
    assert score(prefcache, scored, *signing)["tokens"] == 0


# -- in an object store ----------------------------------------------------------------------------------------------


def test_a_shard_that_comes_after_the_check_is_not_signed(scored, ann, tmp_path, monkeypatch):
    """The newcomer has a log-prob above zero, which the check would have refused."""
    from prefcache.commands import sign
    from prefcache.pipeline.progress import Progress
    from prefcache.pipeline.stored import cache_maintenance
    from prefcache.pipeline.stored.cache import Cache

    folder = cache_folder(tmp_path)
    verify = cache_maintenance.verify

    def verify_then_commit(folder):
        result = verify(folder)
        cache = Cache(folder, None)
        (record, *_) = cache.records
        rows = cache.read(record).to_pylist()[:1]
        rows[0] |= {
            "key": b"x" * 16,
            "logps": [1.0] * rows[0]["n_completion"],
            "logp_sum": 1.0 * rows[0]["n_completion"],
        }
        CacheWriter(cache).commit(pa.Table.from_pylist(rows, CACHE), record.numerics, record.numerics_id, None)
        return result

    monkeypatch.setattr(cache_maintenance, "verify", verify_then_commit)
    n = len(shards.list_records(folder))
    with Progress(quiet=True) as progress:
        (signed,) = sign.run([str(folder)], ann, progress).caches
    assert len(shards.list_records(folder)) == n + 1
    assert (signed.signed, signed.already) == (n, 0)


def test_signatures_travel_through_an_object_store(prefcache, prepared, signing, demand, s3, tmp_path, monkeypatch):
    in_store = [*signing, *options(f"cache={s3.url}")]
    assert score(prefcache, prepared, *in_store)["scored"] == N
    names = [name.rpartition("/")[2] for name in s3.objects()]
    assert sum(name.startswith("signed-") for name in names) == 2  # one statement and its signature
    # Another machine, which has nothing but the store and the list of its people.
    monkeypatch.setenv("PREFCACHE_MIRROR", str(tmp_path / "another"))
    assert score(prefcache, prepared, *in_store)["tokens"] == 0
    prefcache("train", "-q", prepared, *in_store, "--set", "train.max_steps=2")
    # Somebody with the keys of the bucket puts other values there, with records that fit.
    (folder,) = (path.parent for path in tmp_path.glob("another/*/*/reference.json"))
    forged = tmp_path / "forged" / folder.name
    forged.mkdir(parents=True)
    for path in [*folder.glob("*.json"), *folder.glob("*.parquet")]:
        (forged / path.name).write_bytes(path.read_bytes())
    rewrite(forged, shrink)
    for path in shards.list_records(forged):
        for file in (path, *forged.glob(f"{path.stem}-*.parquet")):
            s3.client.put_object(Bucket=s3.name, Key=f"refs/{folder.name}/{file.name}", Body=file.read_bytes())
    message = prefcache("train", "-q", prepared, *in_store, "--set", "train.run=second", code=4).stderr
    assert "is not what was signed" in message


def test_what_is_in_an_object_store_is_signed_and_fetched_there(prefcache, prepared, demand, ann, s3, tmp_path):
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", prepared, *options(f"cache={s3.url}", "out=runs/theirs"))
    folder = next(name for name in s3.objects()).partition("/")[0]
    source = f"{s3.url}/{folder}"
    allowed = ("--allowed-signers", tmp_path / "team.signers")
    assert "is not signed by anybody" in prefcache("fetch", "-q", prepared, source, *allowed, code=4).stderr
    result = json.loads(prefcache("sign", "-q", source, "--key", ann, "--json").stdout)
    assert result["caches"][0]["signed"] > 1 and result["caches"][0]["place"] == source
    fetched = json.loads(prefcache("fetch", "-q", prepared, source, *allowed, "--json").stdout)
    assert (fetched["rows"], fetched["source"], fetched["signers"]) == (N, source, ["ann@example.com"])
    assert score(prefcache, prepared)["tokens"] == 0


def test_lookups_from_python_serve_what_is_signed(prefcache, scored, demand, ann, model, tmp_path):
    import prefcache as api
    from prefcache.pipeline.stored.prepared import Prepared

    keys = Prepared(tmp_path / "runs/tiny/prepared").table()["chosen_key"]
    signers = tmp_path / "team.signers"
    demanding = api.open_cache(tmp_path / "cache", model=model, allowed_signers=signers, quiet=True)
    assert demanding.logps_of_keys(keys).missing.all()
    prefcache("sign", "--key", ann)
    assert not demanding.logps_of_keys(keys).missing.any()
