"""Files and other sources to normalised rows; mixtures; every error names what was expected and found."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from limbeck.data import mixture_counts, read
from limbeck.errors import DataError

PAIRS = [{"prompt": "a", "completion": "b", "id": 1}, {"prompt": "", "completion": "d", "id": 2}]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return str(path)


def error(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- formats ----------------------------------------------------------------------------------------------------------


def test_jsonl_json_parquet_and_lists_read_alike(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "pairs.jsonl", *PAIRS)
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "pairs.parquet")
    for source in (
        jsonl,
        Path(jsonl),
        str(tmp_path / "pairs.json"),
        str(tmp_path / "pairs.parquet"),
        PAIRS,
        datasets.Dataset.from_list(PAIRS),
    ):
        assert read(source) == PAIRS, source


def test_a_folder_saved_or_of_files_and_its_split(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", *PAIRS)
    assert read(tmp_path / "files") == PAIRS
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    assert read(str(tmp_path / "one")) == PAIRS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "splits")
    assert read(str(tmp_path / "splits")) == PAIRS


def test_text_files_give_a_row_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n \n\t\n\nthree\r\n\r\n  four \n")
    assert read(str(tmp_path / "a.txt")) == [{"text": "one\ntwo"}, {"text": "three"}, {"text": "  four "}]


def test_jsonl_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}'.encode())
    assert [row["text"] for row in read(path)] == ["a\u2028b\x85c", "d"]


def test_embedded_task() -> None:
    rows = read("embedded:train:5")
    assert len(rows) == 5 and all(row["prompt"] and row["completion"] for row in rows)
    assert "embedded:SPLIT:COUNT" in error("embedded:train")
    assert "embedded:SPLIT:COUNT" in error("embedded:train:0")
    assert "embedded:SPLIT:COUNT" in error("embedded:train:5:6")


def test_real_files(shared: Path) -> None:
    dolly = read(shared / "data" / "dolly_dev.jsonl")
    assert len(dolly) == 1000
    watergate = dolly[0]
    assert watergate["prompt"] == f"{watergate['instruction']}\n\n{watergate['input']}"
    assert watergate["completion"] == watergate["output"]
    gsm8k = read(shared / "data" / "gsm8k_test.jsonl")[0]
    assert gsm8k["prompt"].startswith("Janet") and gsm8k["completion"].endswith("#### 18")
    assert gsm8k["question"] == gsm8k["prompt"]
    assert set(read(shared / "data" / "tinystories_test.jsonl")[0]) == {"text"}
    assert len(read(shared / "data" / "tinyshakespeare.txt")) == 7222


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, {"prompt": "i", "completion": "o"}),
        ({"instruction": "i", "input": "x", "output": "o"}, {"prompt": "i\n\nx", "completion": "o"}),
        ({"instruction": "i", "output": "o"}, {"prompt": "i", "completion": "o"}),
        ({"instruction": "i", "context": "x", "response": "o"}, {"prompt": "i\n\nx", "completion": "o"}),
        ({"question": "q", "answer": "a"}, {"prompt": "q", "completion": "a"}),
        ({"prompt": "p", "answer": "4"}, {"prompt": "p"}),
        ({"text": "t", "id": 3}, {"text": "t"}),
        (
            {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
        ),
        ({"prompt": [{"role": "user", "content": "p"}]}, {"messages": [{"role": "user", "content": "p"}]}),
    ],
)
def test_kinds_are_detected_and_other_columns_kept(row: dict[str, Any], expected: dict[str, Any]) -> None:
    (found,) = read([row])
    kept = {key: value for key, value in row.items() if key not in ("prompt", "completion", "messages", "text")}
    assert found == {**kept, **expected}


def test_columns_map_names() -> None:
    row = {"q": "1 + 1?", "a": "2", "hint": "count", "prompt": "other", "text": "t"}
    (found,) = read([row], columns={"prompt": "q", "input": "hint", "completion": "a"})
    assert found == {"q": "1 + 1?", "a": "2", "hint": "count", "prompt": "1 + 1?\n\ncount", "completion": "2"}
    # One of the two renamed, the other under its own name.
    assert read([{"prompt": "p", "a": "2"}], columns={"completion": "a"})[0]["completion"] == "2"
    # Text asked for, where the file has a prompt too: the row's kind is what columns say.
    assert read([row], columns={"text": "hint"}) == [{"q": "1 + 1?", "a": "2", "hint": "count", "text": "count"}]


def test_reading_twice_changes_nothing() -> None:
    for row in ({"question": "q", "answer": "a"}, {"instruction": "i", "input": "x", "output": "o"}):
        once = read([row])
        assert read(once) == once


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([10, 10], [1, 1], [10, 10]),
        ([10, 2], [1, 1], [10, 10]),
        ([10, 10], [3, 1], [30, 10]),
        ([100, 30], [0.9, 0.1], [270, 30]),
        ([7], [0.2], [7]),
        ([3, 4], [1, 2], [3, 6]),
        ([5, 5, 5], [0.1, 0.2, 0.3], [5, 10, 15]),
    ],
)
def test_mixture_counts_by_hand(sizes: list[int], weights: list[float], counts: list[int]) -> None:
    assert mixture_counts(sizes, weights) == counts


def test_mixture_counts_are_exact_to_one_row_and_drop_nothing() -> None:
    for seed in range(200):
        sizes = [(seed * 37 + i * 101) % 97 + 1 for i in range(seed % 6 + 1)]
        weights = [((seed * 13 + i * 29) % 19 + 1) / 7 for i in range(len(sizes))]
        counts = mixture_counts(sizes, weights)
        total = sum(counts)
        assert all(count >= size for count, size in zip(counts, sizes, strict=True))
        assert all(abs(c - w / sum(weights) * total) < 1 + 1e-9 for c, w in zip(counts, weights, strict=True))
        # One row fewer would not hold every row: total - 1 < size / share for the relatively largest source.
        assert total - 1 < max(size * sum(weights) / w for size, w in zip(sizes, weights, strict=True)) + 1e-9


def test_mixture_holds_every_row_in_even_shares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = write(tmp_path / "small.jsonl", *({"prompt": f"s{i}", "completion": "x"} for i in range(4)))
    large = write(tmp_path / "large.jsonl", *({"question": f"l{i}", "answer": "x"} for i in range(9)))
    parts = [{"path": small, "weight": 2}, {"path": large, "weight": 3, "columns": {"prompt": "question"}}]
    with caplog.at_level("INFO", logger="limbeck"):
        prompts = [row["prompt"] for row in read(parts)]
    assert prompts == [row["prompt"] for row in read(parts)]
    counts = Counter(prompts)
    assert len(prompts) == 15 and all(counts[f"l{i}"] == 1 for i in range(9))
    # The small source gives 6 of 15: each of its 4 rows once, and two of them, evenly spaced, once more.
    assert [counts[f"s{i}"] for i in range(4)] == [2, 1, 2, 1]
    for length in range(1, 16):
        assert abs(sum(prompt.startswith("s") for prompt in prompts[:length]) - 0.4 * length) <= 1
    assert "4 rows, used 1.50 times: 6 rows, 40.0 %" in caplog.text
    assert "9 rows, used 1.00 times: 9 rows, 60.0 %" in caplog.text


def test_mixture_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *PAIRS)
    assert "found wieght" in error([{"path": path, "wieght": 2}])
    for weight in (0, -1, "2", True, float("nan"), float("inf")):
        assert "expected a weight above 0" in error([{"path": path, "weight": weight}])
    assert "or of {path, weight, columns}, found dict" in error({"path": path})
    assert "missing.jsonl: no such file" in error([{"path": path}, {"path": str(tmp_path / "missing.jsonl")}])


# --- errors -----------------------------------------------------------------------------------------------------------


def test_missing_files_name_their_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *PAIRS)
    assert f"did you mean {str(tmp_path / 'train.jsonl')!r}?" in error(str(tmp_path / "trian.jsonl"))
    assert f"did you mean {str(tmp_path / 'train.jsonl')!r}?" in error(str(tmp_path / "train"))
    assert f"nor a folder {tmp_path / 'none'}" in error(str(tmp_path / "none" / "train.jsonl"))
    assert "no such file" in error("trian.jsonl")


def test_unknown_hub_ids_and_splits(tmp_path: Path) -> None:
    assert error("nobody/nothing:test").startswith("nobody/nothing:test: expected a file, a folder or a hub data set")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "splits")
    assert "with a split train" in error(str(tmp_path / "splits"))
    assert "choose one of test" in error(datasets.DatasetDict({"test": datasets.Dataset.from_list(PAIRS)}))
    assert "found int" in error(3)


def test_broken_files(tmp_path: Path) -> None:
    assert re.search(
        r"a\.jsonl, line 3: expected a JSON object, found broken JSON \(.*column 12\)",
        error(write(tmp_path / "a.jsonl", PAIRS[0], "", '{"prompt": nope}')),
    )
    assert "line 1: expected an object with named columns, found list" in error(write(tmp_path / "b.jsonl", "[1, 2]"))
    assert "expected a list of objects, found dict" in error(write(tmp_path / "c.json", {"rows": []}))
    assert "name the file .jsonl" in error(write(tmp_path / "d.json", *PAIRS))
    assert "e.parquet: expected a Parquet file" in error(write(tmp_path / "e.parquet", "PAR"))
    assert "found .csv" in error(write(tmp_path / "f.csv", "a,b"))
    (tmp_path / "g.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "expected UTF-8, found byte 0xff at 10" in error(tmp_path / "g.jsonl")


def test_empty_sources_name_themselves(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt"):
        assert error(write(tmp_path / name, "", " ")) == f"{tmp_path / name}: expected at least one row, found none"
    assert "expected at least one row" in error([])


def test_unknown_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"en": "Go.", "fr": "Va !"})
    message = error(path)
    assert f"{path}, line 1: expected prompt + completion" in message and "found en, fr" in message
    assert error(path, columns={"prompt": "enn"}).endswith("expected a column enn, found en, fr; did you mean 'en'?")
    assert "expected messages, prompt, completion, text, input as keys, found target" in error(
        path, columns={"target": "fr"}
    )
    assert "columns names no prompt" in error(path, columns={"completion": "fr"})


def test_mixed_kinds_name_both_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", PAIRS[0], "", {"prompt": "p"})
    assert f"line 3: expected prompt + completion as in {path}, line 1, found prompt: put each" in error(path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": " \n"}, "row 2: expected text as completion, found an empty completion"),
        ({"prompt": "p", "completion": None}, "found an empty completion"),
        ({"prompt": None, "completion": "c"}, "found an empty prompt"),
        ({"prompt": "p", "completion": 51.0}, "expected text as completion, found float 51.0"),
        ({"prompt": [], "completion": "c"}, "expected completion as one, found 'c'"),
        ({"question": "p", "answer": [["a"]]}, "expected text as completion (column answer), found list"),
    ],
)
def test_values_that_are_empty_or_not_text(row: dict[str, Any], expected: str) -> None:
    assert expected in error([PAIRS[0], row])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "expected messages as a list with at least one"),
        ("hello", "expected messages as a list with at least one, found 'hello'"),
        ([{"from": "human", "value": "hi"}], "message 1: expected an object with role and content"),
        ([{"role": "user", "content": 3}], "message 1: expected text as content, found 3"),
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}],
            "message 2: expected text of the assistant, found an empty completion",
        ),
    ],
)
def test_messages_that_are_none(messages: Any, expected: str) -> None:
    assert expected in error([{"messages": messages}])
