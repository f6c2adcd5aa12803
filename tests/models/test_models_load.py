"""Models from folders and GGUF files; what is wrong with a folder is said in one line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from model_families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.models import build_student, cast, fast_linears, load_model, load_tokenizer

TOKENS = torch.arange(3, 15)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A copy of a real model's folder to damage."""
    return Path(shutil.copytree(shared / "models" / "stories260k", tmp_path / "stories260k"))


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local path was looked up on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("_no_network")
def test_a_folder_is_read_in_the_dtype_asked_for(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder)
    for path in (folder, str(folder)):
        model = load_model(path)
        assert torch.equal(logits(model), logits(expected)) and not model.training
    half = load_model(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32


def test_cast_is_what_loading_in_that_dtype_gives(folder: Path) -> None:
    model = cast(load_model(folder), torch.bfloat16)
    assert torch.equal(logits(model), logits(load_model(folder, dtype=torch.bfloat16)))
    assert model.dtype == model.config.dtype == torch.bfloat16


def one_line(path: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("_no_network")
def test_what_is_wrong_with_a_folder(folder: Path) -> None:
    weights = folder / "model.safetensors"
    assert f"did you mean {str(folder)!r}?" in one_line(folder.with_name("stories260"))
    assert "found nothing there" in one_line(folder / "nowhere" / "at" / "all")
    assert "found another file" in one_line(weights)

    whole = weights.read_bytes()
    for broken in (whole[:-100], whole[:40], b""):
        weights.write_bytes(broken)
        assert "broken safetensors file" in one_line(folder)
    weights.unlink()
    assert "expected model.safetensors, found no weights" in one_line(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights only (pytorch_model.bin)" in one_line(folder)
    (folder / "config.json").unlink()
    assert "expected config.json" in one_line(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter" in one_line(folder)


@pytest.mark.usefixtures("_no_network")
def test_missing_weights_and_shards_are_not_filled_with_random_numbers(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    lost = tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "found 1 missing (first: model.layers.3.mlp.up_proj.weight)" in one_line(folder)
    tensors["model.layers.3.mlp.up_proj.weight"] = lost[:10].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    one_line(folder)
    weights.unlink()
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: "model-00001-of-00001.safetensors" for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    one_line(folder)


@pytest.mark.usefixtures("_no_network")
def test_bad_configurations(folder: Path) -> None:
    config = folder / "config.json"
    values = json.loads(config.read_text())
    for text in ("{", json.dumps({**values, "model_type": "nonsense"}), json.dumps({**values, "model_type": "t5"})):
        config.write_text(text)
        one_line(folder)
    config.write_text(json.dumps({**values, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (folder / "own.py").write_text("raise SystemExit('foreign code was run')")
    assert "trust_remote_code" in one_line(folder)


@pytest.mark.usefixtures("_no_network")
def test_a_misspelt_relative_path_is_not_taken_for_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert "did you mean" in one_line(f"{folder.parent.name}/stories26k")
    assert "found nothing there" in one_line("model.gguf")


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "expected a causal language model, found" in one_line("nobody/nothing")


# tokenizers


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_a_tokenizer_has_eos_and_pad_and_pads_right(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (1, 2, "right")
    edit(folder, pad_token=None)
    assert load_tokenizer(folder).pad_token_id == 1  # the EOS: lengths, not ids, say what is padding
    edit(folder, eos_token=None)
    with pytest.raises(ModelError, match='expected a tokenizer with an EOS token.*set "eos_token"'):
        load_tokenizer(folder)


def test_a_folder_of_a_tokenizer_alone_and_one_without(shared: Path, folder: Path) -> None:
    assert load_tokenizer(shared / "tokenizers" / "qwen2.5").eos_token == "<|im_end|>"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="expected tokenizer_config.json or tokenizer.json"):
        load_tokenizer(folder)


# GGUF


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order in which GGUF files of Llama keep the rows of the query and key projections."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(model: PreTrainedModel, file: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    specials = ["<|endoftext|>", "<s>", "</s>"]
    letters = [chr(code) for code in range(33, 33 + config.vocab_size - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*specials, *letters, letters[0] + letters[1]])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        values = tensor.numpy().astype(np.float32)
        if tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(("kind", "error"), [("F32", 1e-5), ("Q8_0", 0.3)])
def test_a_gguf_file_gives_plain_weights(kind: str, error: float, tmp_path: Path) -> None:
    """The model that the file was written from, in float32 and in 8 bits; saved again it is an ordinary folder."""
    model = tiny("llama", intermediate_size=64)
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file, gguf.GGMLQuantizationType[kind])
    found = load_model(file)
    assert (logits(found) - logits(model)).abs().max() < error
    assert torch.equal(logits(load_model(tmp_path)), logits(found))  # the folder that holds it
    assert {type(module) for module in found.modules() if hasattr(module, "weight")} == {
        type(module) for module in fast_linears(model).modules() if hasattr(module, "weight")
    }  # plain linears, no packed ones
    found.save_pretrained(tmp_path / "plain")
    again = load_model(tmp_path / "plain")
    assert torch.equal(logits(again), logits(found)) and not hasattr(again.config, "quantization_config")

    tokenizer = load_tokenizer(file)
    assert tokenizer.eos_token_id == 2 and len(tokenizer) == 96
    cut, own = build_student({"from_teacher": {"layers": [1, 3]}}, file)
    assert cut.config.num_hidden_layers == 2 and own.get_vocab() == tokenizer.get_vocab()


def test_what_is_wrong_with_a_gguf_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF and nothing after it")
    assert "found 2; name one" in one_line(tmp_path)
    one_line(tmp_path / "a.gguf")
