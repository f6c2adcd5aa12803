"""Tokens and loss masks, by hand with a tokenizer of characters and against transformers with real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.data import describe, read, render
from limbeck.errors import DataError
from limbeck.types import Example

A, B, C, D, SPACE, LINE = 6, 7, 8, 9, 32, 33
EOS, USER, ASSISTANT, SYSTEM, END = 0, 2, 3, 4, 5
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "dd"},
]


def one(tokenizer: Any, row: dict[str, Any], **options: Any) -> Example:
    return render([row], tokenizer, **options)[0][0]


def error(tokenizer: Any, *rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        render(list(rows), tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def learnt(example: Example) -> list[int]:
    return [token for token, flag in zip(example.tokens, example.mask, strict=True) if flag]


# --- plain prompts, completions and texts -----------------------------------------------------------------------------


def test_prompt_and_completion_by_hand(tiny: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "ab", "completion": "c d", "id": 7}
    assert one(tiny, row) == Example([A, B, C, SPACE, D, EOS], [False, False, True, True, True, True], 2, row, 0)


def test_prompt_alone_and_text_by_hand(tiny: PreTrainedTokenizerFast) -> None:
    assert one(tiny, {"prompt": "ab"}) == Example([A, B], [False, False], 2, {"prompt": "ab"})
    # No BOS: the first token has nothing before it, and is what a policy starts from.
    assert one(tiny, {"text": "abc"}) == Example([A, B, C, EOS], [False, True, True, True], 1, {"text": "abc"})


def test_bos_once_where_the_tokenizer_adds_it(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(bos_token="<bos>")
    assert one(tokenizer, {"prompt": "a", "completion": "b"}).tokens == [A, B, EOS]
    assert one(tokenizer, {"prompt": "", "completion": "b"}) == Example(
        [1, B, EOS], [False, True, True], 1, {"prompt": "", "completion": "b"}
    )
    assert one(tokenizer, {"text": "b"}).tokens == [1, B, EOS]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    example = one(tokenizer, {"prompt": "a", "completion": "b"})
    assert (example.tokens, example.mask, example.prompt_tokens) == ([1, A, B, EOS], [False, False, True, True], 2)
    assert one(tokenizer, {"prompt": "a"}).tokens == [1, A]
    assert one(tokenizer, {"text": "b"}).tokens == [1, B, EOS]
    # The template writes its own BOS or none.
    assert one(tokenizer, {"prompt": "a", "completion": "b"}, template="chat").tokens[0] == USER


def test_eos_ends_every_completion_once(tiny: PreTrainedTokenizerFast) -> None:
    for row in ({"prompt": "a", "completion": "b<eos>"}, {"prompt": "a", "completion": "b"}, {"text": "ab<eos>"}):
        assert one(tiny, row).tokens == [A, B, EOS]
        assert one(tiny, row).mask[-2:] == [True, True]
    assert "row 2: expected EOS at the end of a completion alone" in error(tiny, {"text": "a"}, {"text": "a<eos>b"})
    assert one(tiny, {"prompt": "a<eos>", "completion": "b"}).tokens == [A, EOS, B, EOS]
    assert one(tiny, {"prompt": "a", "completion": "b"}, eos_token_id=END).tokens == [A, B, END]


def test_prompt_tokens_of_text(tiny: PreTrainedTokenizerFast) -> None:
    found, summary = render([{"text": "abcd"}, {"text": "ab"}, {"text": "a"}], tiny, prompt_tokens=3)
    assert [example.prompt_tokens for example in found] == [3, 2, 1]
    assert [learnt(example) for example in found] == [[B, C, D, EOS], [B, EOS], [EOS]]
    assert summary.short_prompts == 2 and "2 texts shorter than the prompt length" in str(summary)
    assert "expected rows of text" in error(tiny, {"prompt": "a"}, prompt_tokens=3)
    assert "less than the limit of 3" in error(tiny, {"text": "abcd"}, prompt_tokens=3, max_length=3)
    assert "at least 1" in error(tiny, {"text": "abcd"}, prompt_tokens=0)


def test_stories_are_bos_tokens_eos(stories: PreTrainedTokenizerBase, shared: Path) -> None:
    rows = read(shared / "data" / "tinystories_test.jsonl")[:20]
    for example, row in zip(render(rows, stories)[0], rows, strict=True):
        assert example.tokens == [1, *stories(row["text"], add_special_tokens=False)["input_ids"], 1]
        assert example.mask == [False] + [True] * (len(example.tokens) - 1)
        assert example.prompt == [1]


@pytest.mark.parametrize(
    ("completion", "tokens"), [(" b", [38, B]), ("b", [B]), ("\nb", [LINE, B]), ("  b", [38, 38, B])]
)
def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_inside(
    make_tokenizer: Callable[..., Any], completion: str, tokens: list[int]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    assert one(tokenizer, {"prompt": "a", "completion": completion}).tokens == [38, A, *tokens, EOS]
    assert one(tokenizer, {"text": "a b"}).tokens == [38, A, 38, B, EOS]


@pytest.mark.parametrize("texts", [("Once upon a time", " there was"), ("Tom said", "no.\nHe left"), ("A ", "cat")])
def test_boundary_adds_no_space_and_keeps_the_prompt_as_generation_sees_it(
    stories: PreTrainedTokenizerBase, gpt2: PreTrainedTokenizerBase, texts: tuple[str, str]
) -> None:
    prompt, completion = texts
    for tokenizer in (stories, gpt2):
        example = one(tokenizer, {"prompt": prompt, "completion": completion})
        assert example.prompt == tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(example.tokens, skip_special_tokens=True) == prompt + completion
        assert example.mask == [i >= example.prompt_tokens for i in range(len(example.tokens))]
        assert example.tokens[-1] == tokenizer.eos_token_id


def test_boundary_is_not_merged(gpt2: PreTrainedTokenizerBase) -> None:
    example = one(gpt2, {"prompt": "hel", "completion": "lo"})
    whole, alone = gpt2("hello")["input_ids"], [*gpt2("hel")["input_ids"], *gpt2("lo")["input_ids"]]
    assert whole != alone
    assert example.tokens == [*alone, 50256]


# --- chats ------------------------------------------------------------------------------------------------------------


def test_turns_by_hand(tiny: PreTrainedTokenizerFast) -> None:
    tokens = [USER, A, END, LINE, ASSISTANT, B, END, LINE, USER, C, END, LINE, ASSISTANT, D, D, END]
    every = [i in (5, 6, 13, 14, 15) for i in range(16)]
    last = [i in (13, 14, 15) for i in range(16)]
    row = {"messages": TALK}
    assert one(tiny, row) == Example(tokens, every, 13, row)
    assert one(tiny, row, train_on="last") == Example(tokens, last, 13, row)


def test_talk_that_ends_with_the_user_is_a_prompt(tiny: PreTrainedTokenizerFast) -> None:
    row = {"messages": TALK[:3]}
    tokens = [USER, A, END, LINE, ASSISTANT, B, END, LINE, USER, C, END, LINE, ASSISTANT]
    assert one(tiny, row) == Example(tokens, [i in (5, 6) for i in range(13)], 13, row)
    found, summary = render([row], tiny, train_on="last")
    assert found == [Example(tokens, [False] * 13, 13, row)] and summary.unlearnt == 1


def test_pairs_through_a_template(tiny: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a", "completion": "b"}
    example = one(tiny, row, template="chat")
    assert example == Example(one(tiny, {"messages": TALK[:2]}).tokens, [False] * 5 + [True] * 2, 5, row)
    assert one(tiny, {"prompt": "a"}, template="chat").tokens == example.prompt
    own = "{% for m in messages %}{{ m.content }}{% if loop.first %}:{% endif %}{% endfor %}"
    # A template that closes no turn: EOS does, and the prompt ends where the answer begins.
    assert one(tiny, row, template=own) == Example([A, 36, B, EOS], [False, False, True, True], 2, row)


def test_two_kinds_in_one_list(tiny: PreTrainedTokenizerFast) -> None:
    found, summary = render([{"messages": TALK[:2]}, {"prompt": "a", "completion": "b"}], tiny, template="chat")
    assert found[0].tokens == found[1].tokens
    assert summary.kinds == {"messages": 1, "prompt + completion": 1}


def test_qwen_as_transformers_renders_it(qwen: PreTrainedTokenizerBase) -> None:
    example = one(qwen, {"messages": TALK})
    whole = qwen.apply_chat_template(TALK, return_dict=False)
    prompt = qwen.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    newline = qwen("\n")["input_ids"]
    assert example.tokens + newline == whole
    assert example.prompt == prompt
    end = qwen.convert_tokens_to_ids("<|im_end|>")
    assert learnt(example) == [*qwen("b")["input_ids"], end, *qwen("dd")["input_ids"], end]
    assert example.tokens[-1] == qwen.eos_token_id == end and example.tokens.count(151645) == 5
    assert learnt(one(qwen, {"messages": TALK}, train_on="last")) == [*qwen("dd")["input_ids"], end]
    assert one(qwen, {"text": "hi there"}).tokens == [*qwen("hi there")["input_ids"], end]


GENERATION = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}MARK{% endgeneration %}REST{% else %}{{ m.content }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(("mark", "rest"), [("<end>", "\n"), ("", "<end>\n"), ("<end>\n", "")])
def test_generation_marks_of_the_template(tiny: PreTrainedTokenizerFast, mark: str, rest: str) -> None:
    # As expressions: Jinja drops the line break after a block.
    template = GENERATION.replace("MARK", f"{{{{ {mark!r} }}}}").replace("REST", f"{{{{ {rest!r} }}}}")
    for train_on in ("assistant", "last"):
        for messages in (TALK, TALK[:3]):
            row = {"messages": messages}
            assert one(tiny, row, template=template, train_on=train_on) == one(tiny, row, train_on=train_on)


def test_templates_that_change_earlier_turns(tiny: PreTrainedTokenizerFast) -> None:
    """As those that drop earlier thoughts: an answer stands in the text only while it is the last message."""
    body = "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}<end>"
    forgets = (
        "{% for m in messages %}<{{ m.role }}>"
        + body
        + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {"messages": TALK}
    assert "row 1: expected the conversation up to message 2 to begin the whole" in error(tiny, row, template=forgets)
    example = one(tiny, row, template=forgets, train_on="last")
    assert example.tokens == [USER, A, END, ASSISTANT, END, USER, C, END, ASSISTANT, D, D, END]
    assert learnt(example) == [D, D, END] and example.prompt_tokens == 9
    # With marks every answer that is there is learnt: of the first one its end alone is.
    marks = "{% if m.role == 'user' %}" + body + "{% else %}{% generation %}" + body + "{% endgeneration %}{% endif %}"
    marked = one(tiny, row, template=forgets.replace(body, marks))
    assert (marked.tokens, marked.prompt_tokens) == (example.tokens, 9)
    assert learnt(marked) == [END, D, D, END]
    unmarked = (
        "{% for m in messages %}{{ m.content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert "{% generation %} marks nothing" in error(tiny, row, template=unmarked)


def test_end_of_turn_that_is_not_eos_ends_a_completion(make_tokenizer: Callable[..., Any]) -> None:
    """As in Llama 3: the turn ends in another token than EOS. It is learnt, and EOS is not put behind it."""
    example = one(make_tokenizer(), {"messages": TALK})
    assert EOS not in example.tokens and example.tokens[-1] == END and example.mask[-1]


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_cut_completions_learn_no_end(tiny: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdd"},
        {"prompt": "ab", "completion": "c"},
    ]
    found, summary = render(rows, tiny, max_length=4, context=9)
    assert [example.tokens for example in found] == [[A, B, C, D], [A, B, C, D], [A, B, C, EOS]]
    assert all(example.mask == [False, False, True, True] for example in found)
    assert (summary.shortened, summary.limit, summary.longest) == (2, 4, 4)
    assert (summary.rows, summary.tokens, summary.learnt) == (3, 12, 6)
    assert "2 completions cut at 4 tokens" in str(summary)
    assert render(rows, tiny, max_length=9, context=5)[1].shortened == 1
    assert render(rows, tiny, context=6)[1].shortened == 0


def test_split_texts_go_on_in_further_examples(tiny: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "abcdabc"}, {"text": "ab"}]
    (whole, short), _ = render(rows, tiny)
    found, summary = render(rows, tiny, max_length=4, split=True)
    first, limit = whole.tokens[0], 4
    assert all(len(example.tokens) <= limit and example.tokens[0] == first for example in found[:-1])
    joined = found[0].tokens + [token for example in found[1:-1] for token in example.tokens[1:]]
    assert joined == whole.tokens and found[-1].tokens == short.tokens
    # What is learnt of the whole is learnt once: no token is lost or counted twice.
    assert sum(sum(example.mask[1:]) for example in found) == sum(whole.mask[1:]) + sum(short.mask[1:])
    assert [example.index for example in found] == list(range(len(found))) and summary.shortened == 0
    assert found[1].row == rows[0] and found[1].prompt_tokens == 1
    # The first text is long enough for a prompt of 3 tokens, though its last part is not; the second is too short.
    prompted, summary = render(rows, tiny, max_length=4, split=True, prompt_tokens=3)
    assert [example.prompt_tokens for example in prompted] == [3, 3, 1, 2] and summary.short_prompts == 1
    with pytest.raises(DataError, match="data.split: expected rows of text"):
        render([{"prompt": "a", "completion": "b"}], tiny, max_length=4, split=True)


def test_prompts_that_leave_no_room(tiny: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a"}, {"prompt": "abcd"}, {"prompt": "abcdd"}]
    message = error(tiny, *rows, max_length=4)
    assert message.startswith(
        "row 2 (and 1 rows more): expected a prompt shorter than data.max_length of 4 tokens, found 4"
    )
    assert "the model's context of 5 tokens, found 5" in error(tiny, *rows, context=5, max_length=7)
    assert "expected a prompt shorter" in error(tiny, {"messages": TALK}, max_length=10)
    assert one(tiny, {"messages": TALK}, max_length=14).mask[-1]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_of_tokenizer_and_settings(tiny: PreTrainedTokenizerFast, make_tokenizer: Callable[..., Any]) -> None:
    pair = {"prompt": "a", "completion": "b"}
    bare = make_tokenizer(chat_template=None, eos_token=None)
    assert "expected a tokenizer with an EOS token" in error(bare, pair)
    assert one(bare, pair, eos_token_id=EOS).tokens == [A, B, EOS]
    for row, template in ((pair, "chat"), ({"messages": TALK}, None)):
        assert "expected a tokenizer with a chat template" in error(bare, row, template=template, eos_token_id=EOS)
    assert "expected chat or a Jinja template, found 'chatml'" in error(tiny, pair, template="chatml")
    assert "found text: leave the template out" in error(tiny, {"text": "a"}, template="chat")
    assert "expected assistant or last, found user" in error(tiny, pair, train_on="user")
    assert "expected at least one row" in error(tiny)


def test_errors_of_rows(tiny: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "a", "completion": "b"}
    assert "row 2: expected text as completion, found an empty one" in error(
        tiny, pair, {"prompt": "a", "completion": ""}
    )
    assert "row 2: expected a prompt, found an empty one" in error(tiny, pair, {"prompt": "", "completion": "b"})
    assert "found question, answer: read it with columns" in error(tiny, {"question": "q", "answer": "a"})
    assert "row 1: expected messages that fit the chat template" in error(tiny, {"messages": TALK[1:]})
    refuses = "{{ raise_exception('no system role') }}"
    assert "found: no system role" in error(tiny, {"messages": TALK}, template=refuses)


# --- describe ---------------------------------------------------------------------------------------------------------


def test_describe_marks_what_is_learnt(tiny: PreTrainedTokenizerFast, stories: PreTrainedTokenizerBase) -> None:
    assert describe(one(tiny, {"messages": TALK}), tiny) == (
        "row 1: 16 tokens, prompt 13, learnt 5 (in ⟦ ⟧)\n"
        "<user>a<end>\n<assistant>⟦b<end>⟧\n<user>c<end>\n<assistant>⟦dd<end>⟧"
    )
    example = one(stories, {"prompt": "Once upon a time", "completion": " there was"})
    assert describe(example, stories).splitlines()[1] == "<s> Once upon a time⟦ there was<s>⟧"
