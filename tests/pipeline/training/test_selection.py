"""What is trained on, by hand; and expressions from a config of unknown origin, which reach nothing but the examples."""

import time

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline import views
from prefcache.pipeline.config import Train
from prefcache.pipeline.errors import DataError, ResourceError, UsageError
from prefcache.pipeline.schema import PREPARED
from prefcache.pipeline.training import cache_join
from prefcache.pipeline.training.dataset import steps
from prefcache.pipeline.training.example_expression import Expression, column_names
from prefcache.pipeline.training.selection import Selection
from prefcache.pipeline.views import Sources
from tests.helpers.examples import MINE, cache_for, label, objective, pair, prepared, table

# Margins of the reference: 2, 5, -1, none, 0.
CHOSEN = np.array([-1.0, -2.0, -4.0, np.nan, -3.0])
REJECTED = np.array([-3.0, -7.0, -3.0, -1.0, -3.0])
REFERENCE = {"ref_chosen_logp": CHOSEN, "ref_rejected_logp": REJECTED}
PAIRS = [
    pair(0, [1], [2, 3, 4], [5], source="a", line=1, chosen_score=4.0, rejected_score=1.0),
    pair(1, [1, 1], [6], [7, 8], source="b", line=1, chosen_score=3.0, rejected_score=2.5),
    pair(2, [2], [5, 5], [9, 9], source="a", line=2),
    pair(3, [2, 3], [5], [9], source="a", line=3, chosen_score=1.0, rejected_score=0.0),
    pair(4, [3], [4], [8, 8, 8], source="b", line=2, chosen_score=2.0, rejected_score=1.0),
]
LABELS = [label(i, [i], [10 + i] * (i + 1), i % 2 == 0) for i in range(4)]
EVERY, EVERY_OF_MANY = np.arange(5), np.arange(20_000)


def choose(rows=EVERY, data=PAIRS, kind="pairs", reference=REFERENCE, epochs=1, **train):
    return Selection(Train(epochs=epochs, **train), kind).choose(table(data, kind), reference, np.asarray(rows))


def refusal(kind="pairs", error=UsageError, **train) -> str:
    with pytest.raises(error) as caught:
        Selection(Train(**train), kind)
    return str(caught.value)


def order(choice, seed=0, epoch=0):
    """The rows in the order of an epoch."""
    (found,) = [
        indices
        for _, at, indices in steps(len(choice.rows), len(choice.rows), 5, seed, 0, choice.ranks)
        if at == epoch + 1
    ]
    return choice.rows[found].tolist()


# -- where -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("true", [0, 1, 2, 3, 4]),
        ("source = 'a'", [0, 2, 3]),
        ("margin > 0", [0, 1]),  # unknown for 3, which is not true
        ("margin is null or margin < 0", [2, 3]),
        ("margin_per_token < 2", [1, 2, 4]),  # -1/3 + 3, -2 + 7/2, -2 + 3/2, none, -3 + 1
        ("length_difference >= 0", [0, 2, 3]),  # 2, -1, 0, 0, -2
        ("score_gap between 0.5 and 1", [1, 3, 4]),  # 3, 0.5, none, 1, 1
        ("n_prompt = 2 and not source = 'b'", [3]),
        ("EXAMPLE_ID in ('e1', 'e4') and Examples.Margin < 3", [4]),
        ("coalesce(chosen_score, 9) > 3.5", [0, 2]),
        ("case when source = 'b' then margin > 1 end", [1]),
        ("prompt like 'why 3%' -- a remark", [3]),
        # Windows are over the examples that could be trained on.
        ("margin > avg(margin) over ()", [0, 1]),  # above 1.5
        ("row_number() over (partition by source order by margin desc) = 1", [0, 1]),
        ("count(*) over (partition by source) = 3", [0, 2, 3]),
        ("list_sum(list_transform(string_split(prompt, ' '), lambda word: length(word))) = 5 and line = 3", [3]),
    ],
)
def test_where_chooses_by_hand(where, expected):
    assert choose(where=where).rows.tolist() == expected


def test_what_is_chosen_is_counted_with_what_is_unknown():
    assert choose(where="margin > 0").notes == ("train: 2 of 5 train examples chosen by train.where; it is null for 1",)
    assert choose(where="line > 1").notes == ("train: 3 of 5 train examples chosen by train.where",)


def test_examples_that_lack_something_are_no_part_of_it():
    # Without 3: the mean of 2, 5 and 0 is 7 / 3.
    found = choose(rows=[0, 1, 4], where="margin > avg(margin) over ()")
    assert found.rows.tolist() == [1] and found.notes == ("train: 1 of 3 train examples chosen by train.where",)


def test_choosing_none_is_an_error_that_says_where_the_values_lie():
    with pytest.raises(DataError) as caught:
        choose(where="margin > 10 and source = 'a'")
    assert str(caught.value) == (
        "train.where (margin > 10 and source = 'a') chooses none of 5 train examples. For 1 of them it is null, which is "
        "not true. Loosen it: margin goes from -1.0 to 5.0; source goes from a to b."
    )
    with pytest.raises(DataError, match="cut_prompt is null for all"):
        choose(where="cut_prompt > 10")


def test_a_condition_has_to_be_one():
    assert "is of type INTEGER; expected a condition, such as margin > 0" in refusal(where="n_chosen")
    assert "is of type NULL" in refusal(where="null")
    assert "expected a SQL expression; leave the key out" in _config_refusal("")
    assert Train(where=True).where == "true"  # as YAML reads it


def _config_refusal(where):
    with pytest.raises(ValueError) as caught:
        Train(where=where)
    return str(caught.value)


def test_without_expressions_there_is_no_selection():
    assert not Selection(Train(), "pairs") and Selection(Train(where="true"), "pairs")
    found = choose()
    assert (found.rows.tolist(), found.weight, found.ranks, found.notes) == ([0, 1, 2, 3, 4], None, (), ())


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_every_column_of_the_view_is_there_with_its_values(kind):
    data = table(PAIRS if kind == "pairs" else LABELS, kind)
    con = views.connect(Sources(data))
    # Its position in the prepared data says nothing about an example; image tokens are counted with the pictures, which are not read.
    viewed = set(con.execute("select * from examples").fetchnumpy()) - {"position", "n_image_tokens"}
    computed = {"margin", "margin_per_token", "length_difference", "score_gap"}
    known = {name for each in PREPARED for name in column_names(each)}
    assert {name for name in known if not name.startswith("ref_")} - computed == viewed
    names = sorted(viewed & {*column_names(kind)})
    listed = ", ".join(f"{name}::varchar" for name in names)
    for row, values in enumerate(con.execute(f"select {listed} from examples order by example_id").fetchall()):
        said = ["null" if value is None else f"'{value}'" for value in values]
        same = (f"{name}::varchar is not distinct from {value}" for name, value in zip(names, said, strict=True))
        found = Selection(Train(where=" and ".join(same)), kind).choose(data, {}, np.arange(len(data)))
        assert found.rows.tolist() == [row]


def test_a_mistyped_column_is_named_with_the_nearest():
    assert "there is no column 'mragin'; the nearest: margin" in refusal(where="mragin > 0")
    message = refusal(where='source = "wiki"')
    assert "there is no column 'wiki'; the columns: example_id, split, source" in message
    assert "Put text in single quotes." in message


def test_a_column_of_the_other_kind_is_told_apart_from_a_mistake():
    assert "completion is a column of labels, and this data holds pairs" in refusal(where="completion = 'a'")
    assert "margin is a column of pairs, and this data holds labels" in refusal("labels", where="margin > 0")
    assert "only train.order_by has the column epoch" in refusal(weight="epoch")


def test_what_the_reference_has_to_give_is_known_from_the_names():
    def answers(kind="pairs", **train):
        return Selection(Train(**train), kind).reference_answers

    assert answers(where="n_chosen > 1", weight="score_gap") == ()
    assert answers(order_by="margin_per_token") == ("chosen", "rejected")
    assert answers(weight="-ref_rejected_logp") == ("rejected",)
    assert answers("labels", where="label and REF_completion_logp < -1") == ("completion",)
    assert Selection(Train(where="n_chosen > 1", weight="abs(margin)"), "pairs").readers == {"train.weight": "margin"}


# -- weight ----------------------------------------------------------------------------------------------------------


def test_weights_are_1_on_average_over_those_that_are_visited():
    found = choose(weight="case source when 'a' then 3 else 1 end")
    # (3 + 1 + 3 + 3 + 1) / 5 = 2.2
    assert found.weight.tolist() == pytest.approx([3 / 2.2, 1 / 2.2, 3 / 2.2, 3 / 2.2, 1 / 2.2], rel=1e-15)
    assert found.weight.mean() == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("scale", ["1e-300", "7", "1e307"])
def test_a_common_factor_changes_nothing(scale):
    found = choose(weight=f"{scale} * n_prompt * 8")
    assert found.weight.tolist() == pytest.approx((np.array([1, 2, 1, 2, 1]) / 1.4).tolist(), rel=1e-12)


def test_a_weight_of_0_is_not_visited_and_counted():
    found = choose(where="line < 3", weight="if(source = 'a', line - 1, 0.5)")
    # e0: 0, e1: 0.5, e2: 1, e4: 0.5
    assert found.rows.tolist() == [1, 2, 4]
    assert found.weight.tolist() == pytest.approx([0.75, 1.5, 0.75])
    assert found.notes == (
        "train: 4 of 5 train examples chosen by train.where",
        "train: 1 of them weigh 0 by train.weight and are not visited",
    )
    with pytest.raises(DataError, match="is 0 for all 5 examples"):
        choose(weight="0")


def test_sources_weigh_alike_where_each_is_divided_by_its_size():
    # A window is over what was chosen: of a, only e0 and e2.
    found = choose(where="line < 3", weight="1 / count(*) over (partition by source)")
    assert found.weight.tolist() == [1, 1, 1, 1]
    found = choose(weight="1 / count(*) over (partition by source)")
    by_source = {name: found.weight[[row["source"] == name for row in PAIRS]].sum() for name in "ab"}
    assert by_source["a"] == pytest.approx(by_source["b"])


@pytest.mark.parametrize(
    ("weight", "found", "where"),
    [
        ("margin", "-1 for example e2, one of 2 such", "true"),
        ("score_gap", "null for example e2, one of 1 such", "true"),
        ("if(line = 2, 'inf'::double, 1)", "inf for example e2, one of 2 such", "true"),
        ("if(line = 2, 'nan'::double, 1)", "nan for example e4, one of 1 such", "source = 'b'"),
    ],
)
def test_a_weight_that_is_none_is_refused_with_its_example(weight, found, where):
    with pytest.raises(DataError) as caught:
        choose(weight=weight, where=where)
    assert f"is {found}; expected a number that is not negative" in str(caught.value)


def test_an_example_that_is_not_chosen_needs_no_weight():
    assert choose(weight="score_gap", where="chosen_score is not null").rows.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("weight", ["source", "[1]", "null", "uuid()", "example_id::blob"])
def test_a_weight_has_to_be_a_number(weight):
    assert "train.weight" in refusal(weight=weight)


@pytest.mark.parametrize("weight", ["1", "1.5", "margin > 0 or true", "n_chosen::utinyint", "1::hugeint", "1::float"])
def test_every_kind_of_number_will_do(weight):
    assert len(choose(weight=weight).weight) == 5


def test_losses_over_a_whole_batch_have_no_weights():
    with pytest.raises(UsageError, match=r"train.weight has no meaning for aot"):
        objective(loss="aot", weight="n_chosen")
    assert objective(loss="kto", weight="n_completion").kind == "labels"


# -- order_by --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order_by", "expected"),
    [
        ("line, source", [0, 1, 2, 4, 3]),
        ("source desc, line desc", [4, 1, 3, 2, 0]),
        ("margin", [2, 4, 0, 1, 3]),  # null is last, as in DuckDB
        ("margin desc nulls first", [3, 1, 0, 4, 2]),
        ("example_id", [0, 1, 2, 3, 4]),
    ],
)
def test_order_by_is_that_of_sql(order_by, expected):
    found = choose(order_by=order_by)
    assert all(order(found, seed, epoch) == expected for seed in range(3) for epoch in range(3))


def test_equal_ones_are_shuffled_by_seed_and_epoch():
    data = [row | {"example_id": f"e{i}"} for i, row in enumerate(PAIRS * 8)]
    found = choose(rows=np.arange(40), data=data, reference={}, order_by="source")
    orders = [order(found, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all([data[row]["source"] for row in each] == ["a"] * 24 + ["b"] * 16 for each in orders)
    assert all(sorted(each) == list(range(40)) for each in orders) and len({tuple(each) for each in orders}) == 3
    assert order(found, 0, 0) == orders[0]
    # A constant leaves the shuffle as it is.
    assert order(choose(order_by="1")) == order(choose())


def test_an_order_may_name_the_epoch():
    found = choose(epochs=3, order_by="case epoch when 1 then line when 2 then -line end, if(epoch < 3, source, null)")
    assert [order(found, 0, epoch) for epoch in range(2)] == [[0, 1, 2, 4, 3], [3, 2, 4, 0, 1]]
    assert order(found, 0, 2) == order(choose(), 0, 2)  # nothing said: shuffled
    # What does not change is there once.
    found = choose(epochs=8, order_by="if(epoch = 1, line, null)")
    assert len(found.ranks) == 8 and len({id(each) for each in found.ranks}) == 2


def test_an_order_by_epoch_knows_how_many_epochs_a_number_of_steps_begins():
    # 5 examples in steps of 2 are 3 steps an epoch, and 7 steps begin the third; of 2 examples, each step is an epoch.
    order_by = "if(epoch % 2 = 1, line, -line)"
    assert len(choose(max_steps=7, batch_size=2, order_by=order_by).ranks) == 3
    assert len(choose(max_steps=7, batch_size=2, order_by=order_by, rows=[0, 1]).ranks) == 7


def test_only_what_is_chosen_is_ordered():
    found = choose(where="margin is not null", weight="line % 2", order_by="margin desc")
    assert order(found) == [1, 0]


def test_what_fails_in_a_later_epoch_is_found_at_once():
    with pytest.raises(UsageError, match=r"train.order_by \(case.*Could not convert string 'x'"):
        choose(epochs=3, order_by="case when epoch < 3 then line else cast(substr('x', line) as int) end")


# -- safety ----------------------------------------------------------------------------------------------------------

HOSTILE = [
    "read_csv('/etc/passwd')",
    "read_text('/etc/passwd') is null",
    "exists(select * from read_text('/etc/passwd'))",
    "exists(from '/etc/passwd')",
    "(select count(*) from glob('/*')) > 0",
    "source in (select content from read_text('/etc/passwd'))",
    "source in (select 'a')",
    "(with t as (select 1) select true from t)",
    "not exists(from duckdb_settings())",
    "true; copy examples to '{0}/out.csv'",
    "true) from examples; copy examples to '{0}/out.csv' --",
    "true) as value from examples; select row_, (true",
    "true) as value from examples union all select 1, (true",
    "true) as value from examples where row_ in (select 1) --\n",
    "true) as value from read_csv('/etc/passwd') as examples --",
    "true) as value from (select 1 as row_) as examples --",
    "true), (true",
    "true as a, true",
    "copy examples to '{0}/out.csv'",
    "attach '{0}/out.db' as s",
    "install httpfs",
    "load httpfs",
    "set threads = 4",
    "pragma database_list",
    "create table t as select 1",
    "drop view examples",
    "export database '{0}/out'",
    "getenv('HOME') = ''",
    "current_setting('home_directory') = ''",
    "query('select 1')",
    "getvariable('x')",
    "nextval('s') > 0",
    "write_log('x') is null",
    "sleep_ms(100) is null",
    "pg_sleep(1) is null",
    "random() < 0.5",
    "uuid() > 'a'",
    "now() > timestamp '2020-01-01'",
    "current_timestamp > timestamp '2020-01-01'",
    "ago(interval 1 day) is null",
    "pg_postmaster_start_time() is null",
    "get_block_size('memory') > 0",
    "reservoir_quantile(margin, 0.5) over () > 0",
    "unnest([true, false])",
    "columns(*) is null",
    "* is null",
    "#1 = 1",
    "$1",
    "?",
    "is_given",
    "row_ = 1",
    "given.source = 'a'",
    "main.random() > 0",
    "list_transform([1], lambda x: random()) is null",
    "error('boom')",
    "true /*",
    ")",
    ";",
    "--",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_nothing_but_an_expression_over_columns_is_accepted(tmp_path, expression):
    for key in ("where", "weight", "order_by"):
        message = refusal(**{key: expression.format(tmp_path)})
        assert message.startswith(f"train.{key} (") and "root:" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "order_by",
    [
        "margin) + row_number() over (order by line",
        "margin), random(",
        "margin) as value from examples union all select row_, dense_rank() over (order by 1",
        "margin) as value from examples limit 1 --",
    ],
)
def test_an_order_cannot_leave_its_bracket(order_by):
    assert "train.order_by" in refusal(order_by=order_by)


def test_even_what_would_pass_for_an_expression_meets_a_locked_database(monkeypatch):
    """The second lock, without the first: as `prefcache sql`, no file is read."""
    monkeypatch.setattr(Expression, "_checked_names", lambda self, con: [])
    for where in ("exists(from read_text('/etc/passwd'))", "exists(from '/etc/passwd')", "exists(from pa)"):
        message = refusal(where=where)
        assert "root:" not in message
    assert duckdb.connect().execute("select count(*) from read_text('/etc/passwd')").fetchall() == [(1,)]


def test_an_error_while_it_is_computed_is_the_users():
    with pytest.raises(UsageError, match=r"train.where \(cast\(source as int\) > 1\): Conversion Error"):
        choose(where="cast(source as int) > 1")
    assert "has an aggregate; say over which examples" in refusal(where="margin > avg(margin)")


def test_more_memory_than_there_is_for_it_is_an_error_in_words(monkeypatch):
    monkeypatch.setattr("prefcache.pipeline.training.example_expression.MEMORY_LIMIT", "50MB")
    with pytest.raises(ResourceError, match="needs more than 50MB of memory"):
        choose(EVERY_OF_MANY, PAIRS * 4000, reference={}, where="row_number() over (order by repeat(prompt, 1000)) > 4")


@pytest.mark.parametrize(
    "where",
    [
        # Of constants, computed when it is described; of a column, when it is evaluated.
        "length(lpad('x', 2000000000, 'y')) > 0",
        "levenshtein(repeat(prompt || 'ab', 200000), repeat(prompt || 'bc', 200000)) > 0",
    ],
)
def test_what_takes_too_long_is_ended_within_one_function(monkeypatch, where):
    monkeypatch.setattr("prefcache.pipeline.training.example_expression._SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"train.where \(.*\) took more than 0\.5 s"):
        choose(where=where)
    assert time.monotonic() - began < 3


def test_what_needs_memory_that_duckdb_does_not_count_is_an_error_in_words():
    with pytest.raises(ResourceError, match=r"train.where .* needs more than 3GB of memory"):
        choose(where="length(repeat(prompt, 400000000)) > 0")


# -- among the columns -----------------------------------------------------------------------------------------------


def examples(tmp_path, rows, failed=(), **train):
    chosen, data = objective(**train), prepared(tmp_path / "prepared", rows)
    selection = Selection(Train(**train), data.kind)
    cache = cache_for(tmp_path / "cache", rows, failed)
    return cache_join.join_cache(chosen, data, cache, [MINE], density_ratio=False, selection=selection)


def values(split):
    return {name: each.tolist() for name, each in split.batch(np.arange(len(split))).columns.items()}


@pytest.mark.parametrize("train", [{"loss": "sigmoid"}, {"loss": "simpo"}, {"loss": "ipo", "reference_free": True}])
def test_the_margin_is_the_references_whatever_the_loss_reads(tmp_path, train):
    # e0: -(2 + 2*3 + 3*4) / 8 + 5 / 8 = -1.875; e1: -6/8 + (7 + 16)/8 = 2.125
    rows = [*PAIRS, pair(5, [4], [4], [8], split="held_out")]
    found = examples(tmp_path, rows, where="margin in (-1.875, 2.125)", weight="n_chosen", **train)
    assert found["train"].example_ids(np.arange(2)) == ["e0", "e1"]
    assert values(found["train"])["given_weight"] == [1.5, 0.5]
    # Held-out examples are all there, and weigh what they did.
    assert len(found["held_out"]) == 1 and "given_weight" not in values(found["held_out"])
    reference = values(found["train"]).get("ref_chosen_logp")
    assert reference == {"sigmoid": [-2.5, -0.75], "simpo": None, "ipo": [0, 0]}[train["loss"]]


def test_tokens_of_the_reference_stay_with_their_answers(tmp_path):
    found = examples(tmp_path, PAIRS, where="margin > 0", loss="sigmoid", tokens={"decay": 0.9})["train"]
    batch = found.batch(np.arange(len(found)), ("chosen", "rejected"))
    for name in ("chosen", "rejected"):
        sums = [each.sum().item() for each in batch.reference_tokens[name]]
        assert sums == batch.columns[f"ref_{name}_logp"].tolist()


def test_a_failed_reference_leaves_its_example_out_before_anything_is_chosen(tmp_path):
    found = examples(tmp_path, PAIRS, (PAIRS[1]["chosen_key"],), where="source = 'b'", weight="margin + 9")["train"]
    assert found.left_out == {"ref_chosen_logp": 1} and found.example_ids(np.arange(1)) == ["e4"]
    assert found.notes == ("train: 1 of 4 train examples chosen by train.where",)


def test_labels_are_chosen_by_what_labels_have(tmp_path):
    found = examples(
        tmp_path, LABELS, loss="bco", where="label or ref_completion_logp < -12", order_by="n_completion desc"
    )
    # e1: -11 * 3 / 8 = -4.125; e3: -13 * 10 / 8 = -16.25
    assert found["train"].example_ids(np.arange(3)) == ["e0", "e2", "e3"]
    (batch,) = [indices for _, _, indices in steps(3, 3, 1, 0, 0, found["train"].ranks)]
    assert found["train"].example_ids(batch) == ["e3", "e2", "e0"]


# -- scale -----------------------------------------------------------------------------------------------------------


def test_a_million_examples_take_seconds():
    n = 1_000_000
    one = table(PAIRS, "pairs").take(pa.array(np.arange(n) % 5))
    ids = pa.array(np.arange(n)).cast(pa.string())
    data = one.set_column(one.schema.get_field_index("example_id"), "example_id", ids)
    logps = np.random.default_rng(0).normal(size=(2, n))
    reference = {"ref_chosen_logp": logps[0], "ref_rejected_logp": logps[1]}
    train = Train(where="margin > 0 and prompt like 'why%'", weight="n_chosen", order_by="margin desc, n_prompt")
    began = time.process_time()
    found = Selection(train, "pairs").choose(data, reference, np.arange(n))
    assert time.process_time() - began < 20  # about 2; other work beside it counts in no process's time
    margin = logps[0] - logps[1]
    assert found.rows.tolist() == np.flatnonzero(margin > 0).tolist()
    assert (np.diff(margin[found.rows][np.argsort(found.ranks[0])]) <= 0).all()
    # The same, done again: no thread was faster than another.
    again = Selection(train, "pairs").choose(data, reference, np.arange(n))
    assert np.array_equal(again.weight, found.weight) and np.array_equal(again.ranks[0], found.ranks[0])
