"""What holds of the repository as a whole: lists that name real things, sizes, imports, the wheel."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import mutate
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import limbeck
from limbeck.cli import app
from limbeck.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "limbeck"
PYTHON_FILES = sorted(
    path
    for folder in ("src", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if ".venv" not in path.relative_to(ROOT).parts  # benchmarks/.venv: the peers
)
RECIPES = sorted((PACKAGE / "recipes").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("fastapi", "gguf", "matplotlib", "tensorboard", "trackio", "uvicorn", "vllm", "wandb")

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70


# Mutations


def names_of_tests(path: Path) -> set[str]:
    """`name` and `Class::name` of every test function in a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + item.name for item in inner if isinstance(item, ast.FunctionDef)}
    return found


def test_every_mutation_applies_and_names_a_test() -> None:
    mutations = mutate.load()
    problems: list[str] = []
    for mutation in mutations:
        file, _, name = mutation.test.partition("::")
        if (problem := mutation.problem(ROOT)) is not None:
            problems.append(f"{mutation.title}: {problem}")
        if not (ROOT / file).is_file() or name.partition("[")[0] not in names_of_tests(ROOT / file):
            problems.append(f"{mutation.title}: no test {mutation.test}")
    assert not problems, "\n".join(problems)
    assert len(mutations) >= 40


@pytest.mark.slow
def test_the_mutation_runner_tells_killed_survived_and_broken_apart(tmp_path: Path) -> None:
    copy = tmp_path / "main"
    copy.mkdir()
    (copy / "code_under_test.py").write_text("def double(x):\n    return 2 * x\n")
    (copy / "test_code.py").write_text(
        "import time\nimport pytest\nfrom code_under_test import double\n\n"
        "def test_value():\n    assert double(3) == 6\n\n"
        "def test_weak():\n    assert double(0) == 0\n\n"
        "@pytest.mark.skip\ndef test_skipped():\n    assert double(3) == 6\n\n"
        "def test_slow():\n    time.sleep(60)\n"
    )
    runner = mutate.Runner(copy)

    def outcome(text: str, replacement: str, test: str) -> str:
        mutation = mutate.Mutation("code_under_test.py", text, replacement, f"test_code.py::{test}")
        return mutate.judge(mutation, runner).outcome

    assert outcome("2 * x", "3 * x", "test_value") == "killed"
    assert outcome("2 * x", "3 * x", "test_weak") == "SURVIVED"
    assert outcome("2 * x", "3 * x", "test_skipped") == "BROKEN"
    assert outcome("2 * x", "2 *", "test_value") == "BROKEN"
    assert outcome("2 * x", "3 * x", "test_absent") == "BROKEN"
    assert runner.run(["test_code.py::test_slow"], limit=3)[0] is None
    assert outcome("2 * x", "3 * x", "test_value") == "killed"
    runner.end()
    assert (copy / "code_under_test.py").read_text().endswith("2 * x\n")
    twice = mutate.Mutation("code_under_test.py", "x", "y", "test_code.py::test_value")
    assert twice.problem(copy) == "expected the text once in code_under_test.py, found it 2 times"


# Documents and lists


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_packaged_recipe_is_valid(path: Path) -> None:
    assert Recipe.load(path).method == yaml.safe_load(path.read_text())["method"]


def test_there_are_packaged_recipes() -> None:
    assert {"stories", "qwen-cut", "gemma-cut"} <= {path.stem for path in RECIPES}


def code_blocks(document: str, language: str) -> Iterator[str]:
    for block in re.finditer(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE):
        yield block[1]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_the_documents_exist(document: str) -> None:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    lines = [line.partition("#")[0].strip() for block in code_blocks(document, "[a-z]*") for line in block.splitlines()]
    for line in lines:
        words = line.removeprefix("$ ").removeprefix(".venv/bin/").split()
        if words[:1] == ["limbeck"]:
            assert words[1] in commands, line
            known = {option for parameter in commands[words[1]].params for option in parameter.opts}
            unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known
            assert not unknown, f"{line}: no option {unknown}"
            seen += 1
        elif words[:1] == ["make"]:
            assert words[1] in targets, line
            seen += 1
    assert seen


def test_yaml_and_python_of_the_readme_are_valid() -> None:
    recipes = [
        settings for block in code_blocks("README.md", "yaml") if "method" in (settings := yaml.safe_load(block))
    ]
    assert recipes
    for settings in recipes:
        assert Recipe.parse(settings).method == settings["method"]
    programs = list(code_blocks("README.md", "python"))
    assert programs
    for node in (node for program in programs for node in ast.walk(ast.parse(program))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "limbeck":
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "limbeck":
            assert hasattr(limbeck, node.attr), node.attr


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", document.read_text())
        local = [link for pair in links for link in pair if link and "://" not in link]
        assert not [link for link in local if not (document.parent / link).exists()], document.name


def test_version_is_the_newest_in_the_changelog() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == limbeck.__version__


def test_every_requirement_is_pinned_inside_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    assert not [pin for pin in pins.values() if not re.fullmatch(r"[0-9][0-9.]*(\.?post[0-9]+)?", pin)]
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    wanted = [Requirement(text) for text in PROJECT["dependencies"] + extras["dev"]]
    inner = [text for item in wanted if item.name == "limbeck" for extra in item.extras for text in extras[extra]]
    wanted = [item for item in wanted if item.name != "limbeck"] + [Requirement(text) for text in inner]
    missing = [str(item) for item in wanted if not item.specifier.contains(pins.get(canonicalize_name(item.name), "0"))]
    assert not missing, f"not in constraints.txt, or outside the range: {missing}"


# Style


def test_files_and_functions_are_short_and_done() -> None:
    problems: list[str] = []
    for path in PYTHON_FILES:
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            problems.append(f"{name}: {lines} lines, at most {MAX_FILE_LINES}")
        if re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", text):
            problems.append(f"{name}: something is left to do")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(f"{name}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    assert PYTHON_FILES
    assert not problems, "\n".join(problems)


# Imports


def test_everything_exported_exists() -> None:
    packages = [path.parent for path in PACKAGE.rglob("__init__.py")]
    names = [".".join(path.relative_to(PACKAGE.parent).parts) for path in packages]
    for module in map(importlib.import_module, names):
        exported = getattr(module, "__all__", [])
        assert len(exported) == len(set(exported)), module.__name__
        assert not [name for name in exported if not hasattr(module, name)], module.__name__
    assert {"__version__", "Recipe", "distill"} <= set(limbeck.__all__)


def test_heavy_extras_are_imported_where_used() -> None:
    program = f"import limbeck, limbeck.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new virtual environment with the wheel in it; its dependencies come by `outside`."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install"]
    done = subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "bin"


def outside() -> dict[str, str]:
    """An environment that sees this one's libraries, but not this checkout (its .pth file is not read)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VIRTUAL_ENV")}
    return environment | {"PYTHONPATH": sysconfig.get_path("purelib")}


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    tracked = {
        str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not tracked - held
    assert not [name for name in held if not name.startswith(("limbeck/", f"limbeck-{limbeck.__version__}.dist-info/"))]
    for kind in (".yaml", ".safetensors", ".j2", ".css", "py.typed"):
        assert any(name.endswith(kind) for name in held), kind


@pytest.mark.slow
def test_installed_wheel_finds_its_recipes_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    program = (
        "import limbeck, pathlib; from limbeck.settings import PACKAGED; print(limbeck.__file__);"
        "print(*sorted(limbeck.Recipe.load(path.stem).method for path in PACKAGED.glob('*.yaml')))"
    )
    command = [str(installed / "python"), "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place, methods = done.stdout.splitlines()
    assert Path(place).is_relative_to(installed.parent)
    assert methods.split() == sorted(Recipe.load(path).method for path in RECIPES)


@pytest.mark.slow
def test_installed_wheel_runs_quickstart_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "limbeck"), "quickstart", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "out" / "results.csv").is_file()
