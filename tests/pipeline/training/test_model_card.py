"""A model's card has what the run was made from, and the same run gives the same card."""

import yaml

from prefcache.pipeline.stored.records import BestEntry, Provenance, StoppedEntry
from prefcache.pipeline.training import model_card
from prefcache.pipeline.visible_text import visible

MODEL = "4" * 32
FACTS = {
    "model": "org/tiny | <b>",
    "loss": "0.8 sigmoid + 0.2 sft",
    "loss_arguments": {"sigmoid": {"weight": 0.8, "beta": 0.1}, "sft": {"weight": 0.2}},
    "beta": 0.1,
    "inputs": {"prepared": "p123", "policy": MODEL, "reference": MODEL, "numerics": ["n789"], "train": {}},
    "versions": {"torch": "2.13.0"},
    "precision": "float32",
}
RUN = {"kind": "pairs", "n_examples": 2656, "n_steps": 83, "before": {}, "after": {}, "n_evaluated": {}}


def test_a_card_says_what_the_run_was_made_from():
    before, after = {"loss": 0.6931, "test_loss": 0.7}, {"loss": 0.5, "rewards/accuracies": 1.0, "test_loss": 0.6}
    n_evaluated = {"held_out": 296, "test": 40}
    card = model_card.render(
        Provenance.make(**FACTS), **RUN | {"before": before, "after": after, "n_evaluated": n_evaluated}
    )
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "base_model": "org/tiny | <b>",
        "library_name": "transformers",
        "tags": ["prefcache", "sigmoid", "sft"],
    }
    for line in (
        "| prepared data | p123 |",
        f"| reference | {MODEL} |",
        "| numerics of its log-probs | n789 |",
        "| sigmoid's beta | 0.1 |",
        "| torch | 2.13.0 |",
        "## On 296 held-out pairs",
        "| reward accuracy |  | 1.0000 |",
        "| loss | 0.6931 | 0.5000 |",
        "## On 40 pairs of the evaluation data test",
        "| loss | 0.7000 | 0.6000 |",
    ):
        assert line in card.splitlines(), line
    assert "# org/tiny \\| &lt;b>, trained on preferences" in card


def test_names_are_text_and_nothing_in_them_acts():
    acting = "a\x1b[31m\u202e|<b>\n# b"
    facts = FACTS | {"model": acting, "loss": acting, "loss_arguments": {acting: {acting: acting}}}
    best = BestEntry(step=1, metric=acting, evaluation={}, waited=0)
    stopped = StoppedEntry(step=1, of=2, callback=acting, reason=acting)
    card = model_card.render(Provenance.make(**facts), **RUN, best=best, stopped=stopped)
    shown = "a\u241b[31m&lt;U+202E>\\|&lt;b> # b"
    assert card.count(shown) == 8 and visible(card) == card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == acting and head["tags"] == ["prefcache", acting]


def test_without_a_reference_and_held_out_examples_it_says_so():
    facts = FACTS | {"inputs": FACTS["inputs"] | {"reference": None, "numerics": None}}
    card = model_card.render(Provenance.make(**facts), **RUN)
    assert "| reference | none was read |" in card and "held-out" not in card


def test_a_trained_model_has_its_card(prefcache, config, tmp_path):
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    run = tmp_path / "runs/tiny/trained"
    card = (run / "model/README.md").read_text()
    assert "trained on preferences" in card and "held-out pairs" in card
    assert (run / "config.yaml").exists()  # as it says
