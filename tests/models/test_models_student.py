"""Students from folders, from a teacher's layers, from a configuration, and LoRA on one copy of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from limbeck.errors import ModelError, RecipeError
from limbeck.models import (
    adapters_off,
    build_student,
    check_head,
    completion_hidden,
    load_model,
    load_tokenizer,
    one_copy,
    save_student,
    set_vocabulary,
    vocabulary_rows,
)
from limbeck.ops.chunked import head_logits

TOKENS = torch.arange(3, 15)[None]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260k"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_a_path_is_loaded_as_it_is(stories: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(stories))
    for spec in (str(stories), stories, {"path": str(stories)}):
        model, tokenizer = build_student(spec)
        assert torch.equal(logits(model), expected) and not model.training
        assert tokenizer.eos_token_id == 1


def test_from_teacher_takes_layers_tokenizer_and_dtype(stories: Path) -> None:
    teacher = load_model(stories, dtype=torch.bfloat16).requires_grad_(False)
    model, tokenizer = build_student({"from_teacher": {"layers": [0, 2, 4]}}, teacher)
    assert model.config.num_hidden_layers == 3 and tokenizer.get_vocab() == load_tokenizer(stories).get_vocab()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())  # although the teacher's are frozen
    assert torch.equal(model.get_parameter("model.layers.1.mlp.up_proj.weight").bfloat16(),
                       teacher.get_parameter("model.layers.2.mlp.up_proj.weight"))  # fmt: skip
    from_path, _ = build_student({"from_teacher": {"layers": [0, 2, 4]}}, stories)
    assert from_path.num_parameters() == model.num_parameters()


def test_from_config_draws_weights_under_the_seed(stories: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, tokenizer = build_student({"from_config": CONFIG}, stories, seed=3)
    same, _ = build_student({"from_config": CONFIG}, stories, seed=3)
    other, _ = build_student({"from_config": CONFIG}, stories, seed=4)
    assert torch.equal(logits(one), logits(same)) and not torch.equal(logits(one), logits(other))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.config.vocab_size == 512 and one.config.eos_token_id == tokenizer.eos_token_id == 1
    assert one.generation_config is not None and one.generation_config.eos_token_id == 1
    one.config.save_pretrained(tmp_path)
    from_folder, _ = build_student({"from_config": str(tmp_path)}, stories, seed=3)
    assert torch.equal(logits(from_folder), logits(one))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"from_config": {**CONFIG, "hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"from_config": {**CONFIG, "vocab_size": 8}}, "leave out vocab_size"),
        ({"from_config": {"hidden_size": 8}}, "expected model_type"),
        ({"from_config": {"model_type": "llamma"}}, "found llamma"),
        ({"from_techer": {"layers": [0]}}, "did you mean 'from_teacher'"),
        ({"from_teacher": {"layer": [0]}}, "layers: "),
        ({"path": "a", "from_config": CONFIG}, "one of path, from_teacher, from_config; found path, from_config"),
        ({"lora": {}}, "found none"),
        ({"path": "a", "lora": {"rank": 4}}, "found rank"),
        ({"path": "a", "tokenizer": "own"}, "expected teacher"),
    ],
)
def test_wrong_keys_are_errors(spec: dict[str, Any], message: str, stories: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        build_student(spec, stories)


def test_students_made_from_a_teacher_need_one() -> None:
    for spec in ({"from_teacher": {"layers": [0]}}, {"from_config": CONFIG}):
        with pytest.raises(RecipeError, match="set `teacher`"):
            build_student(spec)


def test_the_teachers_tokenizer_for_a_base_student(stories: Path, tmp_path: Path) -> None:
    """A base student learns the chat teacher's EOS: the tokenizer and every id that its folder serves with."""
    chat = load_tokenizer(stories)
    chat.eos_token, chat.chat_template = "</s>", "{{ messages[0]['content'] }}</s>"
    model, tokenizer = build_student({"path": str(stories), "tokenizer": "teacher"}, stories, chat)
    assert tokenizer is chat
    save_student(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.eos_token_id == again.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == chat.chat_template


def test_a_saved_student_stops_at_every_end(stories: Path, tmp_path: Path) -> None:
    """transformers' generate stops at the ids of generation_config alone, whatever the tokenizer's EOS is."""
    tokenizer = load_tokenizer(stories)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}</s>"
    save_student(load_model(stories), tokenizer, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [1, 2]


def test_the_teachers_tokenizer_must_mean_the_same_tokens(stories: Path, shared: Path) -> None:
    with pytest.raises(ModelError, match="the two vocabularies are different"):
        build_student({"path": str(shared / "models" / "babyllama-105"), "tokenizer": "teacher"}, stories)


# LoRA


def lora_student(stories: Path, **lora: Any) -> tuple[Any, Any, PreTrainedTokenizerBase]:
    teacher = load_model(stories)
    student, tokenizer = build_student({"path": str(stories), "lora": lora}, teacher, seed=1)
    return student, teacher, tokenizer


def train_a_little(student: nn.Module, steps: int = 5) -> list[float]:
    data = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "learnt": torch.ones_like(TOKENS).bool()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.01)
    student.train()
    losses = []
    for _ in range(steps):
        hidden_NH, tokens_N, head = completion_hidden(student, data)
        loss = nn.functional.cross_entropy(head_logits(hidden_NH, head), tokens_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    student.eval()
    return losses


def test_lora_on_the_teacher_is_one_copy_and_the_teacher_stays(stories: Path) -> None:
    expected = logits(load_model(stories))
    student, teacher, _ = lora_student(stories, r=4, alpha=8)
    base = {p.data_ptr() for name, p in student.named_parameters() if "lora_" not in name}
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert base == {p.data_ptr() for name, p in teacher.named_parameters() if "lora_" not in name}
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 5  # two matrices for each of the seven linears of five layers; the head has none
    assert torch.equal(logits(student), expected)  # fresh adapters change nothing

    losses = train_a_little(student)
    assert losses[-1] < losses[0] - 0.1
    assert (logits(student) - expected).abs().max() > 0.1
    with adapters_off(student) as base_model:
        assert torch.equal(logits(base_model), expected) and torch.equal(logits(student), expected)
    assert (logits(student) - expected).abs().max() > 0.1
    check_head(student)


def test_the_teacher_under_adapters_off_has_no_dropout_and_modes_return(stories: Path, tmp_path: Path) -> None:
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.save_pretrained(tmp_path)
    load_tokenizer(stories).save_pretrained(tmp_path)
    student, _ = build_student({"path": str(tmp_path), "lora": {"dropout": 0.5}}, tmp_path)
    student.train()
    with adapters_off(student):
        assert torch.equal(logits(student), logits(model)) and not student.training
    assert student.training and all(module.training for module in student.modules())
    assert (logits(student) - logits(model)).abs().max() > 0.01  # dropout is back
    with pytest.raises(RuntimeError), adapters_off(student):
        raise RuntimeError
    assert student.training and not student.active_peft_config.inference_mode  # pyright: ignore


def test_lora_settings_reach_peft(stories: Path) -> None:
    student, _, _ = lora_student(stories, r=3, alpha=12, dropout=0.25, target_modules=["q_proj"])
    config = student.active_peft_config
    assert (config.r, config.lora_alpha, config.lora_dropout, set(config.target_modules)) == (3, 12, 0.25, {"q_proj"})
    assert sum(p.requires_grad for p in student.parameters()) == 2 * 5


def test_lora_on_the_head_is_refused(stories: Path) -> None:
    student, _, _ = lora_student(stories, target_modules=["lm_head"])
    with pytest.raises(ModelError, match="target_modules"):
        check_head(student)


def test_adapters_off_needs_adapters() -> None:
    with pytest.raises(ModelError, match="set student.lora"), adapters_off(tiny("llama")):
        pass


def test_when_one_copy_serves_both(stories: Path, shared: Path) -> None:
    around = stories.parent / ".." / "models" / stories.name
    other = shared / "models" / "stories-xs-280k"
    teacher = load_model(stories)
    assert one_copy({"path": str(around), "lora": {}}, stories) and one_copy({"path": stories, "lora": {}}, teacher)
    assert one_copy({"path": "org/name", "lora": {}}, "org/name")
    for spec in (
        {"path": str(stories)},
        {"path": str(other), "lora": {}},
        {"from_config": CONFIG, "lora": {}},
        str(stories),
    ):
        assert not one_copy(spec, stories)
    assert not one_copy({"path": str(stories), "lora": {}}, None)
    student, _ = build_student({"path": str(other), "lora": {}}, teacher)  # another base: the teacher is not touched
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


def test_a_lora_student_is_saved_as_a_plain_model(stories: Path, tmp_path: Path) -> None:
    student, _, tokenizer = lora_student(stories)
    set_vocabulary(student, 500)
    train_a_little(student)
    expected = logits(student)
    save_student(student, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(student), expected)  # merged on a copy
    assert vocabulary_rows(again) == 500
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_frozen_parts_stay(stories: Path) -> None:
    spec: dict[str, Any] = {"from_teacher": {"layers": [0, 2]}, "freeze": ["lm_head", "layers.1.mlp"]}
    model, _ = build_student(spec, str(stories))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    # stories260k ties its two matrices: one parameter under two names.
    assert frozen == {"model.embed_tokens.weight"} | {
        f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    }


@pytest.mark.parametrize(
    ("freeze", "said"),
    [(["lm_heads"], "expected parts of parameter names .*found lm_heads"), ([""], "found every parameter")],
)
def test_freezing_nothing_or_everything_is_refused(stories: Path, freeze: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build_student({"from_teacher": {"layers": [0]}, "freeze": freeze}, str(stories))
