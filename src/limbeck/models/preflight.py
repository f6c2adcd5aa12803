"""Do two models fit each other? Found before any weight is trained."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from limbeck.errors import PreflightError
from limbeck.models.causal import check_head, end_of_turn, output_head

_FIX = "; take the teacher's tokenizer (student: {path: ..., tokenizer: teacher}) or choose two models of one family"

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn x ** 2  # square\n",
    "   leading and trailing   \n\n\n",
    "1234567890 3.14159 1,000,000 -7e-3",
    "Größe, naïve, œuvre, İstanbul",
    "Привет, мир! Γειά σου Κόσμε",
    "你好,世界。こんにちは 안녕하세요",
    "مرحبا بالعالم नमस्ते שלום",
    "🙂👩‍👩‍👧 ∑ ∫ → ≤",
    "DON'T I'll WE'VE it's",
    "",
)
_TURNS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi, how are you?"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "2+2?"},
    ],
]


def preflight(
    student: nn.Module,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher: nn.Module,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> int:
    """The number of vocabulary rows that both models share: the tokenizer's real ids, without padding rows.

    Compares vocabularies, special tokens, EOS, chat templates, the encodings of probe strings in several scripts, and
    each model's logits with its head on its hidden states. Raises PreflightError (ModelError for the last).
    """
    rows = _same_vocabulary(student_tokenizer, teacher_tokenizer)
    for name, model in (("student", student), ("teacher", teacher)):
        size = output_head(model).weight_VH.shape[0]
        if size < rows:
            raise PreflightError(
                f"expected a head of at least {rows} rows for the tokenizer's ids, found {size} in the {name}; "
                f"its tokenizer belongs to another model: name the folder that holds both"
            )
    _same_end(student_tokenizer, teacher_tokenizer)
    _same_template(student_tokenizer, teacher_tokenizer)
    _same_encodings(student_tokenizer, teacher_tokenizer)
    check_head(student)
    check_head(teacher)
    return rows


def _same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
        token = min(differing, key=lambda token: (theirs.get(token, len(theirs)), ours.get(token, len(ours)), token))
        raise PreflightError(
            f"expected one vocabulary, found {len(ours)} tokens in the student and {len(theirs)} in the teacher, "
            f"{len(differing)} of them different, first {token!r}: id {ours.get(token, 'none')} in the student, "
            f"{theirs.get(token, 'none')} in the teacher{_FIX}"
        )
    return max(ours.values()) + 1


def _same_end(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    for what, ours, theirs in (
        ("EOS", student.eos_token_id, teacher.eos_token_id),
        ("end of a chat turn", end_of_turn(student), end_of_turn(teacher)),
    ):
        if ours != theirs and (what == "EOS" or (student.chat_template and teacher.chat_template)):
            raise PreflightError(
                f"expected one {what}, found {_name(student, ours)} in the student and {_name(teacher, theirs)} in the "
                f"teacher: the student would never learn to stop{_FIX}"
            )
    if student.bos_token_id != teacher.bos_token_id:
        raise PreflightError(
            f"expected one BOS, found {_name(student, student.bos_token_id)} in the student and "
            f"{_name(teacher, teacher.bos_token_id)} in the teacher{_FIX}"
        )


def _same_template(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    if not student.chat_template and not teacher.chat_template:
        return
    for name, tokenizer in (("student", student), ("teacher", teacher)):
        if not tokenizer.chat_template:
            raise PreflightError(f"expected a chat template in both tokenizers, found none in the {name}'s{_FIX}")
    for turns in _TURNS:
        prompt = turns[-1]["role"] == "user"
        ours, theirs = (
            str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
            for tokenizer in (student, teacher)
        )
        if ours != theirs:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
            )
            raise PreflightError(
                f"expected one chat template, found two: a short chat goes on as {ours[place : place + 30]!r} in the "
                f"student's and {theirs[place : place + 30]!r} in the teacher's, from character {place}{_FIX}"
            )


def _same_encodings(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    special = " ".join(teacher.all_special_tokens)
    for text in (*PROBES, f"a{special}b", f"a{special} b\n"):
        ours, theirs = student(text)["input_ids"], teacher(text)["input_ids"]
        if ours != theirs:
            raise PreflightError(
                f"expected one way to cut text into tokens, found {text[:40]!r} as {ours[:8]} in the student and "
                f"{theirs[:8]} in the teacher (first ids){_FIX}"
            )


def _name(tokenizer: PreTrainedTokenizerBase, token: Any) -> str:
    return "none" if token is None else f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"
