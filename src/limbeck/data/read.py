"""Rows from files, folders, hub data sets and weighted mixtures, with normalised keys.

A normalised row has the keys of one kind, and its other columns as they were:

    prompt + completion      text, text (the prompt may be empty)
    messages                 [{"role": ..., "content": ...}, ...]
    prompt                   text: only methods that write the completion themselves can use it
    text                     text
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from limbeck.data.generated import PREFIX, gym_rows
from limbeck.errors import DataError, did_you_mean

LOG = logging.getLogger(__name__)
KEYS = ("messages", "prompt", "completion", "text")
# Known sets of columns, first match wins; "input" is joined to the prompt by a blank line, where it is not empty.
LAYOUTS: tuple[dict[str, str], ...] = (
    {"messages": "messages"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "instruction", "input": "input", "completion": "output"},
    {"prompt": "instruction", "completion": "output"},
    {"prompt": "instruction", "input": "context", "completion": "response"},
    {"prompt": "question", "completion": "answer"},
    {"prompt": "prompt"},
    {"text": "text"},
)
EXPECTED = "prompt + completion, messages, prompt, text, instruction + output or question + answer"


def read(source: Any, *, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The rows of `source`, normalised (see the module's first lines).

    source: a .jsonl, .json (a list), .parquet or .txt file (one row a paragraph; blank lines separate paragraphs); a
    folder or a hub id that `datasets` can load (`name`, `name:split`, `name:config:split`; split `train` unless given);
    a `datasets.Dataset`; a list of rows; `embedded:SPLIT:COUNT`;
    `reasoning_gym:NAME:COUNT` (see `gym_rows`); or a weighted mixture
    `[{"path": source, "weight": 2, "columns": {...}}, ...]` (see `mixture_counts`; weight 1 unless given).
    columns: from `prompt`, `input`, `completion`, `messages`, `text` to the names in the file. Without it the layouts
    in LAYOUTS are recognised. A conversational prompt (and completion), a list of messages, becomes `messages`.

    A list of texts as completion holds several right ones: the first is the completion, all are `references`.
    A column keeps its name and value beside the normalised ones, except where it bears the name of a normalised key
    that is not its own (`text` mapped in a file that has a column `prompt` too): that one is left out.
    Raises DataError: no such file, broken JSON, no known columns, kinds mixed in one file, a value that is empty or not
    text.
    """
    if _is_mixture(source):
        return _read_mixture(source, columns)
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    return _normalise(name, _load(source), columns)


def mixture_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows each source gives to a mixture of `sizes` rows with `weights`.

    The mixture is the smallest in which every row of every source stands at least once: T = max(size / share) rows,
    rounded up. The source that is largest for its share is used once, the others repeat. Counts differ from
    share * T by less than one row (largest remainders).
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = max(-(-size // share) for size, share in zip(sizes, shares, strict=True))
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i] * total, i))
    for i in by_remainder[: int(total) - sum(counts)]:
        counts[i] += 1
    return counts


def _is_mixture(source: Any) -> bool:
    if not isinstance(source, list | tuple) or not source:
        return False
    return all(isinstance(part, Mapping) and "path" in part for part in source) and not any(
        set(part) & {*KEYS, "instruction", "question"} for part in source
    )


def _read_mixture(parts: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None) -> list[dict[str, Any]]:
    for part in parts:
        if unknown := sorted(set(part) - {"path", "weight", "columns"}):
            raise DataError(f"a part of a mixture has the keys path, weight, columns; found {', '.join(unknown)}")
        weight = part.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise DataError(f"{part['path']}: expected a weight above 0, found {weight!r}")
    sources = [read(part["path"], columns=part.get("columns", columns)) for part in parts]
    sizes = [len(rows) for rows in sources]
    counts = mixture_counts(sizes, [part.get("weight", 1) for part in parts])
    for part, size, count in zip(parts, sizes, counts, strict=True):
        share, path = count / sum(counts), part["path"]
        LOG.info("%s: %d rows, used %.2f times: %d rows, %.1f %%", path, size, count / size, count, 100 * share)
    # Spread each source evenly over the mixture, so that every stretch of it has about the same shares.
    places = [((2 * j + 1) / (2 * count), i, j) for i, count in enumerate(counts) for j in range(count)]
    return [sources[i][_nth(j, sizes[i], counts[i])] for _, i, j in sorted(places)]


def _nth(j: int, size: int, count: int) -> int:
    """The row at place j of `count` places: whole passes first, then a last one over evenly spaced rows."""
    whole, rest = divmod(count, size)
    return j % size if j < whole * size else (j - whole * size) * size // rest


def _load(source: Any) -> Iterator[tuple[str, Any]]:
    """(where it stands, raw row) for every row of one source."""
    if isinstance(source, str) and source.startswith(PREFIX):
        return _numbered(gym_rows(source), f"{source}, row")
    if isinstance(source, Path) or (isinstance(source, str) and not source.startswith("embedded:")):
        return _load_path(str(source))
    if isinstance(source, str):
        return _load_embedded(source)
    if isinstance(source, list | tuple):
        return _numbered(source, "row")
    from datasets import Dataset, DatasetDict

    if isinstance(source, DatasetDict):
        raise DataError(
            f"expected one split of a data set, found all of them: choose one of {', '.join(map(str, source))}"
        )
    if not isinstance(source, Dataset):
        raise DataError(
            "expected a path, a hub id, a Dataset, a list of rows or of {path, weight, columns}, "
            f"found {type(source).__name__}"
        )
    return _numbered(source, "row")


def _numbered(rows: Any, what: str) -> Iterator[tuple[str, Any]]:
    return ((f"{what} {number}", row) for number, row in enumerate(rows, 1))


def _load_embedded(source: str) -> Iterator[tuple[str, Any]]:
    from limbeck.data import embedded

    _, split, count, *rest = [*source.split(":"), "", ""]
    if not split or not count.isdecimal() or int(count) == 0 or any(rest):
        raise DataError(f"expected embedded:SPLIT:COUNT, such as embedded:train:3000, found {source}")
    return _numbered(embedded.rows(split, int(count)), f"{source}, row")


def _load_path(source: str) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if path.is_dir():
        return _load_dataset(source)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise DataError(f"{source}: expected a file ending in {', '.join(FORMATS)}, found {path.suffix or 'none'}")
        return FORMATS[path.suffix](source)
    # A hub id has at most one slash; one whose first half is a folder here is a mistyped path, not an id.
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:/]+){0,2}", source) and path.suffix not in FORMATS
    if is_id and (path.parent == Path() or not path.parent.is_dir()):
        return _load_dataset(source)
    raise DataError(f"{source}: no such file{_neighbours(path)}")


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    return did_you_mean(path, path.parent.iterdir())


def _load_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    # Lines end at \n alone: str.splitlines would also cut at the U+2028 that JSON strings may hold.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: expected a JSON object, found broken JSON ({error.msg}, "
                    f"column {error.colno}): correct the line or take it out"
                ) from None


def _load_json(path: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_text(path))
    except json.JSONDecodeError as error:
        hint = ": name the file .jsonl if it has one object a line" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: expected a list of objects, found broken JSON ({error.msg}){hint}"
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {type(rows).__name__}")
    return _numbered(rows, f"{path}, row")


def _load_parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path}: expected a Parquet file, found something else ({str(error).splitlines()[0]})"
        ) from None
    return _numbered(rows, f"{path}, row")


def _load_txt(path: str) -> Iterator[tuple[str, Any]]:
    paragraphs = (paragraph.strip("\n") for paragraph in re.split(r"\n(?:[ \t]*\n)+", _text(path)))
    return _numbered([{"text": paragraph} for paragraph in paragraphs if paragraph.strip()], f"{path}, paragraph")


FORMATS = {".jsonl": _load_jsonl, ".json": _load_json, ".parquet": _load_parquet, ".txt": _load_txt}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, found byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def _load_dataset(source: str) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    if Path(source).is_dir():
        name, config, split = source, None, "train"
    else:
        name, *rest = source.split(":")
        config, split = rest if len(rest) == 2 else (None, *(rest or ["train"]))
    try:
        if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(name, config, split=split)
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source}: expected a file, a folder or a hub data set with a split {split}, found another: {reason}"
            f"{_neighbours(Path(source))}"
        ) from None
    return _numbered(found, f"{source}, row")


def _normalise(name: str, rows: Iterator[tuple[str, Any]], columns: Mapping[str, str] | None) -> list[dict[str, Any]]:
    if columns is not None and (unknown := sorted(set(columns) - {*KEYS, "input"})):
        raise DataError(f"columns: expected {', '.join((*KEYS, 'input'))} as keys, found {', '.join(unknown)}")
    normalised: list[dict[str, Any]] = []
    first = ""
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with named columns, found {type(row).__name__}")
        found = _normalise_row(where, dict(row), columns)
        normalised.append(found)
        first = first or where
        if kind_of(found) != kind_of(normalised[0]):
            raise DataError(
                f"{where}: expected {kind_of(normalised[0])} as in {first}, found {kind_of(found)}: "
                "put each kind in its own file"
            )
    if not normalised:
        raise DataError(f"{name}: expected at least one row, found none")
    return normalised


def kind_of(row: Mapping[str, Any]) -> str:
    """`messages`, `prompt + completion`, `prompt` or `text`: the kind of a normalised row."""
    if "messages" in row:
        return "messages"
    if "prompt" in row:
        return "prompt + completion" if "completion" in row else "prompt"
    if "text" in row:
        return "text"
    raise DataError(
        f"expected a row with {EXPECTED}, found {', '.join(map(str, row)) or 'nothing'}: read it with columns"
    )


def _normalise_row(where: str, row: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    layout = _layout(where, row, columns)
    values: dict[str, Any] = {key: row[column] for key, column in layout.items()}
    if isinstance(values.get("prompt"), list):
        completion = values.get("completion", [])
        if not isinstance(completion, list):
            raise DataError(
                f"{where}: prompt is a list of messages, so expected completion as one, found {completion!r:.40}"
            )
        values = {"messages": [*values["prompt"], *completion]}
    if "messages" in values:
        _check_messages(where, values["messages"])
    elif isinstance(several := values.get("completion"), list) and several:
        row = {"references": several, **row}
        values["completion"] = several[0]
    for key in set(values) - {"messages"}:
        _check_text(where, key, layout[key], values[key])
    if extra := values.pop("input", None):
        values["prompt"] = f"{values['prompt']}\n\n{extra}"
    others = {key: value for key, value in row.items() if key not in KEYS or key in values}
    return {**others, **values}


def _layout(where: str, row: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, str]:
    """From normalised keys to the row's columns."""
    if columns is None:
        for layout in LAYOUTS:
            if all(column in row for column in layout.values()):
                return layout
        raise DataError(
            f"{where}: expected {EXPECTED}, found {', '.join(map(str, row)) or 'nothing'}: name them in columns"
        )
    for column in columns.values():
        if column not in row:
            hint = did_you_mean(column, row)
            raise DataError(f"{where}: expected a column {column}, found {', '.join(map(str, row)) or 'nothing'}{hint}")
    # A file may need only one of the two renamed.
    halves = {key: key for key in ("prompt", "completion") if key in row}
    layout = {**halves, **columns} if {"prompt", "completion"} & set(columns) else dict(columns)
    if "prompt" not in layout and {"completion", "input"} & set(layout):
        raise DataError(f"{where}: columns names no prompt, and the row has none: found {', '.join(map(str, row))}")
    return layout


def _check_text(where: str, key: str, column: str, value: Any) -> None:
    name = key if key == column else f"{key} (column {column})"
    if value is None and key == "input":
        return
    if not isinstance(value, str) and value is not None:
        raise DataError(f"{where}: expected text as {name}, found {type(value).__name__} {value!r:.40}")
    if value is None or (key in ("completion", "text") and not value.strip()):
        raise DataError(f"{where}: expected text as {name}, found an empty {key}: fill it or take the row out")


def _check_messages(where: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected messages as a list with at least one, found {messages!r:.40}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}, message {number}: expected an object with role and content, found {message!r:.60}"
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(f"{where}, message {number}: expected text as content, found {content!r:.40}")
        if message["role"] == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
            raise DataError(f"{where}, message {number}: expected text of the assistant, found an empty completion")
