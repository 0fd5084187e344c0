"""SQL over an experiment: rewards by hand, and statements that want anything else are refused."""

import dataclasses
import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from PIL import Image

from prefcache.pipeline import views
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.images import decode
from prefcache.pipeline.questions import get_question
from prefcache.pipeline.schema import EVENTS, IMAGES, METRICS, PREPARED, QUARANTINE, STEPS, THROUGHPUT, TOKENS
from tests.helpers.experiments import KEYS, N0, N1, N2, PAIRS, SCORES, cache, parquet, run_of, sources, visit
from tests.helpers.illustrated import encode, id_of, image_row
from tests.helpers.vision_models import picture


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    return views.connect(sources(tmp_path_factory.mktemp("experiment"), {"trained": 0.1}))


def ask(con, query: str) -> list[tuple]:
    return list(views.ask(con, query).rows())


def ask_ready(folder: Path, name: str, margins: dict[str, list[float]]) -> list[tuple]:
    """Ask a ready question about visits with these margins at steps 1, 2, ... Their log-ratios are ten times as far apart."""
    rows = [
        visit(step, example_id, 10 * margin - 5.0, -6.0, -5.0, -6.0)
        for example_id, each in margins.items()
        for step, margin in enumerate(each, 1)
    ]
    made = views.Sources(
        prepared=pa.Table.from_pylist([PAIRS[0] | {"example_id": each} for each in margins], schema=PREPARED["pairs"]),
        steps=[parquet(folder / "trained/steps/to-00000009.parquet", rows, STEPS)],
        runs=pa.Table.from_pylist([run_of(folder, "trained")], schema=views.RUNS),
    )
    found = get_question(name)
    return list(views.ask(views.connect(made), found.sql, parameters=found.values({})).rows())


# -- the views -------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_latest_visit_by_hand(con):
    found = ask(con, "select * from rewards order by example_id")
    # e0 at step 2: chosen 0.1 * (-3 + 5) = 0.2, rejected 0.1 * (-10 + 6) = -0.4, margin 0.6
    # e1 at step 2: chosen 0.1 * (-9.5 + 7.5) = -0.2, rejected 0.1 * (-7 + 8) = 0.1, margin -0.3
    assert [row[:4] for row in found] == [("trained", "e0", "train", 2), ("trained", "e1", "held_out", 2)]
    assert found[0][4:7] == pytest.approx((0.2, -0.4, 0.6)) and found[0][7] is True
    assert found[1][4:7] == pytest.approx((-0.2, 0.1, -0.3)) and found[1][7] is False


def test_steps_are_every_visit_with_its_rewards_by_hand(con):
    found = ask(
        con, "select step, example_id, epoch, chosen_reward, rejected_reward, margin, loss from steps order by 1, 2"
    )
    assert [row[:3] for row in found] == [(0, "e1", 0.0), (1, "e0", 0.5), (2, "e0", 1.0), (2, "e1", 1.0)]
    # Before the first update policy and reference agree, so every reward is 0.
    assert [row[3:6] for row in found[:2]] == [(0, 0, 0), (0, 0, 0)]
    assert found[2][3:] == pytest.approx((0.2, -0.4, 0.6, 0.4))


def test_every_run_has_its_own_beta(tmp_path):
    # Also where the name of one run begins with that of another.
    con = views.connect(sources(tmp_path, {"trained": 0.1, "trained-1": 0.5}))
    found = ask(con, "select run, margin from rewards where example_id = 'e0' order by run")
    assert [run for run, _ in found] == ["trained", "trained-1"]
    assert [margin for _, margin in found] == pytest.approx([0.6, 3.0])  # 0.1 * 6 and 0.5 * 6


@pytest.mark.parametrize("run", ["loss=ipo", "beta=0.7", "step=3", "run=x", "it's", "a b"])
def test_the_name_of_a_run_does_not_change_what_is_read(tmp_path, run):
    con = views.connect(sources(tmp_path, {run: 0.1}))
    found = ask(con, "select run, step, margin, loss from steps where example_id = 'e0' order by step desc limit 1")
    assert found[0][:2] == (run, 2) and found[0][2:] == pytest.approx((0.6, 0.4))


LABELS = [
    {"example_id": name, "completion_logp": own, "ref_completion_logp": ref, "n_completion_counted": n, "label": label}
    for name, own, ref, n, label in (
        ("good", -4.0, -6.0, 2, True),
        ("dull", -6.0, -4.0, 2, True),
        ("bad", -9.0, -4.0, 5, False),
        ("liked", -1.0, -4.0, 3, False),
        ("new", -4.0, -4.0, 1, True),
        ("newbad", -4.0, -4.0, 1, False),
    )
]


def one_run(folder: Path, rows: list[dict], schema: pa.Schema = STEPS, **facts) -> duckdb.DuckDBPyConnection:
    """An experiment with one run, whose only part has these rows."""
    rows = [{"step": 1, "epoch": 1.0, "split": "train", "loss": 0.5} | row for row in rows]
    part = parquet(folder / "r" / "steps" / "to-00000001.parquet", rows, schema)
    run = run_of(folder, "r", loss="kto", **{"beta": 0.5, **facts})
    return views.connect(views.Sources(steps=[part], runs=pa.Table.from_pylist([run], schema=views.RUNS)))


def test_rewards_of_labels_by_hand(tmp_path):
    found = ask(
        one_run(tmp_path, LABELS),
        "select example_id, completion_reward, label, correct, chosen_reward, margin from rewards order by completion_reward, 1",
    )
    # 0.5 * (-4 + 6) = 1 of a desirable answer is right, -1 is wrong; of undesirable ones -2.5 is right and 1.5 wrong. As
    # for pairs, a reward of 0 is right for neither.
    assert found == [
        ("bad", -2.5, False, True, None, None),
        ("dull", -1.0, True, False, None, None),
        ("new", 0.0, True, False, None, None),
        ("newbad", 0.0, False, False, None, None),
        ("good", 1.0, True, True, None, None),
        ("liked", 1.5, False, False, None, None),
    ]


@pytest.mark.parametrize("reference", [0.0, None])  # train.reference_free, and a loss that reads none
def test_without_a_reference_a_labels_reward_does_not_say_whether_it_is_right(tmp_path, reference):
    rows = [{**row, "ref_completion_logp": reference} for row in LABELS[:2]]
    found = ask(one_run(tmp_path, rows), "select completion_reward < 0, correct from rewards")
    assert found == [(True, None)] * 2
    pair = {"example_id": "p", "chosen_logp": -2.0, "rejected_logp": -5.0}
    assert ask(one_run(tmp_path / "pair", [pair]), "select margin, correct from rewards") == [(1.5, True)]


def test_steps_of_labels_have_their_log_probs(tmp_path):
    found = ask(one_run(tmp_path, LABELS[:1]), "select completion_logp, ref_completion_logp, label, loss from steps")
    assert found == [(-4.0, -6.0, True, 0.5)]


def test_rewards_per_token_where_the_loss_has_them(tmp_path):
    pair = visit(1, "e", -6.0, -4.0, None, None) | {"n_chosen_counted": 3, "n_rejected_counted": 1}
    query = "select chosen_reward, rejected_reward, margin, correct from rewards"
    # 0.5 * -6 / 3 = -1 and 0.5 * -4 / 1 = -2, with a reference of 0; summed, -3 and -2.
    assert ask(one_run(tmp_path / "a", [pair], per_token=True), query) == [(-1, -2, 1, True)]
    assert ask(one_run(tmp_path / "b", [pair]), query) == [(-3, -2, -1, False)]
    labels = ask(one_run(tmp_path / "c", LABELS[:1], per_token=True), "select completion_reward from rewards")
    assert labels == [(0.5,)]  # 0.5 * 2 / 2


@pytest.mark.parametrize(
    ("rejected", "expected"),
    [
        (-4.0, (-1.5, -2, 0.5, True)),  # a run without a reference has a reference of 0: 0.5 * -3 and 0.5 * -4
        (None, (-1.5, None, None, None)),  # of chosen answers alone: no margin
    ],
)
def test_a_run_without_a_reference_has_a_reference_of_zero(tmp_path, rejected, expected):
    con = one_run(tmp_path, [visit(1, "e", -3.0, rejected, None, None)])
    assert ask(con, "select ref_chosen_logp from steps") == [(None,)]
    assert ask(con, "select chosen_reward, rejected_reward, margin, correct from rewards") == [expected]


# What a run wrote before labels and lengths were there.
OLD = pa.schema([STEPS.field(name) for name in visit(0, "", 0, 0, 0, 0)])


def test_runs_of_an_earlier_version_are_read_with_what_they_have(tmp_path):
    assert "label" not in OLD.names and not any("n_chosen" in name for name in OLD.names)
    con = one_run(tmp_path, [visit(2, "e0", -3.0, -10.0, -5.0, -6.0)], OLD)
    # 0.5 * (-3 + 5) = 1 and 0.5 * (-10 + 6) = -2
    assert ask(con, "select chosen_reward, rejected_reward, margin, correct, label from rewards") == [
        (1, -2, 3, True, None)
    ]
    described = {name: [column for column, _ in columns] for name, _, columns in views.describe()}
    assert views.ask(con, "select * from steps").columns == described["steps"]


# What a run wrote when every token of an answer counted.
BEFORE_MASKS = pa.schema(
    [field.with_name(field.name.removesuffix("_counted")) if field.name.startswith("n_") else field for field in STEPS]
)


def test_lengths_of_an_earlier_version_are_those_of_tokens_that_count(tmp_path):
    assert {"n_chosen", "n_rejected", "n_completion"} <= set(BEFORE_MASKS.names)
    rows = [visit(1, "e", -6.0, -4.0, None, None) | {"n_chosen": 3, "n_rejected": 1}]
    con = one_run(tmp_path, rows, BEFORE_MASKS, per_token=True)
    # 0.5 * -6 / 3 = -1 and 0.5 * -4 / 1 = -2
    query = "select n_chosen_counted, n_rejected_counted, chosen_reward, rejected_reward from steps"
    assert ask(con, query) == [(3, 1, -1, -2)]


def test_old_and_new_runs_stand_side_by_side(tmp_path):
    old = parquet(tmp_path / "old/steps/to-00000001.parquet", [visit(1, "e0", -3.0, -10.0, -5.0, -6.0)], OLD)
    label = {"step": 1, "epoch": 1.0, "split": "train", "loss": 0.5} | LABELS[0]
    new = parquet(tmp_path / "new/steps/to-00000001.parquet", [label], STEPS)
    runs = [run_of(tmp_path, name, beta=0.5, per_token=name == "new") for name in ("old", "new")]
    for visits in ([old, new], [new, old]):
        con = views.connect(views.Sources(steps=visits, runs=pa.Table.from_pylist(runs, schema=views.RUNS)))
        found = ask(con, "select run, margin, completion_reward, label from rewards order by run")
        assert found == [("new", None, 0.5, True), ("old", 3.0, None, None)]


NO_IMAGES = {"images": [], "n_images": 0, "n_image_tokens": 0}


def test_examples_are_the_prepared_pairs(con):
    found = views.ask(con, "select * from examples order by line")
    first = dict(zip(found.columns, next(found.rows()), strict=True))
    keys = {"chosen_key": "00" * 16, "rejected_key": "01" * 16}
    # What labels have, and what was not said of this pair, is null.
    shown = {name: value for name, value in PAIRS[0].items() if not name.endswith("_spans")}
    turns = {f"n_{name}_turns": len(PAIRS[0][f"{name}_spans"]) // 2 for name in ("chosen", "rejected")}
    shown |= keys | turns | NO_IMAGES | {"position": 0}
    assert {name: value for name, value in first.items() if value is not None} == shown


def test_examples_are_the_prepared_labels_too(tmp_path):
    label = {"example_id": "e0", "split": "train", "line": 1, "prompt": "why?", "completion": "so", "label": False}
    label |= {"n_prompt": 3, "n_completion": 2, "completion_key": KEYS[0], "kl_of": "e1", "kl_key": KEYS[1], "n_kl": 1}
    prepared = pa.Table.from_pylist([label], schema=PREPARED["labels"])
    con = views.connect(dataclasses.replace(sources(tmp_path, {}), prepared=prepared))
    assert ask(con, "select * from pairs") == []
    found = views.ask(con, "select * from examples")
    (row,) = found.rows()
    keys = {"completion_key": "00" * 16, "kl_key": "01" * 16}
    shown = {name: value for name, value in zip(found.columns, row, strict=True) if value is not None}
    assert shown == label | keys | NO_IMAGES | {"position": 0}
    # Both sequences of a label join the reference.
    joined = ask(con, "select kl_key = key, logp_sum from examples join reference on key in (completion_key, kl_key)")
    assert sorted(joined) == [(False, -5.0), (True, -6.0)]


def test_images_are_the_pictures_of_the_prompts_and_join_the_examples(tmp_path):
    red, noise = (decode(encode(each)) for each in (Image.new("RGB", (4, 3), "red"), picture(2, 5)))
    # One picture in both prompts, twice in the second, and another one that the second has as well.
    of_prompts = [[id_of(red)], [id_of(red), id_of(noise), id_of(red)]]
    pairs = [pair | {"images": images} for pair, images in zip(PAIRS, of_prompts, strict=True)]
    made = dataclasses.replace(
        sources(tmp_path, {}),
        prepared=pa.Table.from_pylist(pairs, schema=PREPARED["pairs"]),
        images=pa.Table.from_pylist([image_row(red), image_row(noise)], schema=IMAGES),
    )
    con = views.connect(made)
    found = ask(con, "select image, pixels, tag, width, height, format, bytes, n_examples from images order by width")
    assert found == [
        (id_of(noise).hex(), noise.hash.hex(), noise.tag, 2, 5, "PNG", len(noise.encoded), 1),
        (id_of(red).hex(), red.hash.hex(), red.tag, 4, 3, "PNG", len(red.encoded), 2),
    ]
    for view in ("examples", "pairs"):
        found = ask(con, f"select images, n_images from {view} order by example_id")
        assert found == [([each.hex() for each in images], len(images)) for images in of_prompts]
    joined = ask(
        con,
        "select example_id, width from (select example_id, unnest(images) as image from examples) join images using (image)",
    )
    assert sorted(joined) == [("e0", 4), ("e1", 2), ("e1", 4), ("e1", 4)]


def test_image_tokens_of_a_prompt_are_those_of_its_images_and_unknown_where_they_were_not_stored(tmp_path):
    new, old = (decode(encode(picture(*size))) for size in ((4, 3), (2, 5)))
    prompts = [[], [id_of(new)], [id_of(new), id_of(new)], [id_of(old), id_of(new)]]
    pairs = [PAIRS[0] | {"example_id": f"e{i}", "images": images} for i, images in enumerate(prompts)]
    made = views.Sources(
        prepared=pa.Table.from_pylist(pairs, schema=PREPARED["pairs"]),
        images=pa.Table.from_pylist(
            [image_row(new) | {"n_tokens": 7}, image_row(old) | {"n_tokens": None}], schema=IMAGES
        ),
    )
    for view in ("examples", "(select distinct example_id, n_image_tokens from sequences)"):
        found = ask(views.connect(made), f"select n_image_tokens from {view} order by example_id")
        assert found == [(0,), (7,), (14,), (None,)]


def test_the_bytes_of_pictures_are_not_in_the_views(con):
    types = ask(con, "select column_type from (describe images)")
    assert ("BLOB",) not in types and len(types) == 10


def test_reference_is_the_cache_and_joins_the_examples(con):
    found = ask(
        con,
        "select example_id, reference, logp_sum, logp_per_token, logps, status from examples "
        "join reference on key in (chosen_key, rejected_key) order by key",
    )
    assert found == [
        ("e0", "org/tiny", -5.0, -2.5, [-2.0, -3.0], "ok"),  # -5 over 2 tokens
        ("e0", "org/tiny", -6.0, -6.0, [-6.0], "ok"),
        ("e1", "org/tiny", -7.5, -2.5, None, "ok"),
        ("e1", "org/tiny", None, None, None, "failed: not finite"),
    ]


@pytest.mark.parametrize("first", ["failed", "scored"])
def test_of_a_failed_row_and_a_good_one_the_good_one_is_shown(tmp_path, first):
    """Another scorer had no value for the sequence, before or after."""
    failed = SCORES[0] | {"logp_sum": None, "logps": None, "status": "failed: not finite"}
    # Of two shards each, so that either may be read first.
    chunks = [[failed, SCORES[1]], [SCORES[0]]]
    for rows in chunks if first == "failed" else chunks[::-1]:
        found = cache(tmp_path, "org/tiny", rows)
    con = views.connect(views.Sources(references=[views.Reference(found, ["n1"])], shards=found.shards))
    assert ask(con, "select logp_sum, status from reference order by key") == [(-5.0, "ok"), (-6.0, "ok")]


OTHER = [dict(row, logp_sum=-1.0 - i, logps=None, status="ok") for i, row in enumerate(SCORES[:2])]


@pytest.fixture
def two_references(tmp_path):
    """The first pair is scored by two references, the second, of which one answer failed, by the first alone."""
    made = sources(tmp_path, {})
    other = views.Reference(cache(tmp_path, "org/other", OTHER, "b" * 64, N2), [N2], used=False)
    return views.connect(
        dataclasses.replace(made, references=[*made.references, other], shards=[*made.shards, *other.cache.shards])
    )


def test_pairs_have_what_each_reference_says_of_them_by_hand(two_references):
    found = ask(
        two_references,
        "select example_id, reference, used, ref_chosen_logp, ref_rejected_logp, margin, margin_per_token, length_difference "
        "from pairs order by used desc, example_id",
    )
    assert found == [
        # -5 + 6 = 1; per token -5/2 + 6/1 = 3.5; 2 - 1 tokens
        ("e0", "org/tiny", True, -5.0, -6.0, 1.0, 3.5, 1),
        ("e1", "org/tiny", True, -7.5, None, None, None, 2),
        # -1 + 2 = 1; per token -1/2 + 2/1 = 1.5
        ("e0", "org/other", False, -1.0, -2.0, 1.0, 1.5, 1),
    ]
    assert ask(two_references, "select distinct model_id, used from reference order by 1") == [
        ("a" * 12, True),
        ("b" * 12, False),
    ]


def test_pairs_have_the_sums_of_the_tokens_that_count_and_whole_ones_by_hand(tmp_path):
    # Of e0's chosen answer, -2 and -3, the second token counts; of e1's, of which only the sum of three is cached, two do.
    masks = {
        "e0": {"n_chosen_counted": 1, "chosen_spans": [1, 2]},
        "e1": {"n_chosen_counted": 2, "chosen_spans": [0, 1, 2, 3]},
    }
    prepared = pa.Table.from_pylist([row | masks[row["example_id"]] for row in PAIRS], schema=PREPARED["pairs"])
    con = views.connect(dataclasses.replace(sources(tmp_path, {}), prepared=prepared))
    columns = (
        "n_chosen, n_chosen_counted, ref_chosen_logp, ref_chosen_logp_all, ref_rejected_logp, ref_rejected_logp_all"
    )
    assert ask(con, f"select {columns}, margin, margin_per_token, length_difference from pairs order by line") == [
        (2, 1, -3.0, -5.0, -6.0, -6.0, 3.0, 3.0, 0),  # -3 + 6
        (3, 2, None, -7.5, None, None, None, None, 1),
    ]
    # The cache holds what it held.
    assert ask(con, "select logp_sum, logps from reference order by key limit 1") == [(-5.0, [-2.0, -3.0])]


def test_pairs_have_the_values_of_the_numerics_that_count_first(tmp_path):
    made = sources(tmp_path, {})
    both = cache(tmp_path, "org/tiny", [dict(SCORES[0], logp_sum=-4.0)], numerics_id=N0)
    query = "select ref_chosen_logp from pairs where example_id = 'e0'"
    for accepted, expected in (([N1, N0], -5.0), ([N0, N1], -4.0), ([N0], -4.0)):
        con = views.connect(dataclasses.replace(made, references=[views.Reference(both, accepted)], shards=both.shards))
        assert ask(con, query) == [(expected,)]
    assert ask(
        con, "select numerics_id, engine, dtype, used from reference where key = repeat('00', 16) order by 1"
    ) == [
        (N0, "transformers", "float32", True),
        (N1, "transformers", "float32", False),
    ]


def test_pairs_are_there_before_they_are_scored(tmp_path):
    con = views.connect(dataclasses.replace(sources(tmp_path, {}), references=[], shards=[]))
    found = ask(con, "select reference, used, example_id, margin, length_difference from pairs order by line")
    assert found == [(None, True, "e0", None, 1), (None, True, "e1", None, 2)]


def test_pairs_have_the_computed_columns_of_train_where(con):
    from prefcache.pipeline.training.example_expression import column_names

    of_view = views.ask(con, "select * from pairs").columns
    assert set(column_names("pairs")) <= set(of_view)


def test_sequences_are_the_answers_of_every_example_by_hand(con):
    found = ask(con, "select example_id, answer, n_prompt, n_completion, n_tokens, text from sequences order by key")
    assert found == [
        ("e0", "chosen", 3, 2, 5, "yes"),
        ("e0", "rejected", 3, 1, 4, "no"),
        ("e1", "chosen", 3, 3, 6, "yes"),
        ("e1", "rejected", 3, 1, 4, "no"),
    ]
    assert ask(con, "select count(*) from sequences join reference using (key)") == [(4,)]


def test_pairs_are_learnt_or_forgotten_once_for_all_or_go_back_and_forth(tmp_path):
    margins = {
        "right": [1, 1, 2],
        "learnt": [-1, -1, 1],
        "forgotten": [1, -1, -1],
        # Its last right visit is before its last wrong one, and after its first.
        "lost, regained and lost": [1, -1, 1, -1],
        "gained, lost and regained": [-1, 1, -1, 1],
        "wrong": [-1, -2],
        "at 0 first": [0, 0, 1],
        "nowhere": [0, 0],
    }
    found = {row[2]: row[3] for row in ask_ready(tmp_path, "learning", margins)}
    assert found == {"always right": 2, "learnt": 1, "forgotten": 1, "back and forth": 2, "never right": 1}


def test_a_margin_of_exactly_0_is_not_unlearned(tmp_path):
    """It is that of a policy that is still its reference."""
    margins = {"still": [0, 0], "wrong, then back at 0": [-2, 0], "forgotten": [0, 1, -1], "right": [0, 1]}
    found = {row[0]: row[5:8] for row in ask_ready(tmp_path, "unlearned", margins)}
    assert found == {
        "wrong, then back at 0": (1, "never right", pytest.approx(-2)),
        "forgotten": (2, "forgotten", pytest.approx(-1)),
    }


def test_metrics_are_wide_and_have_what_any_run_measures(tmp_path):
    plain = parquet(tmp_path / "a/metrics/to-1.parquet", [{"step": 1, "loss": 0.5}], METRICS)
    mixed_schema = pa.schema([*METRICS, ("loss/sft", pa.float64())])
    mixed = parquet(tmp_path / "b/metrics/to-1.parquet", [{"step": 1, "loss": 0.7, "loss/sft": 2.0}], mixed_schema)
    runs = pa.Table.from_pylist([run_of(tmp_path, name) for name in "ab"], schema=views.RUNS)
    for parts in ([plain, mixed], [mixed, plain]):
        con = views.connect(views.Sources(metrics=parts, runs=runs))
        assert ask(con, 'select run, step, loss, "loss/sft" from metrics order by run') == [
            ("a", 1, 0.5, None),
            ("b", 1, 0.7, 2.0),
        ]
        assert views.ask(con, "from metrics").columns == ["run", *METRICS.names, "loss/sft"]


def test_quarantine_shows_what_was_read_as_text(tmp_path):
    row = {"source": "a.jsonl", "line": 3, "reason": "tie", "detail": "", "raw": "né".encode()}
    broken = dict(row, line=4, raw=b"\xff\x00a")
    con = views.connect(views.Sources(quarantine=[parquet(tmp_path / "quarantine.parquet", [row, broken], QUARANTINE)]))
    assert ask(con, "select line, reason, raw from quarantine") == [(3, "tie", "né"), (4, "tie", "\\xFF\\x00a")]


def test_the_quarantine_of_an_earlier_version_has_no_numbers(tmp_path):
    row = {"source": "a.jsonl", "line": 3, "reason": "too long", "detail": "5 + 6 tokens", "raw": b"x"}
    earlier = pa.schema([field for field in QUARANTINE if field.name in row])
    con = views.connect(views.Sources(quarantine=[parquet(tmp_path / "quarantine.parquet", [row], earlier)]))
    assert ask(con, "select reason, n_found, n_limit, n_tokens from quarantine") == [("too long", None, None, None)]


def test_a_shortened_text_is_one_line_and_says_that_it_goes_on():
    con = views.connect(views.Sources())
    assert ask(con, "select shorten('a\n\n b'), shorten('abcdef', most := 3), shorten(null)") == [("a b", "abc…", None)]


def test_single_tokens_are_those_that_a_run_stored(tmp_path):
    made = sources(tmp_path, {"trained": 0.1})
    file = tmp_path / "trained" / "tokens.parquet"
    row = {"example_id": "x", "gain": 1.0, "answer": "chosen", "tokens": ["a", "b"], "logps": [-1.0, None]}
    parquet(file, [row | {"ref_logps": [-1.5, None]}], TOKENS)
    con = views.connect(dataclasses.replace(made, tokens=[str(file)]))
    assert ask(con, "select run, example_id, answer, place, token, logp, ref_logp, log_ratio from tokens") == [
        ("trained", "x", "chosen", 0, "a", -1.0, -1.5, 0.5),
        ("trained", "x", "chosen", 1, "b", None, None, None),
    ]


def test_alerts_and_throughput_are_those_of_every_run_by_hand(tmp_path):
    alert = {"step": 30, "kind": "kl", "severity": "warning", "metric": "kl", "value": 120.0}
    alert |= {"seen": "kl is 120", "why": "it drifts", "try": "a larger train.beta"}
    timed = {"step": 2, "seconds": 0.5, "examples_per_second": 16.0, "tokens_per_second": 400.0, "peak_memory_bytes": 9}
    timed |= {"flops": 8e9, "mfu": None}
    made = sources(tmp_path, {"trained": 0.1, "trained-1": 0.5})
    con = views.connect(
        dataclasses.replace(
            made,
            events=[parquet(tmp_path / "trained-1/events/to-00000040.parquet", [alert], EVENTS)],
            throughput=[parquet(tmp_path / "trained/throughput/to-00000002.parquet", [timed], THROUGHPUT)],
        )
    )
    (found,) = ask(con, "select run, step, kind, severity, metric, value, seen, why, try from alerts")
    assert found == ("trained-1", *alert.values())
    assert ask(con, "select * from throughput") == [("trained", *timed.values())]


def test_before_anything_is_prepared_the_views_are_empty():
    con = views.connect(views.Sources())
    assert [ask(con, f"select * from {name}") for name in views.VIEWS] == [[]] * len(views.VIEWS)


VIEWS = [
    *("alerts", "checkpoints", "examples", "images", "metrics", "pairs", "quarantine", "reference", "rewards", "runs"),
    *("sequences", "steps", "throughput", "tokens"),
]


def test_every_view_has_a_line_of_help_and_its_columns_with_their_types(con):
    described = {name: (purpose, columns) for name, purpose, columns in views.describe()}
    assert list(described) == VIEWS
    for name, (purpose, columns) in described.items():
        assert purpose.endswith(".") and len(purpose) > 20
        types = ask(con, f"select column_name, column_type from (describe {name})")
        # Where log-probs are stored as float32, DuckDB calls them FLOAT[].
        assert columns == types


def test_show_tables_lists_the_views_alone(con):
    assert [name for (name,) in ask(con, "show tables")] == VIEWS


def test_answers_have_columns_and_come_in_blocks(con):
    found = views.ask(con, "select i as n from range(5000) t(i) order by n")
    assert found.columns == ["n"]
    assert [n for (n,) in found.rows()] == list(range(5000))


@pytest.mark.parametrize(
    "query",
    [
        "with w as (select * from rewards) select count(*) from w",
        "with v as (select * from rewards), w as (select * from v) select (select count(*) from w)",
        "with recursive w as (select 1 as n union all select n + 1 from w where n < 2) select max(n) from w",
        "from rewards select count(*)",
        "values (2)",
        "select count(*) from rewards;",
        "-- how many\nselect count(*) from rewards",
        "(select count(*) from rewards)",
        "select 2 union all select 2 limit 1",
    ],
)
def test_every_kind_of_select_is_answered(con, query):
    assert ask(con, query) == [(2,)]


@pytest.mark.parametrize("query", ["describe rewards", "show tables", "summarize rewards"])
def test_questions_about_the_views_are_answered(con, query):
    assert len(ask(con, query)) > 0


# -- what is refused -------------------------------------------------------------------------------------------------

SECRET = "the secret of another file"


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> tuple[Path, views.Sources]:
    """An experiment beside files that no query may read."""
    folder = tmp_path_factory.mktemp("secret")
    for name in ("secret.csv", "secret.txt"):
        (folder / name).write_text(SECRET)
    (folder / "secret.json").write_text(json.dumps({"a": SECRET}))
    parquet(folder / "secret.parquet", [visit(1, SECRET, 0, 0, 0, 0)], STEPS)
    database = duckdb.connect(str(folder / "secret.db"))
    database.execute(f"create table t as select '{SECRET}' as a")
    database.close()
    return folder, sources(folder, {"trained": 0.1})


READS = [
    "select * from read_text('{}/secret.txt')",
    "select * from read_blob('{}/secret.txt')",
    "select * from read_csv('{}/secret.csv', header = false)",
    "select * from read_csv_auto('{}/secret.csv')",
    "select * from sniff_csv('{}/secret.csv')",
    "select * from read_json('{}/secret.json')",
    "select * from read_parquet('{}/secret.parquet')",
    "select * from read_parquet(['{}/trained/steps/to-00000001.parquet', '{}/secret.parquet'])",
    "select * from parquet_metadata('{}/secret.parquet')",
    "select * from parquet_kv_metadata('{}/secret.parquet')",
    "select * from '{}/secret.csv'",
    "select * from '{}/secret.json'",
    "select * from '{}/secret.parquet'",
    'select * from "{}/secret.parquet"',
    "select * from glob('{}/*')",
    "select * from read_text('/etc/passwd')",
    "select * from read_csv('/etc/passwd', sep = ':')",
    "select * from '/etc/passwd'",
    "select * from read_text('{}/trained/steps/../../secret.txt')",
    "select * from query('select * from read_text(''{}/secret.txt'')')",
    "select * from read_csv('http://localhost:1/x.csv')",
    "select * from 's3://bucket/x.parquet'",
    "explain select * from rewards",
    "explain analyze select * from read_text('{}/secret.txt')",
    "select getenv('HOME')",
    "select 1 limit (select length(getenv('HOME')))",
    "select current_setting('temp_directory')",
    "select * from read_duckdb('{}/secret.db')",
    "select * from parquet_schema('{}/secret.parquet')",
    "select * from read_json_objects('{}/secret.json')",
    "select * from query_table(['{}/secret.parquet'])",
    "select * from json_execute_serialized_sql(json_serialize_sql('from read_text(''{}/secret.txt'')'))",
    "with f as (from read_text('{}/secret.txt')) select count(*) from f",
    "select (select content from read_text('{}/secret.txt'))",
    "select * from rewards where example_id in (from read_text('{}/secret.txt'))",
    "select * from (describe '{}/secret.parquet')",
    "summarize '{}/secret.parquet'",
    "select * from memory.stored.runs",
    "select * from stored.cached",
    "show all tables",
    "show databases",
    "select * from information_schema.tables",
    "select * from pg_catalog.pg_settings",
    "select * from pg_tables",
    "select * from duckdb_settings()",
    "select * from duckdb_secrets()",
    "select * from which_secret('s3://bucket', 's3')",
    "select * from duckdb_views",
    "select * from sqlite_master",
    # A name that is given elsewhere in the query, or only now.
    "select * from sqlite_master where exists (with sqlite_master as (select 1) select 1)",
    "with sqlite_master as (select * from sqlite_master) select * from sqlite_master",
    "with recursive sqlite_master as (select sql from sqlite_master union all select sql from sqlite_master) "
    "select * from sqlite_master",
    "with w as (select * from sqlite_master), sqlite_master as (select 1) select * from w",
    "select * from pragma_table_info('rewards')",
    "select * from enable_logging()",
    # Addresses of memory.
    "select * from arrow_scan(1, 2, 3)",
    "select * from pandas_scan(1)",
    "select * from python_map_function(1)",
]


@pytest.mark.parametrize("query", READS)
def test_no_other_file_is_read(secret, query):
    folder, chosen = secret
    with pytest.raises(UsageError) as caught:
        ask(views.connect(chosen), query.format(*[folder] * 2))
    assert SECRET not in str(caught.value) and "root:" not in str(caught.value)


STATEMENTS = [
    "copy (select 1) to '{0}/out.csv'",
    "copy rewards to '{0}/out.parquet'",
    "copy (select 1) to '{1}' (format csv, use_tmp_file false)",
    "export database '{0}/out'",
    "attach '{0}/secret.db' as s",
    "attach ':memory:' as s",
    "attach '{0}/out.db' as s",
    "install httpfs",
    "load httpfs",
    "load '{0}/x.duckdb_extension'",
    "set threads = 1",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "reset lock_configuration",
    "set allowed_directories = ['/']",
    "pragma enable_object_cache",
    "pragma database_list",
    "call pragma_version()",
    "create table t as select 1",
    "create or replace view rewards as select 1",
    "create macro f(x) as x",
    "create temp table t as select 1",
    "create secret s (type s3)",
    "insert into visits select * from visits",
    "update visits set loss = 0",
    "delete from visits",
    "drop view rewards",
    "alter table visits rename to v",
    "truncate visits",
    "begin",
    "prepare p as select 1",
    "execute p",
    "use memory",
    "vacuum",
    "checkpoint",
    "import database '{0}'",
    "select 1; select 2",
    "select 1; drop view rewards",
    "select 1; copy (select 1) to '{0}/out.csv'",
    "",
    ";",
    "-- nothing",
    "select",
    "nonsense",
    # A plan is a question; running the statement to measure it is not.
    "explain analyze copy (select 1) to '{0}/out.csv' (use_tmp_file false)",
    "explain analyze copy (select 1) to '{1}' (format csv, use_tmp_file false)",
    "explain (analyze, format json) copy (select 1) to '{1}' (format csv, use_tmp_file false)",
    "explain analyze create table t as select 1",
    "explain analyze drop view rewards",
    "explain analyze set threads = 1",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_whatever_is_no_single_select_is_refused_and_changes_nothing(secret, statement):
    folder, chosen = secret
    con = views.connect(chosen)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(UsageError, match="rewards"):  # the views are named
        ask(con, statement.format(folder, chosen.shards[0]))
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    assert ask(con, "select count(*) from rewards") == [(2,)]


def test_variables_of_the_program_are_no_tables(con):
    leaked = pa.table({"a": [SECRET]})
    assert duckdb.connect().execute("select * from leaked").fetchall() == [(SECRET,)]  # where it is not forbidden
    with pytest.raises(duckdb.CatalogException, match="leaked"):
        con.execute("select * from leaked")
    with pytest.raises(UsageError, match="leaked"):
        ask(con, "select * from leaked")
    assert leaked.num_rows == 1


@pytest.mark.parametrize(
    "query",
    [
        "select error('boom')",
        "select cast('x' as int)",
        # Fails only in the last of many blocks, when the first have been read.
        "select case when i = 99999 then cast('boom' || i as int) else i end from range(100000) t(i)",
    ],
)
def test_an_error_while_the_answer_is_read_is_the_users_too(con, query):
    with pytest.raises(UsageError):
        ask(con, query)


@pytest.mark.parametrize("query", ["select now()", "select timestamptz '2024-01-01 00:00:00+00'"])
def test_a_time_with_a_zone_is_answered_or_refused_in_words(con, query):
    try:
        ((found,),) = ask(con, query)
    except UsageError:
        return
    assert found.year >= 2023


def test_a_mistyped_view_names_the_nearest(con):
    with pytest.raises(
        UsageError, match=r"no view reward; the nearest is rewards\. Views: alerts, checkpoints, examples"
    ):
        ask(con, "select * from reward")
    with pytest.raises(UsageError, match=r"no view stored\.prepared"):
        ask(con, "select * from stored.prepared")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("select margn from rewards", "no column margn in rewards; the nearest is margin."),
        ("select r.margn from rewards r", "no column margn in rewards; the nearest is margin."),
        ("select 1 from rewards where prompt = 'x'", "no column prompt in rewards; examples, pairs have one."),
        ("select 1 from rewards join pairs using (exampl_id)", "the nearest is example_id"),
        ("select * exclude (mrgin) from rewards", "the nearest is margin"),
        ('select 1 from runs where run = "trained"', "Text goes in single quotes."),
        ("select 1 from alerts where zzz", "there are run, step, kind"),
    ],
)
def test_a_mistyped_column_names_the_nearest(con, query, said):
    with pytest.raises(UsageError) as caught:
        ask(con, query)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        # e0 has margin 0.6 and split train, e1 -0.3 and held_out.
        (
            "select * from rewards where margin > 0 and split = 'held_out' and step > 0",
            ["2 before", "1 left after (margin > 0)", "0 left after (split = 'held_out'); alone it matches 1"],
        ),
        ("select * from rewards where margin > 9", ["2 before", "0 left after (margin > 9)"]),
        ("select * from alerts where step > 9", ["even without `where`"]),
        (
            "select run from rewards where margin > 0 group by run having count(*) > 1",
            ["2 before", "1 left after (margin > 0)", "0 left after the clauses that follow"],
        ),
        (
            "with r as (from rewards) select avg(r.margin) from r join examples e using (example_id) "
            "where e.n_chosen > $most and r.run = 'other' group by run",
            ["2 before", "2 left after (e.n_chosen > $most)", "0 left after (r.run = 'other')"],
        ),
    ],
)
def test_an_empty_answer_says_which_condition_left_nothing(con, query, expected):
    result = views.ask(con, query, (), {"most": 1} if "$most" in query else None)
    assert list(result.rows()) == []
    found = result.explain_empty()
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True)), found


@pytest.mark.parametrize(
    "query",
    [
        "select * from alerts",  # nothing to leave anything out
        "select 1 where false union select 2 where false",  # no plain SELECT
        "select * from rewards where false and run::int > 0",  # a condition that fails where the one before is not true
        "select count(*) from rewards where false",  # a row
    ],
)
def test_where_there_is_nothing_to_say_of_an_empty_answer_nothing_is_said(con, query):
    result = views.ask(con, query)
    list(result.rows())
    assert result.explain_empty() == []
