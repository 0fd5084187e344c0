"""A config that names one of Axolotl's strategies finds the columns read and the text written that Axolotl documents."""

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing.example import Candidate, Label, Pair, Ranking
from prefcache.pipeline.preparing.expand_rankings import expand
from prefcache.pipeline.preparing.formats import FORMATS, get_format
from tests.helpers.formats import read, refused


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


ASKED, GOOD, BAD = said("user", "Name a bird."), said("assistant", "A wren."), said("assistant", "A bat.")

# The texts are written out by hand, in full, so that no code is shared with what is tested.
WRITTEN = {
    "chatml": Pair(
        prompt="<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\n",
        chosen="A wren.<|im_end|>",
        rejected="A bat.<|im_end|>",
        rendered=True,
    ),
    "llama3": Pair(
        prompt=(
            "<|start_header_id|>user<|end_header_id|>\n\nName a bird.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        chosen="A wren.<|eot_id|>",
        rejected="A bat.<|eot_id|>",
        rendered=True,
    ),
}
SYSTEM = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
}
LONGER = {  # two questions: what comes before "Name a bird."
    "chatml": "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n",
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    ),
}
HISTORY = [said("user", "Hello."), said("assistant", "Hi.")]

PAIRS = {
    "default": {"prompt": "Name a bird.", "chosen": "A wren.", "rejected": "A bat."},
    "argilla": {"instruction": "Name a bird.", "chosen_response": "A wren.", "rejected_response": "A bat."},
    "argilla_chat": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "icr": {"input": "Name a bird.", "chosen": "A wren.", "rejected": "A bat."},
    "intel": {"question": "Name a bird.", "chosen": "A wren.", "rejected": "A bat."},
    "prompt_pairs": {"prompt": "Name a bird.", "chosen": "A wren.", "rejected": "A bat."},
    "ultra": {"prompt": "Name a bird.", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
}
LABELS = {
    "argilla": {"instruction": "Name a bird.", "completion": "A wren.", "label": True},
    "argilla_chat": {"completion": [ASKED, GOOD], "label": True},
    "intel": {"question": "Name a bird.", "completion": "A wren.", "label": True},
    "prompt_pairs": {"prompt": "Name a bird.", "completion": "A wren.", "label": True},
    "ultra": {"prompt": "Name a bird.", "completion": "A wren.", "label": True},
}
TEMPLATED = {"messages": [ASKED], "chosen": GOOD, "rejected": BAD}
BY_TEMPLATE = Pair(prompt=[ASKED], chosen=[GOOD], rejected=[BAD])
NECTAR = {
    "prompt": "\n\nHuman: Name a bird.\n\nAssistant: ",
    "answers": [{"answer": "A bat.", "rank": 3}, {"answer": "A wren.", "rank": 1}, {"answer": "A bee.", "rank": 2}],
}

dialects = pytest.mark.parametrize("dialect", ["chatml", "llama3"])
DOCUMENTED = [
    *(f"{dialect}.{layout}" for dialect in WRITTEN for layout in PAIRS),
    *(f"kto.{dialect}.{layout}" for dialect in WRITTEN for layout in LABELS),
    *("chat_template.default", "chat_template.argilla_chat", "user_defined.default", "kto.user_defined.default"),
    *("orpo.chat_template.argilla", "orpo.chat_template", "orpo.chat_template.load", "bradley_terry.chat_template"),
    *("passthrough.default", "zephyr.nectar"),
    *("chatml", "llama3", "chat_template", "user_defined", "kto.user_defined", "passthrough"),
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_strategy_is_a_format_that_says_what_it_reads(name):
    data_format = get_format(name)
    assert data_format.help.startswith("Axolotl ") and data_format.help.endswith(".")
    assert data_format.recognises is None
    assert data_format.makes == ("labels" if name.startswith("kto.") else "rankings" if "nectar" in name else "pairs")


def test_help_names_the_strategy_its_columns_and_its_text():
    assert FORMATS["chatml.intel"].help == "Axolotl chatml.intel: question, chosen, rejected, written out as ChatML."
    assert FORMATS["chatml.intel"].columns == ("question", "chosen", "rejected")
    assert FORMATS["chatml.intel"].optional == ("system",)
    assert "of KTO" in FORMATS["kto.chatml.intel"].help
    assert list(FORMATS["chat_template"].options) == [
        *("field_messages", "field_chosen", "field_rejected", "field_tools", "message_property_mappings", "roles"),
    ]


# -- chatml and llama3 -----------------------------------------------------------------------------------------------


@dialects
@pytest.mark.parametrize("layout", PAIRS)
def test_a_pair_is_written_out(dialect, layout):
    assert read(f"{dialect}.{layout}", PAIRS[layout]) == WRITTEN[dialect]


@dialects
@pytest.mark.parametrize("layout", LABELS)
def test_a_label_is_written_out(dialect, layout):
    pair = WRITTEN[dialect]
    expected = Label(prompt=pair.prompt, completion=pair.chosen, label=True, rendered=True)
    assert read(f"kto.{dialect}.{layout}", LABELS[layout]) == expected
    assert read(f"kto.{dialect}.{layout}", LABELS[layout] | {"label": False}).label is False


@dialects
@pytest.mark.parametrize("layout", sorted(PAIRS.keys() - {"argilla_chat"}))
def test_a_system_text_goes_first(dialect, layout):
    pair = read(f"{dialect}.{layout}", PAIRS[layout] | {"system": "Be brief."})
    assert pair.prompt == SYSTEM[dialect] + WRITTEN[dialect].prompt
    assert pair.chosen == WRITTEN[dialect].chosen


@dialects
@pytest.mark.parametrize("layout", sorted(LABELS.keys() - {"argilla_chat"}))
def test_a_system_text_of_a_label_goes_first(dialect, layout):
    label = read(f"kto.{dialect}.{layout}", LABELS[layout] | {"system": "Be brief."})
    assert label.prompt == SYSTEM[dialect] + WRITTEN[dialect].prompt


@dialects
@pytest.mark.parametrize("system", [None, "", " \n", float("nan")])
def test_no_system_text_makes_no_system_turn(dialect, system):
    for layout, record in PAIRS.items():
        assert read(f"{dialect}.{layout}", record | {"system": system}) == WRITTEN[dialect]
    for layout, record in LABELS.items():
        assert read(f"kto.{dialect}.{layout}", record | {"system": system}).prompt == WRITTEN[dialect].prompt


@dialects
def test_default_takes_the_first_column_of_the_usual_names(dialect):
    for prompt in ("prompt", "input", "question", "instruction"):
        record = {prompt: "Name a bird.", "chosen_response": "A wren.", "rejected_response": "A bat."}
        assert read(dialect, record) == WRITTEN[dialect]
    # prompt goes before instruction, and chosen before chosen_response; null is not there
    both = PAIRS["default"] | {"instruction": "no", "chosen_response": "no", "rejected_response": "no"}
    assert read(f"{dialect}.default", both) == WRITTEN[dialect]
    assert read(f"{dialect}.default", {"prompt": None, "input": None, **PAIRS["intel"]}) == WRITTEN[dialect]


@dialects
def test_of_a_longer_conversation_the_last_message_is_the_answer(dialect):
    record = {"chosen": [*HISTORY, ASKED, GOOD], "rejected": [*HISTORY, ASKED, BAD]}
    pair = read(f"{dialect}.argilla_chat", record)
    assert pair.prompt == LONGER[dialect] + WRITTEN[dialect].prompt
    assert (pair.chosen, pair.rejected) == (WRITTEN[dialect].chosen, WRITTEN[dialect].rejected)
    # `prompt` holds the first question alone
    assert read(f"{dialect}.ultra", record | {"prompt": "Hello."}) == pair
    system = read(f"{dialect}.ultra", record | {"prompt": "Hello.", "system": "Be brief."})
    assert system.prompt == SYSTEM[dialect] + pair.prompt
    label = read(f"kto.{dialect}.argilla_chat", {"completion": record["chosen"], "label": False})
    assert (label.prompt, label.completion) == (pair.prompt, pair.chosen)


@dialects
def test_a_system_message_of_a_conversation_is_a_turn(dialect):
    system = said("system", "Be brief.")
    record = {"chosen": [system, ASKED, GOOD], "rejected": [system, ASKED, BAD]}
    for layout in ("argilla_chat", "ultra"):
        pair = read(f"{dialect}.{layout}", record | {"prompt": "Name a bird."})
        assert pair.prompt == SYSTEM[dialect] + WRITTEN[dialect].prompt
        assert pair.chosen == WRITTEN[dialect].chosen


def test_ultra_asks_its_prompt():
    # As Axolotl does: chosen's own first message is not read where it is the only question.
    chosen = [said("user", "(the same, shortened)"), GOOD]
    assert (
        read("chatml.ultra", {"prompt": "Name a bird.", "chosen": chosen, "rejected": [ASKED, BAD]})
        == WRITTEN["chatml"]
    )


def test_kto_chat_reads_an_answer_alone_and_what_it_answers_in_chosen():
    documented = {"chosen": [ASKED], "completion": [GOOD], "label": True}
    assert read("kto.chatml.argilla_chat", documented).prompt == WRITTEN["chatml"].prompt
    whole = {"chosen": [ASKED, GOOD], "completion": [GOOD], "label": True}
    assert read("kto.chatml.argilla_chat", whole).prompt == WRITTEN["chatml"].prompt


@dialects
def test_an_answer_is_written_as_it_is(dialect):
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[dialect]
    answer = "  {a} {{b}} <think>\n%s</think> $\n\n"
    assert read(f"{dialect}.intel", PAIRS["intel"] | {"chosen": answer}).chosen == answer + end
    conversation = {"chosen": [ASKED, said("assistant", answer)], "rejected": [ASKED, BAD]}
    assert read(f"{dialect}.argilla_chat", conversation).chosen == answer + end


UNUSABLE = [
    ("missing column", "chatml.intel", PAIRS["icr"]),
    ("missing column", "chatml.default", {"chosen": "a", "rejected": "b"}),
    ("missing column", "llama3.argilla", PAIRS["intel"]),
    ("missing column", "chatml.ultra", PAIRS["argilla_chat"]),
    ("missing column", "kto.chatml.intel", {"question": "q", "completion": "a"}),
    ("wrong type", "chatml.intel", PAIRS["intel"] | {"question": None}),
    ("wrong type", "chatml.intel", PAIRS["intel"] | {"chosen": None}),
    ("wrong type", "chatml.intel", PAIRS["intel"] | {"chosen": 7}),
    ("wrong type", "chatml.intel", PAIRS["intel"] | {"chosen": [ASKED, GOOD]}),
    ("wrong type", "chatml.intel", PAIRS["intel"] | {"system": ["a"]}),
    ("wrong type", "chatml.argilla_chat", PAIRS["intel"]),
    ("wrong type", "chatml.argilla_chat", {"chosen": [ASKED, said("assistant", None)], "rejected": [ASKED, BAD]}),
    ("wrong type", "kto.llama3.ultra", {"prompt": "q", "completion": [ASKED, GOOD], "label": True}),
    ("label is no boolean", "kto.llama3.ultra", LABELS["ultra"] | {"label": 1}),
    ("empty prompt", "chatml.intel", PAIRS["intel"] | {"question": " "}),
    ("empty prompt", "chatml.intel", PAIRS["intel"] | {"question": "", "system": "Be brief."}),
    ("empty prompt", "llama3.argilla_chat", {"chosen": [GOOD], "rejected": [BAD]}),
    ("empty answer", "chatml.intel", PAIRS["intel"] | {"rejected": " \n"}),
    ("empty answer", "llama3.argilla_chat", {"chosen": [ASKED, said("assistant", "")], "rejected": [ASKED, BAD]}),
    ("empty answer", "kto.chatml.ultra", LABELS["ultra"] | {"completion": ""}),
    ("unknown role", "chatml.argilla_chat", {"chosen": [said("narrator", "x"), GOOD], "rejected": [ASKED, BAD]}),
    ("no assistant turn", "chatml.argilla_chat", {"chosen": [GOOD, ASKED], "rejected": [ASKED, BAD]}),
    (
        "answers to different prompts",
        "chatml.argilla_chat",
        {"chosen": [*HISTORY, ASKED, GOOD], "rejected": [ASKED, BAD]},
    ),
    ("tool calls", "chatml.argilla_chat", {"chosen": [ASKED, GOOD | {"tool_calls": [{}]}], "rejected": [ASKED, BAD]}),
    ("wrong type", "chat_template", TEMPLATED | {"chosen": 7}),
    ("wrong type", "chat_template", TEMPLATED | {"chosen": said("assistant", None)}),
    ("empty answer", "chat_template", TEMPLATED | {"chosen": []}),
    ("unknown role", "chat_template", TEMPLATED | {"chosen": said("narrator", "x")}),
    ("no assistant turn", "chat_template", TEMPLATED | {"chosen": [said("user", "Name a fish."), GOOD]}),
    ("no assistant turn", "chat_template", TEMPLATED | {"chosen": ASKED}),
    ("wrong type", "chat_template.argilla_chat", {"chosen": "A wren.", "rejected": "A bat."}),
    ("wrong type", "orpo.chat_template.argilla", {"chosen": "A wren.", "rejected": "A bat."}),
    ("empty answer", "user_defined", PAIRS["default"] | {"chosen": ""}),
    ("empty prompt", "user_defined", PAIRS["default"] | {"prompt": ""}),
    ("wrong type", "user_defined", PAIRS["default"] | {"rejected": {"text": "no"}}),
    ("label is no boolean", "kto.user_defined", LABELS["ultra"] | {"label": "yes"}),
    ("wrong type", "passthrough", PAIRS["default"] | {"chosen": [GOOD]}),
    ("wrong type", "zephyr.nectar", NECTAR | {"answers": ["A wren."]}),
    ("wrong type", "zephyr.nectar", NECTAR | {"answers": [{"answer": "A wren.", "rank": "first"}]}),
    ("missing column", "zephyr.nectar", NECTAR | {"answers": [{"answer": "A wren."}]}),
    ("wrong type", "zephyr.nectar", NECTAR | {"answers": [{"answer": None, "rank": 1}]}),
    ("empty prompt", "zephyr.nectar", NECTAR | {"prompt": ""}),
]


@pytest.mark.parametrize(("reason", "name", "record"), UNUSABLE, ids=[f"{name}-{why}" for why, name, _ in UNUSABLE])
def test_a_record_that_cannot_be_used_says_why(reason, name, record):
    assert refused(name, record)[0] == reason


# -- by the tokenizer's own template ---------------------------------------------------------------------------------


def test_chat_template_takes_an_answer_as_message_text_or_end_of_a_conversation():
    for wrap in (lambda m: m, lambda m: m["content"], lambda m: [m], lambda m: [ASKED, m]):
        assert read("chat_template", TEMPLATED | {"chosen": wrap(GOOD), "rejected": wrap(BAD)}) == BY_TEMPLATE
    assert read("chat_template.default", TEMPLATED | {"messages": "Name a bird."}) == BY_TEMPLATE


def test_chat_template_keeps_a_longer_prompt_and_a_longer_answer():
    system = said("system", "Be brief.")
    asked = [system, *HISTORY, ASKED]
    record = {"messages": asked, "chosen": [*asked, GOOD], "rejected": [*HISTORY, ASKED, BAD]}
    assert read("chat_template", record) == Pair(prompt=asked, chosen=[GOOD], rejected=[BAD])
    # Axolotl would take the last message alone, and lose what it goes on from.
    steps = [said("assistant", "I look it up."), said("tool", "wren"), GOOD]
    assert read("chat_template", TEMPLATED | {"chosen": steps}).chosen == steps


def test_chat_template_reads_keys_and_roles_of_other_names():
    record = {
        "conversation": [{"speaker": "caller", "text": "Name a bird.", "content": "(unread)"}],
        "better": {"speaker": "agent", "text": "A wren.", "id": 7},
        "worse": [
            {"speaker": "agent", "text": "A bat.", "calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
        ],
        "functions": '[{"type": "function"}]',
    }
    pair = read(
        "chat_template.default",
        record,
        field_messages="conversation",
        field_chosen="better",
        field_rejected="worse",
        field_tools="functions",
        message_property_mappings={"role": "speaker", "content": "text", "tool_calls": "calls"},
        roles={"user": ["caller"], "assistant": ["agent"]},
    )
    assert pair.prompt == [ASKED]
    assert pair.chosen == [GOOD | {"id": 7}]
    assert pair.rejected == [BAD | {"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    assert pair.tools == [{"type": "function"}]
    assert not pair.rendered


def test_chat_template_argilla_chat_reads_whole_conversations():
    record = {"chosen": [*HISTORY, ASKED, GOOD], "rejected": [*HISTORY, ASKED, BAD]}
    expected = Pair(prompt=[*HISTORY, ASKED], chosen=[GOOD], rejected=[BAD])
    assert read("chat_template.argilla_chat", record) == expected
    named = {"good": [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "A wren."}]}
    named["bad"] = [named["good"][0], {"from": "gpt", "value": "A bat."}]
    mappings = {"role": "from", "content": "value"}
    options = {"field_chosen": "good", "field_rejected": "bad", "message_property_mappings": mappings}
    assert read("chat_template.argilla_chat", named, **options) == BY_TEMPLATE


def test_answers_are_compared_over_the_same_prompt_whatever_else_its_messages_hold():
    record = {"chosen": [ASKED | {"id": 1}, GOOD], "rejected": [ASKED | {"id": 2}, BAD]}
    assert read("chatml.argilla_chat", record) == WRITTEN["chatml"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"roles": ["human"]}, "['human']"),
        ({"roles": {"user": "human"}}, "'human'"),
        ({"message_property_mappings": {"role": ["from"]}}, "['from']"),
        ({"message_property_mappings": "from"}, "'from'"),
    ],
)
def test_an_option_of_another_shape_is_a_usage_error(options, found):
    with pytest.raises(UsageError) as caught:
        read("chat_template", TEMPLATED, **options)
    assert "prepare.format_args" in str(caught.value) and found in str(caught.value)


def test_orpo_asks_its_prompt_where_there_is_one_question():
    record = {"chosen": [said("user", "(shortened)"), GOOD], "rejected": [said("user", "(shortened)"), BAD]}
    for name in ("orpo.chat_template.argilla", "orpo.chat_template"):
        assert read(name, record | {"prompt": "Name a bird."}) == BY_TEMPLATE
        assert read(name, record | {"prompt": None}).prompt == [said("user", "(shortened)")]
        system = read(name, record | {"prompt": "Name a bird.", "system": "Be brief."})
        assert system.prompt == [said("system", "Be brief."), ASKED]


def test_orpo_reads_longer_conversations_as_they_are():
    record = {"prompt": "Hello.", "chosen": [*HISTORY, ASKED, GOOD], "rejected": [*HISTORY, ASKED, BAD]}
    expected = Pair(prompt=[*HISTORY, ASKED], chosen=[GOOD], rejected=[BAD])
    assert read("orpo.chat_template.argilla", record) == expected


def test_orpos_load_asks_what_the_conversations_ask():
    record = {"prompt": "Name a fish.", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    assert read("orpo.chat_template.load", record) == BY_TEMPLATE
    system = read("orpo.chat_template.load", record | {"system": "Be brief."})
    assert system.prompt == [said("system", "Be brief."), ASKED]
    other = [said("user", "Name a fish."), BAD]
    assert refused("orpo.chat_template.load", record | {"rejected": other})[0] == "answers to different prompts"


def test_data_of_a_reward_model_is_asked_and_answered_in_text():
    record = {"system": "Be brief.", "input": "Name a bird.", "chosen": "A wren.", "rejected": "A bat."}
    pair = Pair(prompt=[said("system", "Be brief."), ASKED], chosen="A wren.", rejected="A bat.")
    assert read("bradley_terry.chat_template", record) == pair
    assert read("bradley_terry.chat_template", record | {"system": None}).prompt == [ASKED]


# -- texts as the config or the data has them ------------------------------------------------------------------------


def test_user_defined_puts_texts_into_formats():
    record = {"s": "Be brief.", "q": "Name a bird.", "good": "A wren.", "bad": "A bat."}
    options = {
        "field_system": "s",
        "field_prompt": "q",
        "field_chosen": "good",
        "field_rejected": "bad",
        "prompt_format": "[{system}] {{Q}} {prompt}\n",
        "chosen_format": "{chosen}</s>",
        "rejected_format": "{rejected}</s>",
    }
    expected = Pair(prompt="[Be brief.] {Q} Name a bird.\n", chosen="A wren.</s>", rejected="A bat.</s>", rendered=True)
    assert read("user_defined", record, **options) == expected
    for system in (None, ""):
        assert read("user_defined", record | {"s": system}, **options).prompt == "[] {Q} Name a bird.\n"


def test_user_defined_takes_the_texts_as_they_are_unless_told():
    texts = Pair(**PAIRS["default"], rendered=True)
    assert read("user_defined.default", PAIRS["default"]) == texts
    assert read("user_defined.default", PAIRS["default"], chosen_format=None) == texts
    renamed = read("user_defined", PAIRS["intel"], field_prompt="question")
    assert renamed.prompt == "Name a bird."


def test_braces_in_the_data_are_text():
    record = {"prompt": "{chosen} {0}", "chosen": "{prompt} {} }{", "rejected": "{{x}}"}
    pair = read("user_defined", record, chosen_format="<{chosen}>")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("{chosen} {0}", "<{prompt} {} }{>", "{{x}}")


@pytest.mark.parametrize(
    "bad",
    [
        "{prompt.__class__}",
        "{prompt[0]}",
        "{prompt!r}",
        "{prompt:>9}",
        "{}",
        "{0}",
        "{chosen}",
        "{prompt",
        "{prompt:{system}}",
    ],
)
def test_a_format_holds_only_the_names_of_the_texts(bad):
    with pytest.raises(UsageError) as caught:
        read("user_defined", PAIRS["default"], prompt_format=bad)
    assert "prepare.format_args: prompt_format" in str(caught.value)
    assert "{system} and {prompt}" in str(caught.value)


def test_a_format_is_text():
    with pytest.raises(UsageError, match="chosen_format is list; expected text"):
        read("user_defined", PAIRS["default"], chosen_format=["{chosen}"])


def test_kto_user_defined_puts_texts_into_formats():
    record = {"q": "Name a bird.", "a": "A {wren}.", "good": False}
    options = {
        "field_prompt": "q",
        "field_completion": "a",
        "field_label": "good",
        "completion_format": "{completion}</s>",
    }
    expected = Label(prompt="Name a bird.", completion="A {wren}.</s>", label=False, rendered=True)
    assert read("kto.user_defined", record, **options) == expected


def test_passthrough_takes_texts_as_they_are_and_leaves_messages_to_the_template():
    assert read("passthrough", PAIRS["default"]) == Pair(**PAIRS["default"], rendered=True)
    messages = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
    assert read("passthrough.default", messages) == BY_TEMPLATE


def test_the_best_of_nectar_has_rank_1():
    ranking = read("zephyr.nectar", NECTAR)
    assert ranking == Ranking(
        prompt="<|system|>\n</s>\n<|user|>\n\n\nHuman: Name a bird.\n\nAssistant: </s>\n<|assistant|>\n",
        answers=(Candidate("A bat.", -3), Candidate("A wren.", -1), Candidate("A bee.", -2)),
        rendered=True,
    )
    (pair,) = expand(ranking, pairing="best_worst", ties=False, as_labels=False)
    assert (pair.chosen, pair.rejected) == ("A wren.", "A bat.")
