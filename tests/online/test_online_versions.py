"""Versions on disk: whole or not there, whatever happens while one is written."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from limbeck.errors import CheckpointError
from limbeck.models import fingerprint
from limbeck.online.versions import Version, Versions

LARGE = torch.ones(20_000, 4)  # made before any fork: a child must not need the parent's threads


def _version(number: int, large: torch.Tensor = LARGE[:8].clone()) -> Version:  # noqa: B008
    weights = {"a.weight": large, "b": torch.arange(3.0) * number}
    return Version(
        number, weights, {"b/step": torch.tensor(float(number)), "generator": torch.get_rng_state()}, {"n": 1}
    )


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    assert versions.newest() is None and versions.next() == 0
    for number in (0, 1):
        versions.save(_version(number))
    found = Versions(tmp_path).load(1)
    assert torch.equal(found.weights["b"], torch.arange(3.0)) and found.facts == {"n": 1}
    assert torch.equal(found.state["generator"], torch.get_rng_state())
    assert versions.newest() == 1 and versions.before(1) == 0 and versions.before(0) is None


def test_a_stale_version_is_never_written_over_the_newest(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    for number in (0, 1, 2):
        versions.save(_version(number))
    for stale in (1, 2):
        with pytest.raises(CheckpointError, match="it is stale"):
            versions.save(Version(stale, {"a.weight": torch.zeros(1)}))
    assert torch.equal(versions.weights(2)["b"], torch.arange(3.0) * 2)


def test_a_withdrawn_version_is_gone_and_its_number_too(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    for number in (0, 1, 2):
        versions.save(_version(number))
    versions.withdraw(2)
    assert versions.newest() == 1 and versions.next() == 3
    assert not list((tmp_path / "withdrawn-000002").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="it is stale"):
        versions.save(_version(2))


def test_the_first_and_the_newest_are_kept(tmp_path: Path) -> None:
    versions = Versions(tmp_path, kept=3)
    for number in range(8):
        versions.save(_version(number))
    assert versions.numbers() == [0, 5, 6, 7]


def test_a_torn_version_is_not_there(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    for number in (0, 1):
        versions.save(_version(number))
    weights = tmp_path / "v000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert versions.newest() == 0
    with pytest.raises(CheckpointError, match="bytes"):
        versions.load(1)


def test_another_draft_is_refused(tmp_path: Path) -> None:
    one = {"w": torch.ones(3)}
    versions = Versions(tmp_path)
    versions.claim(fingerprint(one))
    versions.claim(fingerprint({"w": torch.ones(3)}))
    with pytest.raises(CheckpointError, match="another"):
        versions.claim(fingerprint({"w": torch.ones(3) * 2}))


def _save_for_ever(folder: str) -> None:
    versions = Versions(folder)
    while True:
        versions.save(_version(versions.next(), LARGE))


def test_killed_while_saving_the_last_whole_version_is_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    torn, before = 0, -1
    for place in range(6):
        process = context.Process(target=_save_for_ever, args=(str(tmp_path),))
        process.start()
        time.sleep(0.15 + 0.017 * place)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        torn += bool(list(tmp_path.glob(".partial-*")))
        versions = Versions(tmp_path)
        newest = versions.newest()
        assert newest is not None
        found = versions.load(newest)
        assert torch.equal(found.weights["a.weight"], LARGE)
        assert torch.equal(found.weights["b"], torch.arange(3.0) * newest)
        assert newest == versions.next() - 1  # what was renamed is whole
        assert newest > before  # each child did save
        before = newest
    assert torn  # the kills did fall into saves
    versions.claim("it")
    assert not list(tmp_path.glob(".partial-*"))


def _save_without_room(folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        Versions(folder).save(_version(1, LARGE))
    except CheckpointError as error:
        os._exit(7 if "could not be written" in str(error) else 8)
    os._exit(0)


def test_no_room_leaves_what_is_there(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    versions.save(_version(0))
    process = multiprocessing.get_context("fork").Process(target=_save_without_room, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert versions.numbers() == [0] and not list(tmp_path.glob(".partial-*"))
    versions.save(_version(1))
    shutil.rmtree(tmp_path / "v000001")
