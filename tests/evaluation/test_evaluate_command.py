"""`limbeck evaluate`: several data sets, seeds of one's own, samples, exposure, calibration."""

from __future__ import annotations

import inspect
import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.data import completion_text, read, render
from limbeck.decoding import Sampling, generate
from limbeck.errors import DataError, RecipeError
from limbeck.evaluation import Scores, evaluate, token_calibration
from limbeck.models import eos_tokens, load_model, load_tokenizer
from limbeck.pipeline import evaluate_folder
from limbeck.pipeline.evaluating import _values
from limbeck.scoring import distinct_4, score

STORIES = [
    {"prompt": "Once upon a time", "completion": "there was a little girl named Lily. She loved to play."},
    {"prompt": "Tom and Mia saw a big", "completion": "dog in the park. The dog was sad."},
    {"prompt": "The sun was", "completion": "shining and the birds were singing in the trees."},
]
LABELS = [
    {"prompt": "Tom was a little", "labels": [" boy", " girl"], "completion": " boy"},
    {"prompt": "Lily was a little", "labels": [" boy", " girl"], "completion": " girl"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("stories", STORIES), ("labels", LABELS)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(folder / f"{name}.jsonl") for name in ("stories", "labels")}


@pytest.fixture(scope="module")
def folders(shared: Path) -> dict[str, str]:
    return {name: str(shared / "models" / name) for name in ("stories260k", "stories-xs-280k")}


def test_seeds_of_ones_own_and_banned_n_grams(files: dict[str, str], folders: dict[str, str]) -> None:
    model, tokenizer = load_model(folders["stories260k"]), load_tokenizer(folders["stories260k"])
    examples = render(read(files["stories"]), tokenizer)[0]
    stops = eos_tokens(model, tokenizer)
    settings: Any = {"metrics": ["rouge_l", "distinct_4"], "max_tokens": 24, "stop_tokens": stops}
    found = evaluate(model, tokenizer, examples, seeds=[20, 10], no_repeat_ngram_size=2, **settings)
    assert found.values["rouge_l"].shape == (2, 3) and found.values["distinct_4"].shape == (2, 1)
    for place, seed in enumerate((20, 10)):
        sampling = Sampling(max_tokens=24, stop_tokens=stops, seed=seed, no_repeat_ngram_size=2)
        written = generate(model, [example.prompt for example in examples], sampling)
        texts = [completion_text(tokenizer, completion.tokens, stops) for completion in written]
        assert found.completions[place] == texts
        np.testing.assert_array_equal(
            found.values["rouge_l"][place], score("rouge_l", texts, [row["completion"] for row in STORIES])
        )
        assert found.values["distinct_4"][place].tolist() == [distinct_4(texts)]
    plain = evaluate(model, tokenizer, examples, seeds=[20, 10], **settings)
    assert plain.completions != found.completions
    assert plain.values["rouge_l_greedy"].shape == (1, 3)
    with pytest.raises(RecipeError, match=r"seeds that differ from each other, found \[3, 3\]"):
        evaluate(model, tokenizer, examples, seeds=[3, 3], **settings)
    with pytest.raises(RecipeError, match="found one twice: rouge_l, rouge_l"):
        evaluate(model, tokenizer, examples, **{**settings, "metrics": ["rouge_l", "rouge_l"]})


def test_metrics_with_options_and_without_references(folders: dict[str, str]) -> None:
    model, tokenizer = load_model(folders["stories260k"]), load_tokenizer(folders["stories260k"])
    examples = render([{"prompt": row["prompt"], "about": row["completion"]} for row in STORIES], tokenizer)[0]
    settings: Any = {"max_tokens": 24, "stop_tokens": eos_tokens(model, tokenizer), "seeds": 2}
    metrics = ["length", {"name": "regex", "pattern": "was"}, {"name": "rouge_l", "column": "about"}]
    found = evaluate(model, tokenizer, examples, metrics=metrics, **settings)
    assert list(found.values) == [n + s for n in ("length", "regex", "rouge_l") for s in ("", "_greedy")]
    for place, texts in enumerate(found.completions):
        assert found.values["regex"][place].tolist() == [float("was" in text) for text in texts]
        expected = score("rouge_l", texts, [row["completion"] for row in STORIES])
        assert found.values["rouge_l"][place].tolist() == expected
    with pytest.raises(DataError, match="expected a reference"):
        evaluate(model, tokenizer, examples, metrics=["rouge_l"], **settings)
    with pytest.raises(RecipeError, match="column abut.*did you mean 'about'"):
        evaluate(model, tokenizer, examples, metrics=[{"name": "rouge_l", "column": "abut"}], **settings)


def test_everything_at_once(files: dict[str, str], folders: dict[str, str], tmp_path: Path) -> None:
    screen = Console(file=StringIO(), width=120)
    found = evaluate_folder(
        folders["stories-xs-280k"],
        [files["stories"], files["labels"]],
        metrics=["rouge_l", {"name": "regex", "pattern": "a"}, "exact_match", "distinct_4"],
        samples=3,
        teacher=folders["stories260k"],
        max_tokens=12,
        with_exposure=True,
        with_calibration=True,
        out=tmp_path / "out",
        console=screen,
    )
    stories, labels = found[files["stories"]], found[files["labels"]]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    for name in ("rouge_l", "regex", "regex_pass@2", "exact_match_maj@3", "loss", "forward_kl", "ex_acc_err"):
        assert stories[name]["low"] <= stories[name]["mean"] <= stories[name]["high"], name
    assert stories["regex_pass@3"]["mean"] >= stories["regex_pass@2"]["mean"] >= stories["regex"]["mean"]
    # A pattern is right or wrong but gives no answer that could vote.
    at_k = {key for key in stories if "@" in key}
    names = ("regex_pass", "exact_match_pass", "exact_match_maj")
    assert at_k == {f"{name}@{k}" for name in names for k in (2, 3)}
    assert stories["distinct_4"]["low"] is None and len(stories["distinct_4"]["values"]) == 3
    assert len(stories["exposure"]["percent"]) == 12 and stories["exposure"]["percent"][0] == pytest.approx(0, abs=1e-3)
    assert stories["ex_acc_err"]["mean"] == stories["exposure"]["percent"][-1]
    assert "ece_labels" in labels and "ece_labels" not in stories and labels["calibration"]["labels"]["count"] == 2
    assert stories["parameters"] == labels["parameters"] > 0
    tokenizer: Any = load_tokenizer(folders["stories-xs-280k"])
    model = load_model(folders["stories-xs-280k"])
    tokens = token_calibration(model, render(read(files["stories"]), tokenizer)[0], tokenizer.pad_token_id)
    assert stories["ece_tokens"]["mean"] == pytest.approx(tokens.ece, rel=1e-5)
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.svg"))
    assert pictures == [
        "exposure-0.svg",
        "exposure-1.svg",
        "reliability-labels-1.svg",
        "reliability-tokens-0.svg",
        "reliability-tokens-1.svg",
    ]
    for name in pictures:
        ElementTree.parse(tmp_path / "out" / name)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "stories.jsonl" in shown and "labels.jsonl" in shown and "3 seeds" in shown
    assert f"{stories['rouge_l']['mean']:.4f}" in shown and "3 rows (3 prompt + completion)" in shown


def test_options_that_do_not_fit(files: dict[str, str], folders: dict[str, str]) -> None:
    settings: Any = {"metrics": ["rouge_l"], "console": Console(file=StringIO()), "max_tokens": 4}
    model = folders["stories260k"]
    with pytest.raises(RecipeError, match="seeds or samples, found both"):
        evaluate_folder(model, files["stories"], seeds=3, samples=3, **settings)
    with pytest.raises(RecipeError, match="add --teacher"):
        evaluate_folder(model, files["stories"], with_exposure=True, **settings)


def test_mistakes_are_found_before_anything_is_written(
    files: dict[str, str], folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the model has written")

    monkeypatch.setattr("limbeck.pipeline.evaluating.evaluate", too_late)
    stories, model = files["stories"], folders["stories260k"]
    bad = tmp_path / "bad.jsonl"

    def message(kind: type[Exception], data: Any, metrics: list[Any], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            evaluate_folder(model, data, metrics=metrics, console=Console(file=StringIO()), max_tokens=4, **options)
        return str(caught.value)

    for found in (["rouge_l"], ["distinct_4"], ["limbeck.scoring.text:exact_match"]):
        expected = f"a metric that says right or wrong (exact_match, .* found {found[0]}"
        assert pytest.raises(RecipeError, evaluate_folder, model, stories, metrics=found, samples=2).match(
            expected.replace("(", r"\(")
        )
    bad.write_text("in the way")
    assert f"expected to write to {bad / 'out'}" in message(RecipeError, stories, ["length"], out=bad / "out")
    # In the second of two data sets.
    bad.write_text(json.dumps({**LABELS[0], "completion": "neither"}))
    said = message(DataError, [stories, str(bad)], ["length"], with_calibration=True)
    assert "expected one of the labels ' boy', ' girl' as the right one" in said
    bad.write_text(json.dumps({"prompt": "Tom"}))
    assert "found prompts alone" in message(DataError, [stories, str(bad)], ["length"], with_calibration=True)
    assert "expected a reference" in message(DataError, [stories, str(bad)], ["rouge_l"])
    with pytest.raises(AssertionError, match="has written"):  # the control: all is well
        evaluate_folder(model, stories, metrics=["length"], console=Console(file=StringIO()), out=tmp_path / "out")


def test_samples_of_generated_problems(folders: dict[str, str]) -> None:
    found = evaluate_folder(
        folders["stories260k"],
        "reasoning_gym:chain_sum:3:7",
        metrics=["reasoning_gym"],
        samples=4,
        max_tokens=6,
        console=Console(file=StringIO()),
    )
    assert {key for key in found if "@" in key} == {f"reasoning_gym_{of}@{k}" for of in ("pass", "maj") for k in (2, 4)}
    assert found["reasoning_gym_pass@4"]["mean"] == 0.0 <= found["reasoning_gym"]["mean"] < 0.5


def test_a_full_score_alone_is_right() -> None:
    """Three samples of two prompts: the first is right twice by two ways to write 7, the second never, by .01."""
    texts = [["<answer>7</answer>", "8"], ["so <answer> 7 </answer>", "8"], ["9", "8"]]
    scores = Scores({"reasoning_gym": np.array([[1.0, 0.01], [1.0, 0.01], [0.0, 0.01]])}, [], 0.0, texts)
    found = _values(scores, at_k=True)
    assert found["reasoning_gym_pass@3"].mean() == 0.5 == found["reasoning_gym_maj@3"].mean()
    assert found["reasoning_gym_pass@2"].tolist() == [[1.0, 0.0]]
    assert not [key for key in _values(scores, at_k=False) if "@" in key]


def test_the_precision_is_that_of_all_products(files: dict[str, str], folders: dict[str, str]) -> None:
    """bf16 rounds what both models say; `auto` leaves so narrow a model in float32."""
    found: dict[str, dict[str, Any]] = {}
    for precision in ("auto", "fp32", "bf16"):
        screen = Console(file=StringIO(), width=120)
        found[precision] = evaluate_folder(
            folders["stories-xs-280k"],
            files["stories"],
            metrics=[],
            seeds=1,
            teacher=folders["stories260k"],
            max_tokens=4,
            precision=precision,  # pyright: ignore[reportArgumentType]
            console=screen,
        )
        said = "no bf16 autocast: a width of" if precision == "auto" else f"precision {precision}, as asked for"
        assert said in screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("loss", "forward_kl"):
        exact, rounded = found["fp32"][name]["mean"], found["bf16"][name]["mean"]
        assert found["auto"][name]["mean"] == exact != rounded == pytest.approx(exact, rel=2e-2)


def test_a_metric_is_built_once_where_the_model_is(
    files: dict[str, str], folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from limbeck.scoring import build_reward

    built: list[tuple[Any, str]] = []

    def record(spec: Any, *, device: Any = None) -> Any:
        built.append((spec, str(device)))
        return build_reward(spec, device=device)

    monkeypatch.setattr(sys.modules["limbeck.evaluation.evaluate"], "build_reward", record)
    evaluate_folder(
        folders["stories260k"],
        [files["stories"], files["labels"]],
        metrics=["length"],
        seeds=1,
        max_tokens=4,
        console=Console(file=StringIO()),
    )
    assert built == [("length", "cpu")]


def test_the_command_line(files: dict[str, str], folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def record(*given: Any, **options: Any) -> None:
        asked.update(inspect.signature(evaluate_folder).bind(*given, **options).arguments)

    monkeypatch.setattr("limbeck.pipeline.evaluate_folder", record)

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", "m", "--data", "a", *words])

    assert run().exit_code == 0
    assert (asked["data"], asked["metrics"], asked["seeds"], asked["samples"]) == ("a", ["rouge_l"], None, None)
    for text, seeds in (("7", 7), ("10,20,30", [10, 20, 30]), ("10,", [10]), ("0, 1", [0, 1])):
        assert run("--seeds", text).exit_code == 0 and asked["seeds"] == seeds
    words = ["--data", "b", "--metrics", "rouge_l,accuracy", "--samples", "8", "--exposure", "--calibration"]
    words += ["--precision", "fp32"]
    assert asked["precision"] == "auto" and run("--precision", "fp16").exit_code != 0
    assert run(*words, "--no-repeat-ngram-size", "6", "--teacher", "t", "--out", "o").exit_code == 0
    assert asked["precision"] == "fp32"
    assert (asked["data"], asked["metrics"], asked["samples"]) == (["a", "b"], ["rouge_l", "accuracy"], 8)
    assert asked["with_exposure"] and asked["with_calibration"] and asked["no_repeat_ngram_size"] == 6
    assert (asked["teacher"], asked["out"]) == ("t", Path("o"))
    assert asked["model"] == "m" and run("n").exit_code == 0 and asked["model"] == ["m", "n"]
    assert run("--metrics", ' [rouge_l, {name: regex, pattern: "a, [bc]"}]').exit_code == 0
    assert asked["metrics"] == ["rouge_l", {"name": "regex", "pattern": "a, [bc]"}]
    for wrong, expected in (("[rouge_l, {", "expected a list in YAML"), ("[3]", "expected names and tables")):
        with pytest.raises(RecipeError, match=expected):
            raise run("--metrics", wrong).exception or AssertionError("no error")
    for wrong in ("0", "x", ",", "1,x"):
        assert isinstance(run("--seeds", wrong).exception, RecipeError)
