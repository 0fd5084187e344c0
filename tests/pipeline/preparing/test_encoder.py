"""An answer's ids are those that Transformers' tokenizer gives for the whole, for every family of tokenizers."""

import dataclasses
import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.preparing import encoder, tokenizer_facts
from prefcache.pipeline.preparing.encoder import Encoder, ExampleText, ExampleTokens
from tests.helpers.tokenizers import FAMILIES, LOSSLESS, SPECIALS, TEMPLATES, build, facts, saved, with_lists

FRAGMENTS = [
    "the cat", " the", "assistant\n", "\n", "\n\n", " ", "  ", "\t", "x", "ab", "1234", "don't", "日本", "é", "e\u0301", "🙂", "\u2581",
    "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_end", "<|im_end|><|x|>", "|>", "<mask>", " <mask> ", "word", " word ",
    "awordb", "<NORM>", "<norm>", "<unk>", "<0x0A>", "[INST] ", " [/INST]", *SPECIALS,
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), min_size=1, max_size=6).map("".join)
modest = settings(max_examples=60)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_against(tokenizer: Any, coder: Encoder, text: ExampleText) -> ExampleTokens:
    """That its ids are those of the tokenizer for the whole, wherever these begin with the prompt's."""
    found = with_lists(*coder.encode([text]))
    prompt = plain_ids(tokenizer, text.prompt)
    wholes = [plain_ids(tokenizer, text.prompt + answer) for answer in text.answers]
    assert found.prompt == prompt
    assert found.exact == all(whole[: len(prompt)] == prompt for whole in wholes)
    if found.exact:
        for whole, answer in zip(wholes, found.answers, strict=True):
            rest = whole[len(prompt) :]
            assert answer in (rest, [*rest, tokenizer.eos_token_id])
    return found


def test_an_end_token_counts_where_at_most_two_blanks_follow_it():
    """A template may write a line end after it. Of plain text, only the last token can be the end."""
    coder = Encoder(facts("byte-level"))
    end = coder.decode([facts("byte-level").eos])
    blanks = ["", "\t", "\t\r", "\t\r\t", "\t\r\t\r"]
    assert [len(ids) for ids in coder.ids(blanks)] == [0, 1, 2, 3, 4]
    for plain, expected in ((False, [False, False, False, True, True]), (True, [False, True, True, True, True])):
        texts = [ExampleText("<|im_start|>user\n", (f"yes{end}{each}",), plain) for each in blanks]
        assert [found.ended for found in coder.encode(texts)] == expected
    (unsaid,) = coder.encode([ExampleText("<|im_start|>user\n", (f"yes{end}\t",))])
    assert not unsaid.ended  # what nothing is said of was written by a template


# -- all families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=texts, chosen=texts, rejected=texts)
@modest
def test_ids_are_those_of_the_whole(family, prompt, chosen, rejected):
    _, tokenizer = saved(family)
    check_against(tokenizer, Encoder(facts(family)), ExampleText(prompt, (chosen, rejected)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_whole_for_every_template(family, name):
    _, tokenizer = saved(family)
    coder = Encoder(facts(family))
    for question in ("why?", "  two  spaces\n", "<|im_end|>", "日本 <|im_end|><|x|> word"):
        for answer in ("the cat sings", " the", "\n\nlines", "  x", "42", "<|im_end|>"):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            options = {"chat_template": TEMPLATES[name], "tokenize": False, "bos_token": "<s>"}
            asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options)
            whole = tokenizer.apply_chat_template(turns, **options)
            if whole.startswith(asked):
                check_against(tokenizer, coder, ExampleText(asked, (whole[len(asked) :],)))


@pytest.mark.parametrize("family", FAMILIES)
def test_many_at_once_are_what_each_is_alone(family):
    coder = Encoder(facts(family))
    texts = [
        ExampleText(f"<|im_start|>{a}<|im_end|>\n<|im_start|>user\n", (b, a))
        for a in FRAGMENTS[:12]
        for b in FRAGMENTS[:12]
    ] + [ExampleText(a, (b,), plain=True) for a in FRAGMENTS for b in FRAGMENTS[:3]]
    fresh = Encoder(facts(family))
    assert coder.encode(texts) == [tokens for text in texts for tokens in fresh.encode([text])]
    assert coder.encode([]) == []


def test_the_memory_of_prompts_ends_is_bounded(monkeypatch):
    monkeypatch.setattr(encoder, "_MOST_TAILS", 3)
    coder, (_, tokenizer) = Encoder(facts("byte-level")), saved("byte-level")
    for n in range(10):
        check_against(tokenizer, coder, ExampleText(f"<|im_start|>user {n}\n", ("the cat",)))
        assert len(coder._tail_ids) <= 3


@pytest.mark.parametrize("family", LOSSLESS)
@given(prompt=texts, answer=texts)
@modest
def test_ids_say_the_text(family, prompt, answer):
    coder = Encoder(facts(family))
    (found,) = coder.encode([ExampleText(prompt, (answer,))])
    ended = "</s>" if found.ended else ""
    assert coder.decode(found.prompt) == saved(family)[1].decode(plain_ids(saved(family)[1], prompt))
    assert coder.decode([*found.prompt, *found.answers[0]]) == coder.decode(coder.ids([prompt + answer])[0]) + ended


@pytest.mark.parametrize("family", LOSSLESS)
def test_no_text_is_lost_where_the_boundary_is_cut(family):
    coder = Encoder(facts(family))
    n_cut = 0
    for prompt in FRAGMENTS:
        for answer in FRAGMENTS:
            (found,) = coder.encode([ExampleText("a" + prompt, (answer,))])
            n_cut += not found.exact
            said = coder.decode(found.answers[0]).removesuffix("</s>")
            if not found.exact and "\u2581" not in prompt + answer:  # which gemma reads as a space
                assert said == answer.removesuffix("</s>"), (prompt, answer)
    assert n_cut > 10


# -- the boundary, by hand -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Callable[..., Path]:
    """Folders of a tokenizer of single letters, except for `bc`, which merges, and `>x`, which merges with a marker's end."""

    @functools.cache
    def save(*, bos: bool = False, eos: str | None = "</s>") -> Path:
        tokens = ["<s>", "</s>", "a", "b", "c", "d", "bc", ">", "x", ">x", "<u>"]
        bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("b", "c"), (">", "x")]))
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens([AddedToken("<u>", normalized=False)])
        if bos:
            bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        named = {"eos_token": eos} if eos else {}
        folder: Path = tmp_path_factory.mktemp("letters")
        PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", **named).save_pretrained(folder)
        return folder

    return save


def encode(folder: Path, prompt: str, *answers: str, plain: bool = True) -> ExampleTokens:
    return with_lists(*Encoder(tokenizer_facts.load_facts(folder)).encode([ExampleText(prompt, answers, plain)]))


BOS, NO_EOS, BY_TEMPLATE = {"bos": True}, {"eos": None}, {"plain": False}


@pytest.mark.parametrize(
    ("options", "prompt", "answers", "expected"),
    [
        # a | bc, d; each with the end, 1
        ({}, "a", ["bc", "d"], ([2], ([6, 1], [5, 1]), True, True)),
        # The whole is a, bc: no token ends where the prompt does. So a, b as when asked; c, and d too, on their own.
        ({}, "ab", ["c", "d"], ([2, 3], ([4, 1], [5, 1]), False, True)),
        ({}, "ab", ["c", "c</s>"], ([2, 3], ([4, 1], [4, 1]), False, True)),
        # An answer that merges does not change what it is compared with.
        ({}, "b", ["c", "bcd"], ([3], ([4, 1], [6, 5, 1]), False, True)),
        # A special token ends what could merge: the > of <u>, 10, does not merge with x, which stays 8.
        ({}, "ab<u>", ["x"], ([2, 3, 10], ([8, 1],), True, True)),
        # Plain text begins as the tokenizer begins, never twice; text of a template begins as it is.
        (BOS, "a", ["bc"], ([0, 2], ([6, 1],), True, True)),
        (BOS, "<s>a", ["bc"], ([0, 2], ([6, 1],), True, True)),
        ({}, "<s>a", ["bc"], ([0, 2], ([6, 1],), True, True)),
        (BOS | BY_TEMPLATE, "<s>a", ["bc"], ([0, 2], ([6, 1],), True, True)),
        (BOS | BY_TEMPLATE, "a", ["bc"], ([2], ([6, 1],), True, True)),
        # An end is added if there is none, and never twice.
        ({}, "a", ["bc</s>"], ([2], ([6, 1],), True, False)),
        ({}, "a", ["bc</s>", "d"], ([2], ([6, 1], [5, 1]), True, True)),
        (BY_TEMPLATE, "a", ["bc"], ([2], ([6, 1],), True, True)),
        (NO_EOS, "a", ["bc"], ([2], ([6],), True, False)),
        # Plain text ends with the tokenizer's own end, whatever token a person wrote last.
        ({}, "a", ["bc<u>"], ([2], ([6, 10, 1],), True, True)),
        # A template may end a turn with another token; but a token with more text after it ends nothing.
        (BY_TEMPLATE, "a", ["bc<u>"], ([2], ([6, 10],), True, False)),
        (BY_TEMPLATE, "a", ["bc<u>x"], ([2], ([6, 10, 8, 1],), True, True)),
        ({}, "a", ["<u>abcd"], ([2], ([10, 2, 6, 5, 1],), True, True)),
        ({}, "a", [""], ([2], ([],), True, False)),
    ],
)
def test_ids_of_single_letters_by_hand(letters, options, prompt, answers, expected):
    folder = letters(**{name: value for name, value in options.items() if name != "plain"})
    assert encode(folder, prompt, *answers, plain=options.get("plain", True))[:4] == expected


def test_a_special_token_in_a_users_text_is_one_as_in_transformers(letters):
    folder = letters()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = encode(folder, "a<u>b", "c<u>")
    assert found.prompt == plain_ids(tokenizer, "a<u>b") == [2, 10, 3]
    assert plain_ids(tokenizer, "a<u>bc<u>") == [2, 10, 6, 10]  # merged behind the special token
    assert not found.exact and found.answers == ([4, 10, 1],)


def test_of_overlapping_special_tokens_the_longer_wins_as_in_transformers():
    _, tokenizer = saved("byte-level")
    found = check_against(tokenizer, Encoder(facts("byte-level")), ExampleText("a<|im_end|>", ("<|x|>b",)))
    # `<|im_end|><|x|>` is a token of its own, so the whole does not begin with the prompt's ids.
    assert not found.exact
    found = check_against(tokenizer, Encoder(facts("byte-level")), ExampleText("a<|im_end|><|x|>", ("<|x|>b",)))
    assert found.exact


def test_the_text_of_a_special_token_within_another_token_parts_nothing(tmp_path):
    bpe = Tokenizer(models.BPE({"</s>": 0, "a": 1, "d": 2, ">": 3, ">>": 4}, [(">", ">")]))
    # A token that is only matched as a word is none to part the text at; this one has the text of one that is.
    bpe.add_special_tokens([AddedToken("<u>", normalized=False)])
    bpe.add_special_tokens([AddedToken("d<u>>", normalized=False, single_word=True)])
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # a <u> > d<u>> | >: the last two do not merge. Of `<u>>` and `>` alone they would.
    assert plain_ids(tokenizer, "a<u>>d<u>>>") == [1, 5, 3, 6, 3]
    assert encode(tmp_path, "a<u>>d<u>>", ">") == ExampleTokens([1, 5, 3, 6], ([3, 0],), True, True, ([0, 2],))


@pytest.mark.parametrize("family", ["metaspace first", "unigram"])
def test_an_answer_on_its_own_is_not_taken_for_the_beginning_of_a_text(family):
    _, tokenizer = saved(family)
    found = check_against(tokenizer, Encoder(facts(family)), ExampleText("<|im_start|>the ca", ("t",)))
    # The whole has the token ▁cat. On its own the answer is t, and not ▁t as it would be at a beginning.
    assert not found.exact
    assert found.answers == ([tokenizer.convert_tokens_to_ids("t"), tokenizer.eos_token_id],)


@pytest.mark.parametrize("answer", ["\nthe", " the", "\n\nthe", "  ", "the", "1"])
@pytest.mark.parametrize("family", ["byte-level", "tiktoken", "byte-level split"])
def test_line_ends_that_merge_across_the_boundary_are_noticed(family, answer):
    _, tokenizer = saved(family)
    found = check_against(tokenizer, Encoder(facts(family)), ExampleText("<|im_start|>assistant\n", (answer,)))
    if answer == "\n\nthe":
        assert not found.exact  # "\n\n" and "\n\n\n" are tokens of all three


# -- the beginning and the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "wordpiece"])
def test_the_beginning_is_there_once_in_every_family(family):
    coder, (_, tokenizer) = Encoder(facts(family, bos=True)), saved(family, bos=True)
    for prompt in ("the cat", "<s>the cat"):
        found = with_lists(*coder.encode([ExampleText(prompt, (" sings",), plain=True)]))
        assert found.prompt == tokenizer("<s>the cat", add_special_tokens=False)["input_ids"] or prompt == "the cat"
        assert found.prompt.count(tokenizer.bos_token_id) == 1 and found.prompt[0] == tokenizer.bos_token_id
    found = with_lists(*coder.encode([ExampleText("the cat", (" sings",), plain=True)]))
    assert found.prompt == tokenizer("the cat")["input_ids"]


def test_an_unknown_character_ends_nothing(tmp_path):
    words = Tokenizer(models.WordPiece({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    assert encode(tmp_path, "a", "?") == ExampleTokens([2], ([0, 1],), False, True, ([0, 2],))


# -- what the tokenizer brings ---------------------------------------------------------------------------------------


def test_facts_are_those_of_the_tokenizer():
    found, (_, tokenizer) = facts("gemma", bos=True), saved("gemma", bos=True)
    assert found.special == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (found.bos, found.eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert found.chat_template is None and found.tool_template is None
    assert facts("gemma").bos is None and facts("gemma", eos=None).eos is None


def test_of_several_named_templates_the_default_and_that_for_tools_are_used(tmp_path):
    tokenizer = build("byte-level")
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools", "rag": "other"}
    tokenizer.save_pretrained(tmp_path)
    found = tokenizer_facts.load_facts(tmp_path)
    assert (found.chat_template, found.tool_template) == ("plain", "tools")
    tokenizer.chat_template = "one"
    tokenizer.save_pretrained(tmp_path / "one")
    found = tokenizer_facts.load_facts(tmp_path / "one")
    assert (found.chat_template, found.tool_template) == ("one", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_travel(family):
    text = ExampleText("<|im_start|>user\nwhy?", (" the cat", "\n"))
    there = pickle.loads(pickle.dumps(facts(family)))
    assert Encoder(there).encode([text]) == Encoder(facts(family)).encode([text])


def test_a_worker_needs_neither_transformers_nor_torch(tmp_path):
    path = tmp_path / "facts"
    path.write_bytes(pickle.dumps(facts("byte-level")))
    code = (
        "import pickle, sys; from prefcache.pipeline.preparing.encoder import Encoder, ExampleText; "
        f"facts = pickle.loads(open({str(path)!r}, 'rb').read()); "
        "print(Encoder(facts).encode([ExampleText('the', (' cat',))])[0].exact, "
        "[name for name in ('transformers', 'torch') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_a_tokenizers_own_cutting_and_padding_are_not_applied(tmp_path):
    tokenizer = FAMILIES["byte-level"]()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    given = dataclasses.replace(facts("byte-level"), backend=tokenizer.to_str())
    (found,) = Encoder(given).encode([ExampleText("the cat sings", (" and the dog",))])
    assert found == Encoder(facts("byte-level")).encode([ExampleText("the cat sings", (" and the dog",))])[0]


# -- tokenizers that Transformers runs in Python ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("slow")
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_a_python_tokenizer_gives_the_ids_of_the_whole(slow):
    found = tokenizer_facts.load_facts(slow)
    tokenizer = AutoTokenizer.from_pretrained(slow)
    assert found.backend is None
    coder = Encoder(pickle.loads(pickle.dumps(found)))
    for prompt in ("the cat ", "日本</s>x", "\n"):
        for answer in ("sings", " ", "é</s>"):
            check_against(tokenizer, coder, ExampleText(prompt, (answer, "x")))
    assert coder.encode([]) == []


def test_a_python_tokenizer_of_bytes_by_hand(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    # A byte's id is the byte + 3; 1 is the end.
    found = encode(tmp_path, "ab", "c", "c</s>")
    assert found == ExampleTokens([100, 101], ([102, 1], [102, 1]), True, True, ([0, 2], [0, 2]))
    assert Encoder(tokenizer_facts.load_facts(tmp_path)).decode(found.prompt) == "ab"


# -- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"has no tokenizer that loads .*tokenizer\.json next to the model"):
        tokenizer_facts.load_facts(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(UsageError, match="has no tokenizer that loads"):
        tokenizer_facts.load_facts(tmp_path)
