"""The embedded task: its problems (arithmetic read back from the text), its tokenizer, its teacher."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.data.embedded import TEACHER, problems, rows, tokenizer
from limbeck.decoding import Sampling, generate
from limbeck.errors import DataError

SPLITS = ("train", "eval", "test")
COUNT = 1500
STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return {split: rows(split, COUNT) for split in SPLITS}


def chain(row: dict[str, str]) -> tuple[tuple[int, int, str, int], ...]:
    """The calculations of the worked steps; operands of + and * in ascending order, as their order is free."""
    steps: list[tuple[int, int, str, int]] = []
    for left, operator, right, result in STEP.findall(row["completion"]):
        pair = (int(left), int(right)) if operator == "-" else tuple(sorted((int(left), int(right))))
        steps.append((pair[0], pair[1], operator, int(result)))
    return tuple(steps)


def test_embedded_splits_share_no_problem_and_no_calculation(splits: dict[str, list[dict[str, str]]]) -> None:
    prompts = [row["prompt"] for split in SPLITS for row in splits[split]]
    assert len(set(prompts)) == len(prompts) == 3 * COUNT
    calculations = {split: {chain(row) for row in splits[split]} for split in SPLITS}
    assert not calculations["train"] & calculations["eval"]
    assert not calculations["train"] & calculations["test"]
    assert not calculations["eval"] & calculations["test"]
    assert min(map(len, calculations.values())) > 0.9 * COUNT, "the problems repeat each other"


def test_embedded_rows_are_the_same_in_every_process_and_a_prefix_of_more(
    splits: dict[str, list[dict[str, str]]],
) -> None:
    code = "import json; from limbeck.data.embedded.problems import rows; print(json.dumps(rows('test', 40)))"
    env = {"PYTHONPATH": str(Path(problems.__file__).parents[3]), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == splits["test"][:40]


def test_embedded_unknown_split() -> None:
    with pytest.raises(DataError, match="expected a split among train, eval, test, found 'dev'"):
        rows("dev", 3)


def test_embedded_worked_steps_are_right(splits: dict[str, list[dict[str, str]]]) -> None:
    """Every step computes, starts from values that are known by then, and the last result is the answer."""
    lengths: set[int] = set()
    for row in [row for split in SPLITS for row in splits[split]]:
        steps = STEP.findall(row["completion"])
        lengths.add(len(steps))
        known = {int(number) for number in re.findall(r"\d+", row["prompt"])}
        result = -1
        for position, (left, operator, right, written) in enumerate(steps):
            operands = (int(left), int(right))
            result = {"+": sum(operands), "-": operands[0] - operands[1], "*": operands[0] * operands[1]}[operator]
            assert result == int(written) and 1 <= result <= 99, row
            assert set(operands) <= known, row
            assert position == 0 or int(steps[position - 1][3]) in operands, row
            known.add(result)
        assert row["answer"] == str(result), row
        assert row["completion"].endswith(f". Answer: {result}"), row
        rest = re.sub(r"( Then| Next| So)(?= )", "", STEP.sub("", row["completion"]))
        assert rest.split() == ["Answer:", row["answer"]], row
    assert lengths == {2, 3, 4}


@pytest.mark.parametrize(
    ("sentence", "operator"),
    [
        (text, operator)
        for table in (problems.CHANGES, problems.COMPARISONS)
        for operator in table
        for text in table[operator]
    ],
)
def test_embedded_sentences_tell_their_operator(sentence: str, operator: str) -> None:
    """Read by a person's words, not by the table: an addition names more, a subtraction less, a product times."""
    words = {
        "+": r"more|finds|buys|\{b\} gives|from \{b\}\.$|added",
        "-": r"fewer|loses|lost|sells|\{a\} gives|takes \{n\} \{o\} from \{a\}",
        "*": r"times|each of them",
    }
    said = {name for name, pattern in words.items() if re.search(pattern, sentence)}
    assert operator in said
    assert len(said) == 1 or sentence == "{b} takes {n} {o} from {a}."


def test_embedded_prompts_name_who_and_what_they_ask_about(splits: dict[str, list[dict[str, str]]]) -> None:
    names, things = set(problems.NAMES), set(problems.THINGS)
    for row in splits["train"]:
        *told, question = re.split(r"(?<=\.) ", row["prompt"])
        assert question.endswith("?\n") and not row["prompt"].count("?") > 1
        words = set(re.findall(r"[A-Za-z]+", question))
        before = set(re.findall(r"[A-Za-z]+", " ".join(told)))
        assert words & names <= before, row
        assert words & things <= before, row
        assert 2 <= len(told) <= 6


def test_embedded_tokenizer_round_trip_and_lengths(splits: dict[str, list[dict[str, str]]], tmp_path: Path) -> None:
    built = tokenizer()
    built.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(built) < 300
    special = [built.pad_token_id, built.bos_token_id, built.eos_token_id, built.unk_token_id]
    assert None not in special and len(set(special)) == 4
    prompt_lengths: list[int] = []
    completion_lengths: list[int] = []
    for row in [row for split in SPLITS for row in splits[split]]:
        prompt = built(row["prompt"]).input_ids
        completion = built(row["completion"], add_special_tokens=False).input_ids
        both = row["prompt"] + row["completion"]
        assert prompt[0] == built.bos_token_id and not set(special) & {*prompt[1:], *completion}
        assert built.decode(prompt[1:]) == row["prompt"] and built.decode(completion) == row["completion"]
        assert built(both).input_ids == prompt + completion == loaded(both).input_ids
        assert loaded.decode([*prompt, *completion, built.eos_token_id], skip_special_tokens=True) == both
        prompt_lengths.append(len(prompt))
        completion_lengths.append(len(completion) + 1)
    assert 35 <= sum(prompt_lengths) / len(prompt_lengths) <= 50 and max(prompt_lengths) <= 72
    assert 25 <= sum(completion_lengths) / len(completion_lengths) <= 35 and max(completion_lengths) <= 48


def test_embedded_tokenizer_gives_each_digit_a_token_and_marks_foreign_words() -> None:
    built = tokenizer()
    assert [built.decode([token]) for token in built("12 + 345.", add_special_tokens=False).input_ids] == [
        *("1", "2", " +", " 3", "4", "5", ".")
    ]
    foreign = built("Ada has 3 zeppelins.", add_special_tokens=False).input_ids
    assert foreign.count(built.unk_token_id) == 1 and len(foreign) == 5
    assert built.get_vocab() == tokenizer().get_vocab()


def test_embedded_teacher_is_small_and_loads() -> None:
    files = list(TEACHER.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {f.name for f in files}
    assert sum(file.stat().st_size for file in files) <= 4 * 1024 * 1024
    model = AutoModelForCausalLM.from_pretrained(TEACHER)
    stored = AutoTokenizer.from_pretrained(TEACHER)
    assert 0.5e6 <= model.num_parameters() <= 0.9e6
    assert stored.get_vocab() == tokenizer().get_vocab(), "the problems changed: limbeck quickstart --rebuild-teacher"
    assert model.config.vocab_size == len(stored)
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert ids == (stored.bos_token_id, stored.eos_token_id, stored.pad_token_id)


def test_embedded_teacher_solves_problems_it_never_saw() -> None:
    """A floor, not the claim: a teacher of other templates, another vocabulary or another tokenizer falls far below."""
    model, stored = AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    asked = rows("test", 200)
    prompts = stored([row["prompt"] for row in asked]).input_ids
    sampling = Sampling(max_tokens=64, temperature=0.0, stop_tokens=(stored.eos_token_id,))
    written = [stored.decode(c.tokens, skip_special_tokens=True) for c in generate(model, prompts, sampling)]
    right = sum(text.endswith(f" Answer: {row['answer']}") for text, row in zip(written, asked, strict=True))
    assert right >= 0.8 * len(asked)
