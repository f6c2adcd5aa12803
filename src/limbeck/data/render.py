"""From rows to tokens and loss masks: plain text and chat templates.

A row becomes pieces of text, each learnt or not, and each piece is tokenised by itself: so the tokens on both sides of
a boundary are those that the model sees when it writes the completion, where the prompt is tokenised alone too.
(Tokenising the whole text may merge the end of the prompt with the start of the completion.) Tokenizers that put a
space before every text, as SentencePiece ones do, put none at a boundary: the decoded pieces join to the row's text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from limbeck.data.read import kind_of
from limbeck.errors import DataError
from limbeck.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of the rows of a data set. Lengths and counts are in tokens, except `rows` and what counts rows."""

    kinds: dict[str, int]
    """rows of each kind"""
    rows: int
    tokens: int
    learnt: int
    longest: int
    limit: int | None
    shortened: int
    """rows whose completion was cut at `limit`; their end is not learnt"""
    unlearnt: int
    """rows without anything to learn: only methods that write the completion can use them"""
    short_prompts: int
    """texts too short for a prompt of `prompt_tokens` tokens; what is split counts by its first part"""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        line = f"{self.rows} rows ({kinds}), {self.tokens} tokens, {self.learnt} learnt, longest {self.longest}"
        if self.shortened:
            line += f"; {self.shortened} completions cut at {self.limit} tokens, their end not learnt"
        if self.unlearnt:
            line += f"; {self.unlearnt} rows without a completion"
        if self.short_prompts:
            line += f"; {self.short_prompts} texts shorter than the prompt length asked for"
        return line + "; none left out"


class Pieces(NamedTuple):
    """A row as text. `texts[completion]` is the last completion; len(texts) where the row has none to learn."""

    texts: list[str]
    learnt: list[bool]
    completion: int
    kind: Literal["text", "plain", "chat"]


def render(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    train_on: TrainOn = "assistant",
    context: int | None = None,
    prompt_tokens: int | None = None,
    max_length: int | None = None,
    split: bool = False,
    eos_token_id: int | None = None,
) -> tuple[list[Example], Summary]:
    """Tokens and loss masks of normalised rows (`read`), in their order, and what became of them.

    Prompt + completion: BOS, prompt, completion, EOS; learnt are the completion and EOS. BOS stands where the tokenizer
    puts one by itself, and before a text without a prompt where it has one at all.
    Text: BOS, text, EOS; learnt is all but the first token; an on-policy method is given the first `prompt_tokens`
    tokens (BOS included; the first alone unless given), at most all but one.
    Messages, and prompt + completion with a `template`: as the template renders them, up to the end of the last
    completion. `train_on` says what is learnt: every turn of the assistant, or the last message if it is one. The
    end-of-turn token is learnt, white space after it is not. A template with {% generation %} says itself what the
    assistant wrote; with any other the conversation up to a learnt turn must be the beginning of the whole.
    A row without a completion (messages that end with the user): its prompt, ready for an answer.

    Every last completion ends in the template's end-of-turn token or in EOS, once. A completion beyond `max_length` or
    `context` (the model's) is cut there and counted, and no end is learnt; with `split`, what a text has left over goes
    on in further examples, each behind the text's first token.

    template: None (plain text; messages take the tokenizer's own), "chat" (the tokenizer's own) or a Jinja template.
    eos_token_id: the tokenizer's unless given.
    Raises DataError: no EOS; no template or one that fails; a row that leaves no room for a completion, has no prompt,
    or holds the EOS inside a completion.
    """
    eos = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "expected a tokenizer with an EOS token, found none: set tokenizer.eos_token, or give eos_token_id"
        )
    if train_on not in ("assistant", "last"):
        raise DataError(f"data.train_on: expected assistant or last, found {train_on}")
    kinds = [kind_of(row) for row in rows]
    if not kinds:
        raise DataError("expected at least one row of data, found none")
    template = _template(tokenizer, template, set(kinds))
    pieces = [_pieces(row, number, tokenizer, template, train_on) for number, row in enumerate(rows, 1)]
    limit = min((length for length in (context, max_length) if length is not None), default=None)
    if prompt_tokens is not None and "text" not in kinds:
        raise DataError(f"data.prompt_tokens: expected rows of text to cut, found {kinds[0]}: leave it out")
    wanted = 1 if prompt_tokens is None else prompt_tokens
    if not 1 <= wanted < (float("inf") if limit is None else limit):
        raise DataError(f"data.prompt_tokens: expected at least 1 and less than the limit of {limit}, found {wanted}")
    if split and set(kinds) != {"text"}:
        raise DataError("data.split: expected rows of text to split, found prompts or messages: leave it out")
    found: list[Example] = []
    shortened = short_prompts = 0
    for row, kind, (tokens, mask, start) in zip(rows, kinds, _assembled(tokenizer, pieces, eos), strict=True):
        shortened += limit is not None and len(tokens) > limit and not split
        short_prompts += kind == "text" and len(tokens) <= wanted
        for part, learnt in _parts(tokens, mask, limit, split):
            if kind == "text":
                start = min(wanted, len(part) - 1)
            found.append(Example(part, learnt, start, row, len(found)))
    if limit is not None:
        _check_room(found, limit, "data.max_length" if limit == max_length else "the model's context")
    return found, _summary(found, kinds, limit, shortened, short_prompts)


def _parts(
    tokens: list[int], mask: list[bool], limit: int | None, split: bool
) -> Iterator[tuple[list[int], list[bool]]]:
    """The first `limit` tokens with their mask; with `split`, the rest in parts of at most `limit`, each behind the
    first token."""
    yield tokens[:limit], mask[:limit]
    if split and limit is not None:
        for place in range(limit, len(tokens), limit - 1):
            end = place + limit - 1
            yield [tokens[0], *tokens[place:end]], [mask[0], *mask[place:end]]


def _summary(found: list[Example], kinds: list[str], limit: int | None, shortened: int, short_prompts: int) -> Summary:
    lengths = [len(example.tokens) for example in found]
    learnt = [sum(example.mask[1:]) for example in found]
    return Summary(
        kinds=dict(Counter(kinds)),
        rows=len(found),
        tokens=sum(lengths),
        learnt=sum(learnt),
        longest=max(lengths),
        limit=limit,
        shortened=shortened,
        unlearnt=learnt.count(0),
        short_prompts=short_prompts,
    )


def _check_room(found: list[Example], limit: int, name: str) -> None:
    too_long = [example for example in found if example.prompt_tokens >= limit]
    if too_long:
        first, others = too_long[0], f" (and {len(too_long) - 1} rows more)" if len(too_long) > 1 else ""
        raise DataError(
            f"row {first.index + 1}{others}: expected a prompt shorter than {name} of {limit} tokens, found "
            f"{first.prompt_tokens}: raise data.max_length as far as the context allows, or take long prompts out"
        )


def describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as plain text, what is learnt in ⟦ ⟧, under a line of counts."""
    ends = [i for i in range(1, len(example.tokens)) if example.mask[i] != example.mask[i - 1]] + [len(example.tokens)]
    text, start = "", 0
    before = ""
    for end in ends:
        # A token alone may decode without the space that stands before it: take what it adds to the text so far.
        whole = str(tokenizer.decode(example.tokens[:end], clean_up_tokenization_spaces=False))
        text += f"⟦{whole[len(before) :]}⟧" if example.mask[start] else whole[len(before) :]
        before, start = whole, end
    counts = f"{len(example.tokens)} tokens, prompt {example.prompt_tokens}, learnt {sum(example.mask[1:])} (in ⟦ ⟧)"
    return f"row {example.index + 1}: {counts}\n{text}"


def _template(tokenizer: PreTrainedTokenizerBase, template: str | None, kinds: set[str]) -> str | None:
    """The Jinja template to use, None where there is nothing to render with one."""
    if template is None and "messages" not in kinds:
        return None
    if template is not None and "text" in kinds:
        raise DataError("data.template: expected prompts or messages to render, found text: leave the template out")
    if template not in (None, "chat"):
        if "{{" not in template and "{%" not in template:
            raise DataError(f"data.template: expected chat or a Jinja template, found {template!r}")
        return template
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            "expected a tokenizer with a chat template, found none: give data.template, or prompt + completion rows"
        ) from None


def _pieces(
    row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, template: str | None, train_on: TrainOn
) -> Pieces:
    if "messages" not in row and template is None:
        if "prompt" not in row:
            return Pieces([row["text"]], [True], 0, "text")
        prompt = [row["prompt"]] if row["prompt"] else []
        if "completion" not in row:
            return Pieces(prompt, [False] * len(prompt), len(prompt), "plain")
        if not row["completion"]:
            raise DataError(f"row {number}: expected text as completion, found an empty one")
        return Pieces([*prompt, row["completion"]], [False] * len(prompt) + [True], len(prompt), "plain")
    assert template is not None
    if "messages" in row:
        messages = [dict(message) for message in row["messages"]]
    else:
        messages = [{"role": "user", "content": row["prompt"]}]
        if "completion" in row:
            messages.append({"role": "assistant", "content": row["completion"]})
    try:
        whole, spans = _turns(messages, tokenizer, template, train_on)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"row {number}: expected messages that fit the chat template, found: {error}") from None
    except _NoPrefix as error:
        raise DataError(
            f"row {number}: expected the conversation up to message {error.args[0]} to begin the whole, found that the "
            "chat template changes earlier turns: use train_on: last, or a template with {% generation %}"
        ) from None
    return _cut(whole, spans, answered=messages[-1]["role"] == "assistant")


class _NoPrefix(Exception):
    """The number of the message before which the rendering is not a prefix of the whole."""


def _turns(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, train_on: TrainOn
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans that are learnt."""
    answered = messages[-1]["role"] == "assistant"

    def text(count: int, *, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )

    whole = text(len(messages), prompt=not answered)
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        spans = _generated(messages, tokenizer, template, prompt=not answered)
    else:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last":
            turns = turns[-1:] if answered else []
        spans = []
        for i in turns:
            before, after = text(i, prompt=True), text(i + 1, prompt=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise _NoPrefix(i + 1)
            spans.append((len(before), len(after)))
    if train_on == "last":
        spans = spans[-1:] if answered else []
    if answered and not spans:
        raise ValueError("its {% generation %} marks nothing of the assistant's last message")
    return whole, [(start, start + len(whole[start:end].rstrip())) for start, end in spans]


def _generated(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str, *, prompt: bool
) -> list[tuple[int, int]]:
    """The spans that {% generation %} marks, each with the end-of-turn token that may stand behind its mark."""
    options: dict[str, Any] = {**tokenizer.special_tokens_map, "add_generation_prompt": prompt}
    rendered: Any = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **options
    )
    (whole,), (marked,) = rendered
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spans = []
    for start, end in marked:
        closing = [token for token in special if whole.startswith(token, end)]
        closed = any(whole[start:end].rstrip().endswith(token) for token in special)
        spans.append((start, end if closed or not closing else end + len(max(closing, key=len))))
    return spans


def _cut(whole: str, spans: list[tuple[int, int]], *, answered: bool) -> Pieces:
    """Cut the conversation at the spans. What the template writes after the last completion is left out."""
    texts: list[str] = []
    learnt: list[bool] = []
    place = 0
    for start, end in spans:
        texts += [whole[place:start], whole[start:end]]
        learnt += [False, True]
        place = end
    if not answered:
        texts.append(whole[place:])
        learnt.append(False)
    return Pieces(texts, learnt, len(texts) - 1 if answered else len(texts), "chat")


def _encode(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Pieces]) -> list[list[list[int]]]:
    """The tokens of every piece of every row, all in one call of the tokenizer."""
    anchor = "\n"

    def ids(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)["input_ids"]

    spaced = any(token.startswith("▁") for token in tokenizer.convert_ids_to_tokens(ids(["a"])[0]))
    texts: list[str] = []
    anchored: list[bool] = []
    for piece in pieces:
        for number, text in enumerate(piece.texts):
            # The space that such a tokenizer adds stands for the one the text begins with, or comes before an anchor.
            inner = spaced and number > 0
            texts.append(text[1:] if inner and text.startswith(" ") else anchor + text if inner else text)
            anchored.append(inner and not text.startswith(" "))
    encoded = ids(texts)
    prefix = ids([anchor])[0] if any(anchored) else []
    for i, has_anchor in enumerate(anchored):
        if has_anchor:
            if encoded[i][: len(prefix)] != prefix:
                raise DataError(
                    f"expected a tokenizer that keeps line breaks apart, found one that merges {texts[i]!r:.40}"
                )
            encoded[i] = encoded[i][len(prefix) :]
    flat = iter(encoded)
    return [[next(flat) for _ in piece.texts] for piece in pieces]


def _assembled(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Pieces], eos: int
) -> Iterator[tuple[list[int], list[bool], int]]:
    """(tokens, mask, where the last completion starts) of every row."""
    bos = tokenizer.bos_token_id
    adds_bos = isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for number, (piece, ids) in enumerate(zip(pieces, _encode(tokenizer, pieces), strict=True), 1):
        chat = piece.kind == "chat"  # the template writes BOS itself
        tokens = [bos] if isinstance(bos, int) and not chat and (adds_bos or piece.completion == 0) else []
        mask = [False] * len(tokens)
        start = None
        for place, (part, learnt) in enumerate(zip(ids, piece.learnt, strict=True)):
            if place == piece.completion:
                start = len(tokens)
            if learnt and eos in part[:-1]:
                raise DataError(
                    f"row {number}: expected EOS at the end of a completion alone, found it inside: "
                    f"take {tokenizer.convert_ids_to_tokens(eos)} out of the text"
                )
            tokens += part
            mask += [learnt] * len(part)
        if start is None:
            start = len(tokens)
        elif len(tokens) == start or tokens[-1] not in ({eos} | special if chat else {eos}):
            tokens.append(eos)
            mask.append(True)
        if start == 0 and piece.kind != "text":
            raise DataError(
                f"row {number}: expected a prompt, found an empty one, and the tokenizer has no BOS to start from"
            )
        mask[0] = False  # nothing stands before the first token
        yield tokens, mask, start
