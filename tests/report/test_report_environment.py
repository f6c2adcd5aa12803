"""What a number was measured on."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limbeck.report import environment
from limbeck.report.environment import cpu_name

KEYS = "cpu cores memory_bytes python torch transformers limbeck date command commit seed dtype"


def test_every_key_is_there_and_true() -> None:
    found = environment("limbeck quickstart", 3, dtype="bfloat16")
    assert set(KEYS.split()) <= set(found)
    assert json.loads(json.dumps(found)) == found
    assert (found["command"], found["seed"], found["dtype"]) == ("limbeck quickstart", 3, "bfloat16")
    assert found["python"] == sys.version.split()[0]
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["date"])).total_seconds()) < 60
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert found["memory_bytes"] == pytest.approx(int(total.split()[1]) * 1024, rel=0.01)
    assert found["cores"] >= 1


def cpuinfo(name: str, flags: str = "fpu sse avx2 avx512f avx512_bf16") -> str:
    one = f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {name}\nflags\t\t: {flags}\n"
    return f"{one}\n{one}"


def test_a_hidden_cpu_name_is_filled_in() -> None:
    assert cpu_name(cpuinfo("AMD EPYC")) == "AMD EPYC (family 25 model 17, avx512_bf16, avx512f, avx2)"
    assert cpu_name(cpuinfo("Intel(R) Xeon(R) CPU @ 2.80GHz", "amx_bf16 x")).endswith("(family 25 model 17, amx_bf16)")
    assert cpu_name(cpuinfo("AMD EPYC 7763 64-Core Processor")) == "AMD EPYC 7763 64-Core Processor"
    assert cpu_name("") != ""


def test_commit_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment("c", 0)["commit"] is None
    git("init")
    assert environment("c", 0)["commit"] is None
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    assert environment("c", 0)["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert environment("c", 0)["commit"] == git("rev-parse", "HEAD") + "-dirty"
