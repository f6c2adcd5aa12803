"""Every mistake of a user: one line that says what was expected, found and the fix, exit code 2, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from limbeck import cli
from limbeck.data.embedded import TEACHER

GOOD = {
    "method": "kd",
    "teacher": "embedded",
    "student": {"from_teacher": {"layers": [0]}},
    "data": {"train": "embedded:train:8", "eval": "embedded:eval:4"},
    "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    "evaluation": {"prompts": 0},
}


@pytest.fixture
def distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `limbeck distill` on GOOD under changes; returns the message of its exit with code 2."""

    def run(*overrides: str, **changes: Any) -> str:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**GOOD, "output": str(tmp_path / "run"), **changes}))
        monkeypatch.setattr("sys.argv", ["limbeck", "distill", str(recipe), *overrides])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        message = capsys.readouterr().err.strip()
        assert exit_.value.code == 2, message
        line = message.splitlines()[-1]
        assert line.startswith("limbeck: ")
        assert "Traceback" not in message
        assert not (tmp_path / "run" / "metrics.jsonl").exists(), "it trained before it complained"
        return line

    return run


def rows(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_missing_data_file(distill: Any, tmp_path: Path) -> None:
    assert "nothing.jsonl" in distill(f"data.train={tmp_path}/nothing.jsonl")


def test_broken_json_names_the_line(distill: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, '{"prompt": "a", ')
    assert "line 2" in distill(f"data.train={path}")


def test_a_row_without_known_columns_names_those_found(distill: Any, tmp_path: Path) -> None:
    message = distill(f"data.train={rows(tmp_path / 'd.jsonl', {'frage': 'a', 'antwort': 'b'})}")
    assert "frage" in message
    assert "prompt" in message


def test_an_empty_completion(distill: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""})
    assert "line 2" in distill(f"data.train={path}")


def test_a_prompt_longer_than_the_context(distill: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "d.jsonl", *[{"prompt": "Tom has 3 apples . " * 200, "completion": "b"}] * 2)
    message = distill(f"data.train={path}")
    assert "row 1" in message
    assert "tokens" in message


def test_a_misspelt_key_gets_its_neighbour(distill: Any) -> None:
    assert "did you mean 'sampling'" in distill(samplign={"max_tokens": 3})
    assert "did you mean 'learning_rate'" in distill("training.learnin_rate=1")
    assert "did you mean 'forward_kl'" in distill("divergence.name=foward_kl")
    assert "did you mean 'gkd'" in distill("method=gdk")


@pytest.mark.parametrize("value", ["-0.1", "1.5"])
def test_lmbda_outside_zero_to_one(distill: Any, value: str) -> None:
    assert "lmbda" in distill("method=gkd", f"lmbda={value}")


@pytest.mark.parametrize("value", ["0", "1"])
def test_beta_at_the_ends(distill: Any, value: str) -> None:
    message = distill("divergence={name: jsd, beta: " + value + "}")
    assert "beta" in message
    assert "forward_kl" in message


def test_another_tokenizer(distill: Any, shared: Path) -> None:
    message = distill(student=str(shared / "models" / "stories260k"))
    assert "vocabulary" in message
    assert "512" in message


def test_another_end_of_text(distill: Any, tmp_path: Path) -> None:
    folder = copy_of_teacher(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(20)
    tokenizer.save_pretrained(folder)
    assert "EOS" in distill(student=str(folder))


def test_no_end_of_text(distill: Any, tmp_path: Path) -> None:
    folder = copy_of_teacher(tmp_path / "student")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "EOS" in distill(student=str(folder))


def test_pickled_weights(distill: Any, tmp_path: Path) -> None:
    folder = copy_of_teacher(tmp_path / "student")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickle" in distill(student=str(folder))


def test_a_missing_teacher_and_a_missing_recipe(distill: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert "needs one" in distill("teacher=null", student={"from_config": {"model_type": "llama"}})
    monkeypatch.setattr("sys.argv", ["limbeck", "distill", "storys"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "did you mean 'stories'" in capsys.readouterr().err


def test_a_checkpoint_cut_short(distill: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    message = distill("--resume")
    assert "checkpoint-1" in message


def test_a_run_is_never_written_over(distill: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("{}\n")
    assert "--resume" in distill(f"output={tmp_path / 'other'}")


def test_owned_training_keys_name_their_place(distill: Any) -> None:
    assert "evaluation.steps" in distill("training.eval_steps=3")


def copy_of_teacher(folder: Path) -> Path:
    """A student of the embedded teacher's vocabulary in a folder of its own."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
