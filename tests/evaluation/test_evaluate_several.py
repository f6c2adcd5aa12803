"""`limbeck evaluate` of several models: each as it is alone, and their differences over the same prompts and seeds."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from limbeck.data import read, render
from limbeck.decoding import generate
from limbeck.errors import RecipeError
from limbeck.evaluation import evaluate, held_out, paired_difference
from limbeck.models import eos_tokens, load_model, load_tokenizer
from limbeck.pipeline import evaluate_folder, evaluation_parts
from limbeck.pipeline.evaluated import short_names

ROWS = [
    {"prompt": "Once upon a time", "completion": "there was a little girl named Lily. She loved to play."},
    {"prompt": "Tom and Mia saw a big", "completion": "dog in the park. The dog was sad."},
    {"prompt": "The sun was", "completion": "shining and the birds were singing in the trees."},
    {"prompt": "Lily had a", "completion": "red ball."},
]
SPEED = {"tokens_per_s", "time_to_first_token_s", "peak_memory_bytes"}


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "stories.jsonl")


@pytest.fixture(scope="module")
def folders(shared: Path) -> tuple[str, str]:
    return str(shared / "models" / "stories260k"), str(shared / "models" / "stories-xs-280k")


def test_each_as_alone_and_their_paired_differences(data: str, folders: tuple[str, str], tmp_path: Path) -> None:
    large, small = folders
    screen = Console(file=StringIO(), width=160)
    settings: dict[str, Any] = {"metrics": ["rouge_l", "distinct_4"], "seeds": 2, "max_tokens": 12, "teacher": large}
    found = evaluate_folder(folders, data, console=screen, out=tmp_path / "out", **settings)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert list(found["models"]) == [large, small]
    for folder in folders:
        alone = evaluate_folder(folder, data, console=Console(file=StringIO()), **settings)
        assert {k: v for k, v in alone.items() if k not in SPEED} == {
            k: v for k, v in found["models"][folder].items() if k not in SPEED
        }

    # What both wrote and how far both are from the teacher, read again without the command.
    values: list[dict[str, Any]] = []
    for folder in folders:
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        examples = render(read(data), tokenizer)[0]
        stops: Any = {"stop_tokens": eos_tokens(model, tokenizer), "max_tokens": 12}
        values.append(dict(evaluate(model, tokenizer, examples, metrics=["rouge_l"], seeds=2, **stops).values))
        pad: Any = tokenizer.pad_token_id
        values[-1] |= held_out(model, load_model(large), examples, pad)["per_example"]
    assert len(found["differences"]) == 6
    by_name = {each["metric"]: each for each in found["differences"]}
    for name in ("rouge_l", "rouge_l_greedy", "loss", "forward_kl", "reverse_kl", "agreement"):
        weights = None if "rouge" in name else np.array(values[0]["tokens"])
        of_large, of_small = (np.atleast_2d(each[name]) for each in values)
        expected = paired_difference(of_small, of_large, seeds="evaluation", weights=weights)
        difference = by_name[name]
        assert (difference["a"], difference["b"], difference["data"]) == (small, large, data)
        for key in ("difference", "low", "high"):
            assert difference[key] == pytest.approx(getattr(expected, key), abs=1e-6), (name, key)
    assert by_name["forward_kl"]["difference"] > 0.1 and by_name["forward_kl"]["verdict"] == "worse"
    assert by_name["agreement"]["verdict"] == "worse"
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "stories-xs-280k - stories260k" in shown and f"{by_name['loss']['difference']:+.4f}" in shown


def test_a_teacher_reads_the_rows_once(data: str, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, ...]] = []

    def counted(folder: str) -> Any:
        model = load_model(folder)
        if folder == folders[0]:
            model.model.register_forward_hook(lambda _module, _given, out: passes.append(out[0].shape))
        return model

    monkeypatch.setattr(evaluation_parts, "load_model", counted)
    settings: Any = {"metrics": [], "seeds": 1, "max_tokens": 1, "console": Console(file=StringIO())}
    for students in (folders[1], [folders[1], f"{folders[1]}/"]):
        passes.clear()
        evaluate_folder(students, data, teacher=folders[0], **settings)
        assert len([shape for shape in passes if shape[0] == len(ROWS)]) == 1, passes


def test_only_what_is_of_the_same_tokens_is_compared(data: str, folders: tuple[str, str], tmp_path: Path) -> None:
    """A short context cuts the reference texts, so that a mean over their tokens is of other tokens."""
    settings: Any = {"metrics": ["length", "distinct_4"], "seeds": 1, "max_tokens": 2}
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in Path(folders[0]).iterdir():
        (narrow / file.name).write_bytes(file.read_bytes())
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    found = evaluate_folder([folders[0], str(narrow)], data, console=Console(file=StringIO()), **settings)
    assert {each["metric"] for each in found["differences"]} == {"length", "length_greedy"}
    assert all(each["difference"] == 0 for each in found["differences"])  # the same weights, prompts and seeds
    losses = [numbers["loss"]["mean"] for numbers in found["models"].values()]
    assert losses[0] != losses[1]
    with pytest.raises(RecipeError, match="expected models that differ from each other, found .*stories260k, "):
        evaluate_folder([folders[0], folders[0]], data, console=Console(file=StringIO()), **settings)


def test_paths_are_named_by_what_tells_them_apart() -> None:
    assert short_names(["runs/a/student", "runs/b/student"]) == {
        "runs/a/student": "a/student",
        "runs/b/student": "b/student",
    }
    assert short_names(["x/start", "runs/b/student"]) == {"x/start": "start", "runs/b/student": "student"}
    assert short_names(["embedded:test:20"]) == {"embedded:test:20": "embedded:test:20"}


def test_a_stopped_evaluation_goes_on_where_it_was(
    data: str, folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is read, not written again: the same numbers; another length or model is another part."""
    written: list[int] = []
    last = 3

    def counted(model: Any, prompts: Any, sampling: Any) -> Any:
        if len(written) == last:
            raise KeyboardInterrupt
        written.append(sampling.max_tokens)
        return generate(model, prompts, sampling)

    monkeypatch.setattr(evaluation_parts, "generate", counted)
    screen = Console(file=StringIO(), width=160)
    settings: dict[str, Any] = {"metrics": ["rouge_l"], "seeds": 2, "max_tokens": 12, "teacher": folders[0]}
    settings |= {"with_exposure": True, "with_calibration": True, "console": screen}
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(folders, data, out=tmp_path / "out", **settings)
    last = 100
    whole = evaluate_folder(folders, data, out=tmp_path / "out", **settings)
    assert len(written) == 4
    monkeypatch.setattr(evaluation_parts, "held_out_together", None)
    monkeypatch.setattr(evaluation_parts, "exposure", None)
    monkeypatch.setattr(evaluation_parts, "token_calibration", None)
    again = evaluate_folder(folders, data, out=tmp_path / "out", **settings)
    assert len(written) == 4
    for folder in folders:
        before, after = whole["models"][folder], again["models"][folder]
        assert {k: v for k, v in before.items() if k not in SPEED} == {k: v for k, v in after.items() if k not in SPEED}
    assert again["differences"] == whole["differences"]
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "stories260k/stories.jsonl/greedy: done before" in shown
    with pytest.raises(TypeError):
        evaluate_folder(folders[1], data, out=tmp_path / "out", **settings)  # one model alone: read anew
    monkeypatch.undo()
    settings |= {"max_tokens": 6, "with_exposure": False, "with_calibration": False}
    shorter = evaluate_folder(folders, data, out=tmp_path / "out", **settings)
    kept = sorted(tmp_path.glob("**/parts/*"))
    expected = evaluate_folder(folders, data, **settings)
    assert shorter["differences"] == expected["differences"] != whole["differences"]
    assert sorted(tmp_path.glob("**/parts/*")) == kept  # without a folder nothing is


def test_a_model_trained_further_is_evaluated_anew(data: str, folders: tuple[str, str], tmp_path: Path) -> None:
    model, tokenizer = load_model(folders[1]), load_tokenizer(folders[1])
    settings: dict[str, Any] = {
        "metrics": ["rouge_l"],
        "seeds": 1,
        "max_tokens": 2,
        "console": Console(file=StringIO()),
    }
    losses: list[float] = []
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        losses.append(evaluate_folder(tmp_path / "model", data, out=tmp_path / "out", **settings)["loss"]["mean"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert losses[0] != losses[1]
