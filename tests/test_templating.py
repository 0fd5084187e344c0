"""The ids that are scored and trained are those that the tokenizer gives for what the model sees."""

from pathlib import Path

import pytest
from conftest import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UsageError
from pipeline.example import Example, Unusable
from pipeline.templating import Templater, Tokens

USER = {"role": "user", "content": "why red green?"}
SYSTEM = {"role": "system", "content": "the cat sings"}
REPLY = {"role": "assistant", "content": "blue fish"}


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def tokens(templater: Templater, *turns) -> Tokens:
    (found,) = templater.encode([templater.render(Example(*turns))])
    return found


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def chat(model):
    return Templater(model, "chat", None)


def chat_ids(tokenizer, messages, ask=False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


# -- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [[USER], [SYSTEM, USER], [USER, REPLY, USER], [{"role": "user", "content": "  ünï \n\n日本 <|im_end|>"}]],
    ids=["one turn", "system", "many turns", "odd text"],
)
def test_ids_are_those_of_apply_chat_template(chat, tokenizer, prompt):
    found = tokens(chat, prompt, assistant("the dog runs"), assistant("a"))
    assert found.prompt == chat_ids(tokenizer, prompt, ask=True)
    assert found.prompt + found.chosen == chat_ids(tokenizer, [*prompt, *assistant("the dog runs")])
    assert found.prompt + found.rejected == chat_ids(tokenizer, [*prompt, *assistant("a")])
    assert found.boundary == "exact"


def test_a_string_is_one_turn(chat):
    as_text = tokens(chat, USER["content"], "the dog", "a cat")
    assert as_text == tokens(chat, [USER], assistant("the dog"), assistant("a cat"))


def test_an_answer_of_several_turns_is_rendered_whole(chat, tokenizer):
    answer = [*assistant("one"), USER, *assistant("two")]
    found = tokens(chat, [USER], answer, assistant("a"))
    assert found.prompt + found.chosen == chat_ids(tokenizer, [USER, *answer])


def test_an_answer_ends_with_the_end_token_of_its_turn(chat, tokenizer):
    found = tokens(chat, [USER], assistant("the dog"), assistant("a"))
    # ChatML closes a turn with <|im_end|> and a line's end.
    assert tokenizer.decode(found.chosen) == "the dog<|im_end|>\n"
    assert found.chosen.count(tokenizer.eos_token_id) == 1


def test_a_batch_is_what_each_pair_is_alone(chat):
    examples = [
        Example([USER], "the dog", "a cat"),
        Example([SYSTEM, USER], "one", "two three four"),
        Example("why", "x", "y"),
    ]
    together = chat.encode([chat.render(example) for example in examples])
    assert together == [tokens(chat, example.prompt, example.chosen, example.rejected) for example in examples]
    assert chat.encode([]) == []


def test_a_template_without_a_generation_prompt_puts_the_header_in_the_answer(model, tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML.partition("{% if add_generation_prompt")[0])
    templater = Templater(model, "chat", str(tmp_path / "t.jinja"))
    found = tokens(templater, [USER], assistant("the dog"), assistant("a"))
    tokenizer_with = AutoTokenizer.from_pretrained(model, chat_template=(tmp_path / "t.jinja").read_text())
    assert found.prompt == chat_ids(tokenizer_with, [USER], ask=True) == chat_ids(tokenizer_with, [USER])
    assert found.prompt + found.chosen == chat_ids(tokenizer_with, [USER, *assistant("the dog")])
    assert tokenizer.decode(found.chosen).startswith("<|im_start|>assistant\n")


def test_a_template_that_begins_with_a_special_token_gets_it_once(model, tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text("<|endoftext|>" + CHATML)
    found = tokens(Templater(model, "chat", str(tmp_path / "t.jinja")), [USER], "the dog", "a")
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert found.prompt[0] == first and found.prompt.count(first) == 1


def test_a_chat_template_file_takes_the_place_of_the_tokenizers_own(model, tokenizer, tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    (tmp_path / "t.jinja").write_text(template.replace("{{ m.role }}", "{{ m.role[0] | upper }}"))
    templater = Templater(model, "chat", str(tmp_path / "t.jinja"))
    found = tokens(templater, [USER], assistant("the dog"), assistant("a"))
    assert tokenizer.decode(found.prompt) == "U: why red green?\nA: "
    assert tokenizer.decode(found.prompt + found.chosen) == "U: why red green?\nA: the dog\n"
    assert templater.text == (tmp_path / "t.jinja").read_text()


def test_the_template_in_use_is_the_tokenizers_text(chat):
    assert chat.text == CHATML


def test_of_several_named_templates_the_default_is_the_one_in_use(model, tmp_path):
    named = AutoTokenizer.from_pretrained(model)
    named.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    named.save_pretrained(tmp_path)
    templater = Templater(tmp_path, "chat", None)
    assert tokens(templater, [USER], "the dog", "a") == tokens(Templater(model, "chat", None), [USER], "the dog", "a")
    assert templater.text == CHATML


# -- what a template refuses -----------------------------------------------------------------------------------------


def refusal(templater: Templater, *turns) -> Unusable:
    with pytest.raises(Unusable) as caught:
        templater.render(Example(*turns))
    return caught.value


def with_template(model: Path, tmp_path: Path, text: str) -> Templater:
    (tmp_path / "t.jinja").write_text(text)
    return Templater(model, "chat", str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(
    ("statement", "detail"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[7].content.x }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
    ],
)
def test_a_template_that_raises_makes_the_record_unusable(model, tmp_path, statement, detail):
    templater = with_template(
        model, tmp_path, "{% if messages[0].role == 'system' %}" + statement + "{% endif %}" + CHATML
    )
    found = refusal(templater, [SYSTEM, USER], "the dog", "a")
    assert found.reason == "template refuses" and detail in found.detail
    assert tokens(templater, [USER], "the dog", "a").boundary == "exact"  # others are not touched


def test_a_template_that_rewrites_the_prompt_makes_the_record_unusable(model, tmp_path):
    # As reasoning models do: earlier turns are shown otherwise once a later one exists.
    templater = with_template(model, tmp_path, "{{ messages | length }} turns\n" + CHATML)
    assert refusal(templater, [USER], "the dog", "a").reason == "template rewrites the prompt"


def test_a_prompt_that_ends_with_an_answer_is_unusable(chat):
    assert refusal(chat, [USER, REPLY], "the dog", "a").reason == "prompt ends with an assistant turn"


def test_an_answer_that_is_no_assistant_turn_is_unusable(chat):
    found = refusal(chat, [USER], [USER], assistant("a"))
    assert found.reason == "answer is no assistant turn" and "'user'" in found.detail


# -- plain text ------------------------------------------------------------------------------------------------------


def test_plain_text_is_encoded_as_it_is_with_the_end_token_once(model, tokenizer):
    templater = Templater(model, "none", None)
    found = tokens(templater, "why red", " green dog", " cat")
    end = tokenizer.eos_token_id
    assert found.prompt == tokenizer("why red", add_special_tokens=False)["input_ids"]
    assert found.prompt + found.chosen == [*tokenizer("why red green dog", add_special_tokens=False)["input_ids"], end]
    assert found.prompt + found.rejected == [*tokenizer("why red cat", add_special_tokens=False)["input_ids"], end]
    assert found.chosen.count(end) == found.rejected.count(end) == 1
    assert templater.text is None


def test_an_answer_that_brings_its_end_token_gets_no_second_one(model, tokenizer):
    found = tokens(Templater(model, "none", None), "why red", " green<|im_end|>", " cat")
    assert found.chosen.count(tokenizer.eos_token_id) == 1


def test_plain_text_takes_no_messages(model):
    found = refusal(Templater(model, "none", None), [USER], "the dog", "a")
    assert found.reason == "messages where plain text is asked for" and "prepare.template: chat" in found.detail


def letters(folder: Path, *, bos: bool = False) -> Path:
    """A tokenizer of single letters, but for `bc`, which merges."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "c", "d", "bc"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_where_tokens_would_merge_across_the_boundary_it_is_cut_by_hand(tmp_path):
    templater = Templater(letters(tmp_path), "none", None)
    whole = templater.tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert whole == [2, 6]  # a, bc: no token ends where the prompt does
    found = tokens(templater, "ab", "c", "d")
    # Prompt a, b as when asked; c on its own; d too, so that both share the prompt's ids. 1 is the end.
    assert found == Tokens([2, 3], [4, 1], [5, 1], "split")


def test_where_nothing_merges_the_boundary_is_exact(tmp_path):
    found = tokens(Templater(letters(tmp_path), "none", None), "a", "bc", "d")
    assert found == Tokens([2], [6, 1], [5, 1], "exact")


def test_a_beginning_token_is_added_where_the_tokenizer_adds_one(tmp_path):
    assert tokens(Templater(letters(tmp_path / "bos", bos=True), "none", None), "a", "bc", "d").prompt == [0, 2]
    assert tokens(Templater(letters(tmp_path / "none"), "none", None), "a", "bc", "d").prompt == [2]


def test_a_merge_across_the_boundary_of_a_chat_is_cut_by_hand_too(tmp_path):
    folder = letters(tmp_path)
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}b{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    found = tokens(Templater(folder, "chat", str(tmp_path / "t.jinja")), "a", "c", "d")
    assert found == Tokens([2, 3], [4], [5], "split")


# -- what cannot be used at all --------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"no chat template.*prepare\.chat_template.*prepare\.template: none"):
        Templater(letters(tmp_path), "chat", None)


def test_a_tokenizer_without_an_end_token_is_refused_for_plain_text(model, tmp_path):
    endless = AutoTokenizer.from_pretrained(model)
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no end token"):
        Templater(tmp_path, "none", None)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no tokenizer that loads"):
        Templater(tmp_path, "chat", None)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_a_template_file_that_cannot_be_read_is_refused(model, tmp_path, make):
    make(tmp_path / "t.jinja")
    with pytest.raises(UsageError, match=r"prepare\.chat_template: .*t\.jinja cannot be read"):
        Templater(model, "chat", str(tmp_path / "t.jinja"))
