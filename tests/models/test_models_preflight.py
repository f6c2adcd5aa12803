"""Which pairs of models fit each other."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from model_families import tiny
from transformers import PreTrainedTokenizerBase

from limbeck.errors import ModelError, PreflightError
from limbeck.models import build_student, eos_tokens, load_model, load_tokenizer, preflight

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def qwen(shared: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(shared / "tokenizers" / "qwen2.5")


@pytest.fixture(scope="module")
def stories(shared: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(shared / "models" / "stories260k")


@pytest.fixture(scope="module")
def chat(stories: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return changed(stories, CHAT, "</s>")


def changed(tokenizer: PreTrainedTokenizerBase, template: str | None, eos: str) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template, other.eos_token = template, eos
    return other


def refused(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """The reason why a student with the tokenizer `one` does not fit a teacher with `other`."""
    with pytest.raises(PreflightError) as caught:
        preflight(tiny("llama", 512), one, tiny("llama", 512), other)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_padding_rows_of_one_family_are_not_a_difference(qwen: PreTrainedTokenizerBase) -> None:
    """Qwen2.5: 151 936 rows up to 3B and 152 064 from 7B on, 151 665 tokens in both."""
    student = tiny("qwen2", 151_936, hidden_size=8, intermediate_size=8)
    teacher = tiny("qwen2", 152_064, hidden_size=16, intermediate_size=8)
    assert preflight(student, qwen, teacher, qwen) == 151_665


def test_rows_are_the_tokenizers_ids_and_no_more_than_either_head_has(stories: PreTrainedTokenizerBase) -> None:
    for student_rows, teacher_rows in ((512, 512), (520, 530), (530, 512)):
        assert preflight(tiny("llama", student_rows), stories, tiny("gpt2", teacher_rows), stories) == 512
    with pytest.raises(PreflightError, match="at least 512 rows .* found 511 in the teacher"):
        preflight(tiny("llama", 512), stories, tiny("llama", 511), stories)
    with pytest.raises(PreflightError, match="found 500 in the student"):
        preflight(tiny("llama", 500), stories, tiny("llama", 512), stories)


def test_real_pairs(shared: Path) -> None:
    models = {
        name: load_model(shared / "models" / name) for name in ("stories260k", "stories-xs-280k", "babyllama-105")
    }
    tokenizers = {name: load_tokenizer(shared / "models" / name) for name in models}
    fits, teacher = "stories-xs-280k", "stories260k"
    assert preflight(models[fits], tokenizers[fits], models[teacher], tokenizers[teacher]) == 512
    other = "babyllama-105"
    with pytest.raises(PreflightError, match="105 tokens in the student and 512 in the teacher"):
        preflight(models[other], tokenizers[other], models[teacher], tokenizers[teacher])


def test_other_vocabularies(qwen: PreTrainedTokenizerBase, shared: Path) -> None:
    gpt2 = load_tokenizer(shared / "tokenizers" / "gpt2")
    reason = refused(qwen, gpt2)
    assert "151665 tokens in the student and 50257 in the teacher" in reason
    # The teacher's first token that is another one in the student: both begin with the same bytes and merges.
    ours, theirs = qwen.get_vocab(), gpt2.get_vocab()
    first = next(token for token in sorted(theirs, key=theirs.__getitem__) if ours.get(token) != theirs[token])
    assert f"first {first!r}: id {ours[first]} in the student, {theirs[first]} in the teacher" in reason


def edited(shared: Path, folder: Path, swap: tuple[str, str] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of stories260k with the ids of two tokens exchanged, or else with its merges turned round."""
    shutil.copytree(shared / "models" / "stories260k", folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    if swap is not None:
        vocabulary = values["model"]["vocab"]
        vocabulary[swap[0]], vocabulary[swap[1]] = vocabulary[swap[1]], vocabulary[swap[0]]
    else:
        values["model"]["merges"].reverse()
    file.write_text(json.dumps(values))
    return load_tokenizer(folder)


def test_the_same_strings_under_other_ids(stories: PreTrainedTokenizerBase, shared: Path, tmp_path: Path) -> None:
    """As many tokens, the same strings, two ids exchanged."""
    one, other = stories.convert_ids_to_tokens([400, 410])
    reason = refused(edited(shared, tmp_path / "swapped", (one, other)), stories)
    assert f"2 of them different, first {one!r}: id 410 in the student, 400 in the teacher" in reason


def test_one_vocabulary_but_another_way_to_cut(stories: PreTrainedTokenizerBase, shared: Path, tmp_path: Path) -> None:
    reason = refused(edited(shared, tmp_path / "turned"), stories)
    assert "one way to cut text into tokens" in reason


def test_a_base_student_under_a_chat_teacher(stories: PreTrainedTokenizerBase, chat: PreTrainedTokenizerBase) -> None:
    reason = refused(stories, chat)
    assert "expected one EOS, found '<s>' (1) in the student and '</s>' (2) in the teacher" in reason
    assert "tokenizer: teacher" in reason


def test_the_named_fix_makes_the_pair_fit(chat: PreTrainedTokenizerBase, shared: Path) -> None:
    """`student: {path: ..., tokenizer: teacher}` under a teacher with another EOS and a template."""
    folder = shared / "models" / "stories-xs-280k"
    teacher = load_model(shared / "models" / "stories260k")
    student, own = build_student({"path": str(folder)}, teacher, chat)
    with pytest.raises(PreflightError, match="expected one EOS"):
        preflight(student, own, teacher, chat)
    student, given = build_student({"path": str(folder), "tokenizer": "teacher"}, teacher, chat)
    assert preflight(student, given, teacher, chat) == 512
    assert eos_tokens(student, given) == (2,)


def test_templates(chat: PreTrainedTokenizerBase) -> None:
    none = changed(chat, None, "</s>")
    assert "found none in the student's" in refused(none, chat)
    assert "found none in the teacher's" in refused(chat, none)
    other_end = changed(chat, CHAT.replace("</s>", "<s>"), "</s>")
    reason = refused(other_end, chat)
    assert "end of a chat turn, found '<s>' (1) in the student and '</s>' (2) in the teacher" in reason
    # Ends alike and differs in what stands before the answer alone.
    reason = refused(changed(chat, CHAT.replace("<s>assistant: ", "<s>assistant - "), "</s>"), chat)
    assert "goes on as ' - ' in the student's and ': ' in the teacher's" in reason


def test_bos(stories: PreTrainedTokenizerBase) -> None:
    other = copy.deepcopy(stories)
    other.bos_token = "</s>"
    assert "expected one BOS, found '</s>' (2) in the student and '<s>' (1) in the teacher" in refused(other, stories)


def test_heads_are_tried_for_student_and_teacher(stories: PreTrainedTokenizerBase) -> None:
    for broken in (0, 1):
        pair = [tiny("granite", 512), tiny("granite", 512)]
        pair[broken].lm_head.register_forward_hook(lambda _module, _inputs, output: output * 3)
        with pytest.raises(ModelError, match="GraniteForCausalLM: expected the output head"):
            preflight(pair[0], stories, pair[1], stories)
