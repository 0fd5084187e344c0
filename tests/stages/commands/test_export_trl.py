"""Rows for TRL: what its trainers make of them, in their own code, is what was scored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from prefcache.pipeline.schema import sequence_key
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.scored import open_scored
from tests.helpers import vision_models
from tests.helpers.conversations import TOOLS, assistant, call, tool, user
from tests.helpers.project import CHATML, pair, write_config
from tests.helpers.scored import write_labels
from tests.helpers.vision_models import picture

N = 10
# Prints calls and tools, and thoughts only in the last turn.
TOOL_CHAT = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if 'tool_calls' in message %}{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
SWITCH = "{% if loud is defined %}{{ loud }}{% endif %}" + CHATML
LLAMA_DATE = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\n{{ date_string }}<|im_end|>\n"
) + CHATML


def messages(i: int) -> dict[str, Any]:
    texts = pair(i)
    return {"prompt": [user(texts["prompt"])], **{name: [assistant(texts[name])] for name in ("chosen", "rejected")}}


def implicit(i: int) -> dict[str, Any]:
    return {name: messages(i)["prompt"] + messages(i)[name] for name in ("chosen", "rejected")}


def implicit_text(i: int) -> dict[str, Any]:
    return {name: f"Q: {pair(i)['prompt']}\nA: {pair(i)[name]}" for name in ("chosen", "rejected")}


def with_system(i: int) -> dict[str, Any]:
    return messages(i) | {"prompt": [{"role": "system", "content": "be red"}, *messages(i)["prompt"]]}


def several_turns(i: int) -> dict[str, Any]:
    texts = messages(i)
    before = [user("one cat"), assistant("two cats"), *texts["prompt"]]
    return {"prompt": before} | {
        name: [*texts[name], user("why?"), assistant(f"the dog {n + i}")]
        for n, name in enumerate(("chosen", "rejected"))
    }


def with_tools(i: int) -> dict[str, Any]:
    # Calls with arguments of other names and types, and rows without any: a table of columns would fill them with nulls.
    arguments = {"x": i} if i % 2 else {"words": ["red", None], "y": {"z": 1.5}}
    answer = [assistant("", **call("add", **arguments)), tool(f"{i}"), assistant("done")]
    chosen = answer if i % 3 else messages(i)["chosen"]
    return messages(i) | {"chosen": chosen} | ({"tools": json.dumps(TOOLS)} if i % 4 else {})


def with_arguments(i: int) -> dict[str, Any]:
    return messages(i) | {"chat_template_kwargs": {"loud": f"{i}!"} if i % 2 else {}}


def rendered(i: int) -> dict[str, Any]:
    texts = pair(i)
    return {"system": "be red", "question": texts["prompt"], "chosen": texts["chosen"], "rejected": texts["rejected"]}


def long_answers(i: int) -> dict[str, Any]:
    texts = messages(i)
    return texts | {name: [assistant(texts[name][0]["content"] * (1 + i % 4))] for name in ("chosen", "rejected")}


@pytest.fixture
def export(prefcache, tmp_path, model) -> Callable[..., tuple[dict[str, Any], str]]:
    """Prepare, score and export records; return the result and what was said."""

    def run(records: list[dict[str, Any]], *settings: str, code: int = 0) -> tuple[dict[str, Any], str]:
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        config = write_config(tmp_path, model)
        options = ["--set=prepare.held_out=0", *(f"--set={setting}" for setting in settings)]
        for stage in ("prepare", "score"):
            prefcache(stage, "-q", config, *options)
        done = prefcache("export", config, *options, "--for", "trl", "--output", "rows.parquet", "--json", code=code)
        return (json.loads(done.stdout) if code == 0 else {}), done.stderr

    return run


def train(folder: Path, model: Path, settings: dict[str, Any], template: Path | None = None, **more: Any) -> Any:
    """TRL's trainer of the exported file after a step, constructed as its users do it."""
    rows = load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train", cache_dir=str(folder / "hf"))
    is_pairs = "chosen" in rows.column_names
    trainer_class, config_class = (DPOTrainer, DPOConfig) if is_pairs else (KTOTrainer, KTOConfig)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if template:
        tokenizer.chat_template = template.read_text()
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = config_class(output_dir=str(folder / "trl"), max_steps=1, **quiet, **settings, **more)
    trainer = trainer_class(model=str(model), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def collated(trainer: Any, prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row of a batch of all rows, as TRL's own collator cuts them."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    names = (f"{prefix}input_ids", f"{prefix}attention_mask", f"{prefix}completion_mask")
    sequences = []
    for ids, is_token, is_completion in zip(*(batch[name] for name in names), strict=True):
        prompt = ids[is_token.bool() & ~is_completion.bool()]
        sequences.append((prompt.tolist(), ids[is_completion.bool()].tolist()))
    return sequences


def stored(folder: Path, trainer: Any, *answers: str) -> list[tuple[list[int], list[int]]]:
    """The same of the prepared examples, in the order of the trainer's rows."""
    examples = {row["example_id"]: row for row in Prepared(folder / "runs/tiny/prepared").table().to_pylist()}
    rows = [examples[name] for name in trainer.train_dataset["prefcache_example"]]
    return [(row["prompt_ids"], row[f"{answer}_ids"]) for answer in answers for row in rows]


def count_uncached(folder: Path, sequences: list[tuple[list[int], list[int]]]) -> int:
    manifest, cache = open_scored(folder / "runs/tiny/scored")
    keys = pa.chunked_array([pa.array([sequence_key(*each) for each in sequences], pa.binary(16))])
    (sums,) = cache.logps([keys], manifest.accepted_numerics)
    return int(np.ma.getmaskarray(sums).sum())


PAIRS = {
    "messages": (messages, CHATML, []),
    "text in a template": (pair, CHATML, []),
    "text": (pair, None, []),
    "implicit prompts": (implicit, CHATML, []),
    "implicit prompts of text": (implicit_text, None, ["prepare.format=implicit_prompt"]),
    "merged system": (with_system, NO_SYSTEM, []),
    "several turns": (several_turns, CHATML, []),
    "tools": (with_tools, TOOL_CHAT, []),
    "arguments of the template": (with_arguments, SWITCH, []),
    "rendered text": (rendered, CHATML, ["prepare.format=chatml.intel"]),
    "the day's date": (messages, LLAMA_DATE, []),
    "cut answers": (long_answers, CHATML, ["prepare.max_length=48", "prepare.too_long=keep_start"]),
    "cut prompts": (several_turns, CHATML, ["prepare.max_length=60", "prepare.too_long=keep_end"]),
}


# The others differ from these in what prepare reads, not in what TRL gets.
OFTEN = {"text in a template", "text", "merged system", "several turns", "tools", "cut answers", "cut prompts"}


@pytest.mark.parametrize(
    "case", [case if case in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in PAIRS]
)
def test_dpo_trainer_makes_the_ids_that_were_scored(export, tmp_path, model, case):
    make, template, settings = PAIRS[case]
    (tmp_path / "chat.jinja").write_text(template or "")
    chosen = "prepare.template=none" if template is None else "prepare.chat_template=chat.jinja"
    result, _ = export([make(i) for i in range(N)], chosen, "prepare.max_quarantine=0.9", *settings)
    assert result["left_out"] == {} and result["rows"] + sum(result["quarantined"].values()) == N
    assert result["chat_template"] == (template and "chat.jinja")
    trainer = train(tmp_path, model, result["settings"], template and tmp_path / "chat.jinja")
    theirs = collated(trainer)
    assert len(trainer.train_dataset) == result["rows"] > 1
    assert theirs == stored(tmp_path, trainer, "chosen", "rejected")
    assert count_uncached(tmp_path, theirs) == 0
    # What the case is about has happened.
    examples = Prepared(tmp_path / "runs/tiny/prepared").table()
    if case.startswith("cut"):
        name = "cut_prompt" if case == "cut prompts" else "cut_chosen"
        assert max(examples[name].to_pylist()) > 0 and result["settings"]["max_length"] < 64
    is_text = isinstance(trainer.train_dataset[0]["prompt"], str)
    assert is_text == (template is None or case == "rendered text")
    # TRL has put its own ids in place of those in the file, and they are the same.
    assert pq.read_table(tmp_path / "rows.parquet")["chosen_ids"].to_pylist() == trainer.train_dataset["chosen_ids"][:]
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(np.log(2), abs=1e-6)


def labels_of(i: int) -> dict[str, Any]:
    texts = long_answers(i)
    return {"prompt": texts["prompt"], "completion": texts["chosen"], "label": i % 3 > 0}


@pytest.mark.parametrize("cut", [False, True])
def test_kto_trainer_makes_the_ids_and_the_mismatched_answers_that_were_scored(export, tmp_path, model, cut):
    settings = ["prepare.kl_batch_size=4"]
    settings += ["prepare.max_length=48", "prepare.too_long=keep_start"] if cut else []
    result, _ = export([labels_of(i) for i in range(N)], *settings)
    # Two batches of four rows and one of two.
    assert (result["rows"], result["kl_scored"], result["left_out"]) == (N, N, {})
    assert result["settings"]["per_device_train_batch_size"] == 4
    trainer = train(tmp_path, model, result["settings"])
    theirs, mismatched = collated(trainer), collated(trainer, "KL_")
    assert theirs == stored(tmp_path, trainer, "completion")
    assert mismatched == stored(tmp_path, trainer, "kl")
    assert count_uncached(tmp_path, theirs + mismatched) == 0
    examples = Prepared(tmp_path / "runs/tiny/prepared").table()
    assert (max(examples["cut_completion"].to_pylist()) > 0) == cut
    assert trainer.train_dataset["label"][:] == pq.read_table(tmp_path / "rows.parquet")["label"].to_pylist()


def test_labels_of_text_without_mismatched_answers_suit_a_loss_that_needs_none(export, tmp_path, model):
    write_labels(tmp_path / "labels.jsonl", N)
    records = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    result, _ = export(records, "prepare.template=none", "prepare.kl_pairs=false")
    assert result["kl_scored"] is None
    trainer = train(tmp_path, model, result["settings"], loss_type="apo_zero_unpaired")
    assert collated(trainer) == stored(tmp_path, trainer, "completion")


def test_mismatched_answers_from_anywhere_in_the_data_are_not_those_of_trl(export):
    result, said = export([labels_of(i) for i in range(N)])
    assert result["kl_scored"] == 0 and "prepare.kl_batch_size" in said


def test_trl_refuses_or_ignores_columns_of_log_probs_which_is_why_none_are_written(export, tmp_path, model):
    result, _ = export([messages(i) for i in range(N)])
    assert not [name for name in result["columns"] if "logps" in name]
    rows = pq.read_table(tmp_path / "rows.parquet")
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        rows = rows.append_column(name, pa.array([-1e6 * ("chosen" in name)] * N))
    pq.write_table(rows, tmp_path / "rows.parquet")
    # Any reference that were read from these columns would give another loss than that of equal models.
    assert train(tmp_path, model, result["settings"]).state.log_history[-1]["train_loss"] == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="duplicated"):
        train(tmp_path, model, result["settings"], precompute_ref_log_probs=True)


# -- rows of which TRL would make other ids ----------------------------------------------------------------------------


def test_an_answer_that_the_template_changes_is_left_out_and_named(export, tmp_path, model):
    # As of templates of models that think: what stands before the closing tag is not printed.
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")
    (tmp_path / "chat.jinja").write_text(template)
    records = [messages(i) for i in range(N)]
    for i in (3, 7):
        records[i]["chosen"] = [assistant(f"<think>red</think>{i}")]
    result, _ = export(records, "prepare.chat_template=chat.jinja")
    reason = "the chat template changes an answer, which prepare puts in as it is and TRL does not"
    assert (result["rows"], result["left_out"]) == (N - 2, {reason: 2})
    assert result["first"] == {reason: "pairs.jsonl, line 4"}
    trainer = train(tmp_path, model, result["settings"], tmp_path / "chat.jinja")
    assert collated(trainer) == stored(tmp_path, trainer, "chosen", "rejected")


def test_a_token_across_the_end_of_the_prompt_leaves_the_row_out(export):
    records = [pair(i) for i in range(N)]
    # `cat` is one token.
    records[2] = {"prompt": "why the c", "chosen": "at sings", "rejected": "at eats"}
    result, _ = export(records, "prepare.template=none")
    ((reason, n),) = result["left_out"].items()
    assert n == 1 and "a token reaches from the prompt into an answer" in reason


def test_a_template_without_an_end_token_suits_no_row(export, tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    _, said = export([messages(i) for i in range(N)], "prepare.chat_template=chat.jinja", code=3)
    assert f"TRL would make other ids of all {N} examples: {N} prepare adds the end token" in said
    assert not (tmp_path / "rows.parquet").exists()


def test_a_template_that_prints_the_day_of_training_is_refused(export, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    _, said = export([messages(i) for i in range(N)], "prepare.chat_template=chat.jinja", code=2)
    assert "prints today's date: TRL would train on another one than 2025-01-01" in said


def test_prompts_with_images_are_refused(prefcache, tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    records = [messages(i) | {"images": ["a.png"]} for i in range(N)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    config = write_config(tmp_path, vision_models.save("qwen2.5-vl"))
    prefcache("prepare", config)
    said = prefcache("export", config, "--out", "rows.parquet", "--for", "trl", code=2).stderr
    assert "has prompts with images, which --for trl does not write" in said
    assert not (tmp_path / "rows.parquet").exists()


def test_rendered_text_and_messages_do_not_go_into_one_file(export, tmp_path):
    (tmp_path / "rendered.jsonl").write_text(
        json.dumps({"system": "", "question": "why?", "chosen": "red", "rejected": "blue"}) + "\n"
    )
    sources = [{"path": "pairs.jsonl"}, {"path": "rendered.jsonl", "format": "chatml.intel"}]
    records = [messages(i) for i in range(N)]
    result, _ = export(records, f"prepare.data={json.dumps(sources)}")
    ((reason, n),) = result["left_out"].items()
    assert (result["rows"], n) == (N, 1) and "text that is rendered already in a file of messages" in reason


def test_repeated_and_dropped_examples_are_as_often_in_the_file_as_they_are_trained_on(export, tmp_path):
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(messages(i)) + "\n" for i in (N, N + 1)))
    sources = [{"path": "pairs.jsonl"}, {"path": "twice.jsonl", "weight": 2}]
    records = [messages(i) for i in (*range(N), 0)]
    result, _ = export(records, f"prepare.data={json.dumps(sources)}", "prepare.duplicates=drop")
    assert (result["rows"], result["left_out"]) == (N + 4, {})
    rows = pq.read_table(tmp_path / "rows.parquet")["prefcache_example"].to_pylist()
    assert sorted(rows) == sorted(Prepared(tmp_path / "runs/tiny/prepared").table()["example_id"].to_pylist())


def test_a_row_without_a_finite_log_prob_is_left_out(export, tmp_path, model):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    (token, *_) = AutoTokenizer.from_pretrained(broken)("§", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    records = [messages(i) for i in range(N)]
    records[4]["rejected"] = [assistant("a § sings")]
    result, _ = export(records, f"model={broken}", "score.parity_sample=0")
    assert (result["rows"], result["left_out"]) == (N - 1, {"no finite log-prob of the rejected answer": 1})
    assert list(result["first"].values()) == ["pairs.jsonl, line 5"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--output", "rows.jsonl"), "--for trl writes .parquet"),
        (("--output", "rows.parquet", "--per-token"), "Leave --per-token out"),
        (("--output", "rows.parquet", "--set", "prepare.max_length=99"), "2048 (now 99). Prepare and score again"),
        (("--output", "pairs.jsonl.parquet", "--for", "tlr"), "'tlr' is not 'trl'"),
    ],
)
def test_wrong_arguments_are_refused(prefcache, scored, tmp_path, arguments, said):
    assert said in prefcache("export", scored, "--for", "trl", *arguments, code=2).stderr
    assert not list(tmp_path.glob("rows.*"))


def test_a_person_reads_what_trl_needs(prefcache, scored, tmp_path):
    done = prefcache("export", scored, "--for", "trl", "--output", "rows.parquet").stdout
    assert "rows.parquet: 60 rows, of which TRL makes the ids that were scored" in done
    assert "TRL's settings: max_length=2048, truncation_mode='keep_start'" in done
    assert set(pq.read_table(tmp_path / "rows.parquet")["prefcache_split"].to_pylist()) == {"train", "held_out"}
