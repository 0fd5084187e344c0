"""What is out of date is named with the value that was stored and the one that it has now."""

from pathlib import Path

from prefcache.pipeline.stored.freshness import Difference, Freshness, check_rows, find_differences
from prefcache.pipeline.stored.prepared import sequence_table
from prefcache.pipeline.stored.scoring_plan import plan_scoring
from tests.helpers.caches import BUDGET, MINE, NUMERICS, OTHER, PAIRS, create, fill


def test_nested_settings_are_compared_key_by_key():
    stored = {"beta": 0.1, "config": {"seed": 1, "lora": {"r": 8, "alpha": 16}}, "ids": "a"}
    now = {"beta": 0.1, "config": {"seed": 2, "lora": {"r": 8, "alpha": 32}}, "ids": "b"}
    assert find_differences(stored, now, ignore=["ids"]) == (
        Difference("config.lora.alpha", 16, 32),
        Difference("config.seed", 1, 2),
    )


def test_a_key_that_an_earlier_version_did_not_write_counts_as_null():
    assert find_differences({}, {"new": None, "nested": None}) == ()
    assert find_differences({"config": {}}, {"config": {"new": 3}}) == (Difference("config.new", None, 3),)


def test_files_are_compared_by_name_and_their_order_counts():
    a, b, changed = ({"file": name, "xxh3_128": "0" * 32} for name in ("a", "b", "a"))
    changed["xxh3_128"] = "1" * 32
    assert find_differences({"data": [[a, b]]}, {"data": [[changed, b]]}) == (
        Difference("data.0.a.xxh3_128", "0" * 32, "1" * 32),
    )
    assert [each.what for each in find_differences({"data": [[a]]}, {"data": [[a, b]]})] == ["data.0.b"]
    assert [each.what for each in find_differences({"data": [[a, b]]}, {"data": [[b, a]]})] == ["data.0"]


def test_the_sentence_names_each_reason_and_shortens_hashes():
    folder = Path("runs/x")
    assert Freshness("run", folder).explain() == "runs/x is up to date"
    assert Freshness("run", folder, is_stored=False).explain() == "runs/x does not exist yet"
    stale = Freshness("run", folder, differences=(Difference("prepared", "a" * 32, "b" * 32), Difference("x", None, 1)))
    assert stale.explain() == "runs/x is out of date: prepared aaaaaaaa (now bbbbbbbb); x none (now 1)"
    assert not stale.is_fresh and Freshness("run", folder, damage="it is not finished").reasons == [
        "it is not finished"
    ]


def test_rows_say_what_they_were_scored_with_instead(tmp_path):
    cache = fill(fill(create(tmp_path), PAIRS.slice(0, 2)), PAIRS.slice(2, 3), OTHER)

    def check(accepted: str) -> Freshness:
        plan = plan_scoring(cache, sequence_table(PAIRS.slice(0, 5)), [accepted], BUDGET)
        return check_rows(cache, plan, NUMERICS[accepted])

    assert check(MINE).reasons == [
        "6 of 10 sequences were scored with dtype none (now float32)",
        "6 of 10 sequences were scored with engine other (now mine)",
    ]
    assert check_rows(cache, plan_scoring(cache, sequence_table(PAIRS.slice(0, 2)), [MINE], BUDGET), {}).is_fresh
    plan = plan_scoring(cache, sequence_table(PAIRS.slice(0, 6)), [MINE, OTHER], BUDGET)
    assert check_rows(cache, plan, NUMERICS[MINE]).reasons == ["2 of 12 sequences were never scored"]


def test_a_cache_in_a_store_is_named_by_its_url(machine, s3):
    cache = fill(machine("here"), PAIRS.slice(0, 2))
    rows = check_rows(cache, plan_scoring(cache, sequence_table(PAIRS.slice(0, 2)), [MINE], BUDGET), {})
    assert rows.explain() == f"{s3.url}/{cache.folder.name} is up to date"
