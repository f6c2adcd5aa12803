"""Hidden states, heads and the shift, against the logits that transformers itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import FAMILIES, tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from limbeck.errors import ModelError
from limbeck.models import (
    check_head,
    completion_hidden,
    end_of_turn,
    eos_tokens,
    hidden_and_head,
    output_head,
    set_vocabulary,
    unwrap,
    vocabulary_rows,
)
from limbeck.ops.chunked import head_logits

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def batch(rows: int = 3, length: int = 9, vocab: int = 96) -> dict[str, torch.Tensor]:
    input_ids_BT = torch.randint(3, vocab, (rows, length))
    attention_mask_BT = torch.ones_like(input_ids_BT)
    attention_mask_BT[1, 6:] = 0
    learnt_BT = torch.rand(rows, length) < 0.5
    learnt_BT[:, 0] = False
    return {
        "input_ids": input_ids_BT,
        "attention_mask": attention_mask_BT,
        "learnt": learnt_BT & (attention_mask_BT > 0),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_hidden_gives_the_models_logits(family: str) -> None:
    model, data = tiny(family), batch()
    with torch.no_grad():
        hidden_BTH, head = hidden_and_head(model, data["input_ids"], data["attention_mask"])
        expected_BTV = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    found_BTV = head_logits(hidden_BTH.flatten(0, 1), head).view_as(expected_BTV)
    torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-5, rtol=0)
    assert expected_BTV.std() > 0.1  # a comparison of zeros would say nothing
    check_head(model)


@pytest.mark.parametrize("family", ["gpt2", "opt_projected", "gemma2", "mixtral", "phi"])
def test_gradients_through_the_head_are_the_models_own(family: str) -> None:
    """In training mode, under gradient checkpointing: the same gradient as through `model(...).logits`."""
    data = batch()
    gradients = []
    for through_head in (True, False):
        model = tiny(family, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dropout=0.0)
        model.train()
        model.activation_checkpointing_enable()
        if through_head:
            hidden_BTH, head = hidden_and_head(model, data["input_ids"], data["attention_mask"])
            logits_NV = head_logits(hidden_BTH.flatten(0, 1), head)
        else:
            logits_NV = model(**{k: data[k] for k in ("input_ids", "attention_mask")}, use_cache=False).logits.flatten(
                0, 1
            )
        (logits_NV.log_softmax(-1)[:, 5] * torch.arange(len(logits_NV))).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert expected is not None
        torch.testing.assert_close(gradients[0][name], expected, atol=1e-4 * float(expected.abs().max() + 1), rtol=1e-4)


def test_the_hidden_state_before_a_token_predicts_it() -> None:
    """Log-probability of every learnt token, read off the full logits token by token."""
    model, data = tiny("llama"), batch()
    with torch.no_grad():
        hidden_NH, tokens_N, head = completion_hidden(model, data)
        logprobs_NV = head_logits(hidden_NH, head).log_softmax(-1)
        found = logprobs_NV.gather(1, tokens_N[:, None])[:, 0].tolist()
        expected = []
        for row in range(3):
            for place in range(1, 9):
                if data["learnt"][row, place]:
                    text = data["input_ids"][row : row + 1, :place]  # nothing from `place` on is seen
                    token = data["input_ids"][row, place]
                    expected.append(model(input_ids=text).logits[0, -1].log_softmax(-1)[token].item())
    assert len(expected) > 5
    assert found == pytest.approx(expected, abs=1e-4)


def test_nothing_stands_before_the_first_token_and_no_token_may_be_learnt() -> None:
    model, data = tiny("llama"), batch()
    data["learnt"] = torch.zeros_like(data["learnt"])
    data["learnt"][:, 0] = True
    hidden_NH, tokens_N, _ = completion_hidden(model, data)
    assert hidden_NH.shape == (0, 32) and tokens_N.shape == (0,)
    hidden_NH.sum().backward()  # a rank without completion tokens still takes part


def test_only_the_last_hidden_state_is_kept() -> None:
    model, data = tiny("llama"), batch()
    seen: list[int] = []
    hook = model.register_forward_hook(
        lambda _m, _i, output: seen.append(sum(h is not None for h in output.hidden_states)), always_call=False
    )
    hidden_and_head(model, data["input_ids"])
    hook.remove()
    assert seen == [1]


def test_an_unknown_family_fails_the_check_of_the_head() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
            output: Any = super().forward(*args, **kwargs)  # pyright: ignore[reportArgumentType]
            output.logits = output.logits * 1.01
            return output

    config: Any = tiny("llama").config
    model = Scaled(config)
    with pytest.raises(ModelError, match="Scaled: expected the output head"):
        check_head(model)


def test_check_head_leaves_the_mode_alone() -> None:
    model = tiny("gpt2").train()
    check_head(model)
    assert model.training


def test_a_model_without_output_matrix_is_refused() -> None:
    with pytest.raises(ModelError, match="output matrix"):
        output_head(tiny("llama").model)
    with pytest.raises(ModelError, match="Linear"):
        unwrap(nn.Linear(2, 2))


def test_padding_rows_of_the_vocabulary_survive_saving(tmp_path: Path) -> None:
    model, data = tiny("llama"), batch(vocab=80)
    assert vocabulary_rows(model) is None and output_head(model).size == 96
    set_vocabulary(model, 80)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert vocabulary_rows(again) == 80
    hidden_BTH, head = hidden_and_head(again, data["input_ids"])
    assert head_logits(hidden_BTH[0], head).shape == (9, 80)
    check_head(again)
    for wrong in (0, 97):
        with pytest.raises(ModelError, match="1 to 96"):
            set_vocabulary(model, wrong)


@pytest.mark.slow
def test_a_compiled_model_is_unwrapped() -> None:
    model = tiny("llama")
    assert unwrap(torch.compile(model)) is model  # pyright: ignore[reportArgumentType]


def test_eos_of_tokenizer_generation_config_and_template(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|endoftext|>"  # a base tokenizer under a chat template
    model = tiny("qwen2", vocab=151_936, hidden_size=4, intermediate_size=4)
    model.generation_config.eos_token_id = [151_643, 151_644]
    assert end_of_turn(tokenizer) == 151_645
    assert eos_tokens(model, tokenizer) == (151_643, 151_644, 151_645)
    model.generation_config.eos_token_id = 151_665
    set_vocabulary(model, 151_665)
    assert eos_tokens(model, tokenizer) == (151_643, 151_645)  # an id beyond the vocabulary cannot be written
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_a_broken_template_is_named(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")
    tokenizer.chat_template = "{{ raise_exception('no roles here') }}"
    with pytest.raises(ModelError, match="no roles here"):
        end_of_turn(tokenizer)
