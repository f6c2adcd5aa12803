"""`limbeck serve`, from the command line to a draft that serves."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from online_server_helpers import NAME, client_of, written
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from limbeck.cli import main
from limbeck.decoding.adaptive import Adaptive
from limbeck.decoding.drafts.feature_files import feature_net, save_feature
from limbeck.decoding.drafts.ngram import NgramDraft
from limbeck.errors import CheckpointError, LimbeckError, PreflightError, RecipeError
from limbeck.models import fingerprint, hidden_and_head, load_model, vocabulary_rows
from limbeck.online.learner import Batch
from limbeck.online.server.serving import Options, _name, alone_in, assemble, parse_routes, serve
from limbeck.online.versions import Version

SOURCE = Path(__file__).resolve().parents[2] / "src"


@contextmanager
def command(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of a server, and the line that it has printed."""
    words = [sys.executable, "-m", "limbeck", "serve", "--port", "0", *arguments]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()


@pytest.fixture(scope="module")
def folder(shared: Path) -> str:
    return str(shared / "models" / NAME)


def test_command_serves_and_ends_when_interrupted(folder: str, tmp_path: Path, stories: tuple[Any, Any]) -> None:
    with command("--target", folder, "--layers", "0,1", cwd=tmp_path) as (process, line):
        found = re.fullmatch(r"limbeck serves stories260k at (http://127\.0\.0\.1:\d+) \(.*\); draft: (.*)\n", line)
        assert found, line
        assert found[2] == "layers 0, 1 of the target's 5, cold; learning, versions in runs/serve/stories260k/layers"
        answer = client_of(found[1]).completions.create(model=NAME, prompt="Once upon", max_tokens=30, temperature=0)
        assert answer.choices[0].text == written(stories, "Once upon", 30).text
        said = httpx.get(f"{found[1]}/dashboard.json").json()
        assert said["learning"] == "on" and set(said["drafts"]) == {"layers", "ngram"}
        assert said["drafts"]["layers"]["kind"] == "model" and said["drafts"]["layers"]["buffer_positions"] > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_command_ends_in_order_when_it_is_told_to(folder: str, tmp_path: Path) -> None:
    """By SIGTERM. Before that: nobody else writes where it does, and a client has its one address, whatever it says."""
    arguments = ("--target", folder, "--draft-kind", "layers", "--per-minute", "2", "--route", "own=ngram")
    with command(*arguments, cwd=tmp_path) as (process, line):
        found = re.search(r"at (http://127\.0\.0\.1:\d+) ", line)
        assert found and line.endswith("; route own: n-grams of its own requests, not learning\n"), line
        body = {"model": NAME, "prompt": "Once", "max_tokens": 2}
        answers = [
            httpx.post(f"{found[1]}/v1/completions", json=body, headers={"X-Forwarded-For": f"192.0.2.{place}"})
            for place in range(3)
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        versions = tmp_path / "runs" / "serve" / NAME / "layers"
        with pytest.raises(RecipeError, match="--out: expected .*layers to be free, found another server"):
            with alone_in(versions):
                pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    with alone_in(versions):
        pass


def test_command_explains_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["limbeck", "serve", "--target", str(tmp_path / "nothing"), "--host", "0.0.0.0"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert "--host 0.0.0.0: expected --api-key-file" in said.err


def options(folder: str, tmp_path: Path, **changes: Any) -> Options:
    return Options(folder, folder=tmp_path / "versions", **changes)


def test_serve_makes_the_draft_that_is_asked_for(folder: str, tmp_path: Path) -> None:
    made: dict[str, Any] = {}
    for name, changes in {
        "layers": {},
        "layers of": {"draft": folder, "draft_kind": "layers", "layers": [4, 0]},
        "model": {"draft": folder},
        "ngram": {"draft_kind": "ngram"},
        "still": {"learning": False},
    }.items():
        made[name] = assemble(options(folder, tmp_path, **changes), None)
    said = {name: described for name, (_, described) in made.items()}
    assert said["layers"].startswith("layers 0, 2 of the target's 5, cold; learning")
    assert said["layers of"].startswith(f"layers 4, 0 of {folder}'s 5, cold") and said["model"].startswith("the model ")
    assert said["ngram"] == "n-grams of the requests themselves, not learning"
    assert said["still"] == "layers 0, 2 of the target's 5, not learning"
    services = {name: served.service for name, (served, _) in made.items()}
    haste = {name: services[name].learning[name.split()[0]].cold for name in ("layers", "layers of", "model")}
    assert haste == {"layers": True, "layers of": True, "model": False}
    rates = [services[name].learning[name].training.learning_rate for name in ("layers", "model")]
    assert rates[0] == 10 * rates[1]
    assert [set(service.engine.drafts) for service in services.values()] == [
        {"layers", "ngram"},
        {"layers", "ngram"},
        {"model", "ngram"},
        {"ngram"},
        {"layers", "ngram"},
    ]
    assert [set(service.learning) for service in services.values()] == [{"layers"}, {"layers"}, {"model"}, set(), set()]
    assert isinstance(services["ngram"].engine.drafts["ngram"], NgramDraft)
    for name in ("layers", "ngram"):  # what a pass costs is known before the first request
        adaptive = services[name].engine.controller.inner
        assert isinstance(adaptive, Adaptive) and adaptive.verify.known.keys() == {1, 2, 4, 6, 8, 12, 16}
    served = made["layers"][0]
    assert served.context == 512 and served.stop_tokens == (1,) and served.name == NAME


def learnt(learning: Any) -> dict[str, torch.Tensor]:
    """The weights of a version 1, as if it had been learnt."""
    learner = learning.build()
    first = {name: weight.detach().clone() for name, weight in learner.trained().items()}
    learning.versions.claim(fingerprint(learner.trained()))
    learning.versions.save(Version(0, first))
    better = {name: weight + 0.25 for name, weight in first.items()}
    learning.versions.save(Version(1, better))
    return better


def test_serve_without_learning_takes_up_what_was_learnt(folder: str, tmp_path: Path) -> None:
    wanted = options(folder, tmp_path, routes={"sql": "layers"})
    own = learnt(assemble(wanted, None)[0].service.learning["sql"])
    served, described = assemble(replace(wanted, learning=False), None)
    layers, place = "layers 0, 2 of the target's 5", tmp_path / "versions" / NAME / "sql"
    assert described == f"{layers}, not learning; route sql: {layers}, version 1 of {place}, not learning"
    drafts: Any = served.service.engine.drafts
    assert (drafts["layers"].version, drafts["sql"].version) == (0, 1) and not served.service.learning
    for name, weight in drafts["sql"].reader.model.named_parameters():
        torch.testing.assert_close(weight.float(), own[name], atol=1e-2, rtol=1e-2)
    with pytest.raises(CheckpointError, match="expected versions of the draft that serves, found another's"):
        assemble(replace(wanted, learning=False, layers=[1, 2]), None)


def test_serve_bounds_the_context(folder: str, tmp_path: Path) -> None:
    """Below the model's own, never above it."""
    for context, expected in ((64, 64), (100_000, 512), (None, 512)):
        served, _ = assemble(options(folder, tmp_path, context=context), None)
        assert served.context == served.service.engine.context == expected


def test_serve_names_a_model_of_the_hub_whole(folder: str) -> None:
    assert [_name(path) for path in (folder, "Owner/Model", f"{folder}/../{NAME}/")] == [NAME, "Owner/Model", NAME]


def test_serve_takes_a_feature_draft_by_its_folder(folder: str, tmp_path: Path) -> None:
    """With int8 weights and a part of the vocabulary; what learns is the very same draft."""
    place = tmp_path / "draft"
    save_feature(feature_net(load_model(folder), seed=7), place)
    served, described = assemble(options(folder, tmp_path, draft=str(place), weights="int8", head_rows=40), None)
    assert described.startswith(f"a layer on the target's hidden states, {place}; learning")
    learning, draft = served.service.learning["feature"], served.service.engine.drafts["feature"]
    assert learning.buffer.taps and draft.ids_D is not None and len(draft.ids_D) == 40
    assert draft.head.project.packed is not None
    learner = learning.build()
    assert learner.head.size == 512
    for name, weight in draft.net.named_parameters():
        torch.testing.assert_close(weight.float(), learner.trained()[name], atol=1e-2, rtol=1e-2)


def test_serve_ignores_the_padding_of_two_vocabularies(folder: str, tmp_path: Path) -> None:
    """Heads of one family with different numbers of rows behind the tokenizer's last token."""
    torch.manual_seed(0)
    paths = {}
    for name, rows in (("target", 520), ("draft", 576)):
        shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=rows, num_hidden_layers=2, max_position_embeddings=64, **shape)
        paths[name] = str(tmp_path / name)
        LlamaForCausalLM(config).save_pretrained(paths[name])
        AutoTokenizer.from_pretrained(folder).save_pretrained(paths[name])
    served, _ = assemble(options(paths["target"], tmp_path, draft=paths["draft"], learning=False), None)
    engine = served.service.engine
    assert engine.vocabulary == 512 == engine.drafts["model"].vocabulary
    assert vocabulary_rows(engine.drafts["model"].reader.model) == 512


@pytest.mark.parametrize("kind", ["model", "layers"])
def test_what_learns_is_the_draft_that_serves(folder: str, tmp_path: Path, kind: str) -> None:
    """With weights behind the tokenizer's last token that would take most of the probability."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=520, num_hidden_layers=2, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[512:] *= 100
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "padded")
    path = str(tmp_path / "padded")
    served, _ = assemble(options(path, tmp_path, draft=path if kind == "model" else None), None)
    draft, learner = served.service.engine.drafts[kind], served.service.learning[kind].build()
    tokens_BT = torch.arange(3, 13)[None]
    made = Batch(tokens_BT, torch.ones_like(tokens_BT), torch.zeros(9, dtype=torch.long), torch.arange(1, 10), None)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        hidden_NH, head = learner.predict(made)
        hidden_BTH, own = hidden_and_head(draft.reader.model.float(), tokens_BT, torch.ones_like(tokens_BT))
    assert head.size == own.size == 512
    assert torch.allclose(hidden_NH, hidden_BTH[0, :9], rtol=0.05, atol=0.05)


def test_serve_keeps_the_drafts_weights_in_fewer_bits(folder: str, tmp_path: Path) -> None:
    served, _ = assemble(options(folder, tmp_path, weights="int8"), None)
    draft = served.service.engine.drafts["layers"]
    assert draft.head.project.packed is not None and draft.reader.weights == "int8"


def test_serve_trains_on_all_verified_positions(folder: str, tmp_path: Path) -> None:
    for chosen in ({}, {"positions": "rejected"}):
        served, _ = assemble(options(folder, tmp_path, **chosen), None)
        assert served.service.learning["layers"].buffer.keeps == chosen.get("positions", "all")


def test_serve_drafts_from_a_part_of_the_vocabulary(folder: str, tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "Once upon a time there was a little girl."}\n')
    served, _ = assemble(options(folder, tmp_path, head_rows=40, head_text=str(text)), None)
    draft = served.service.engine.drafts["layers"]
    words = served.tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    assert draft.ids_D is not None and len(draft.ids_D) == 40
    assert set(words) <= set(draft.ids_D.tolist())


def test_serve_refuses_a_draft_of_another_vocabulary(folder: str, tmp_path: Path, shared: Path) -> None:
    other = str(shared / "models" / "babyllama-105")
    with pytest.raises(PreflightError, match="expected the target's vocabulary of 512 tokens, found 105, for example"):
        assemble(options(folder, tmp_path, draft=other), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_kind": "model"}, "--draft-kind model: expected --draft"),
        ({"draft_kind": "owl"}, "--draft-kind: expected layers, model, feature or ngram, found 'owl'"),
        ({"draft": "x", "draft_kind": "ngram"}, "--draft x: expected none"),
        ({"layers": [7]}, "layers from 0 to 4"),
        ({"layers": [1], "draft_kind": "ngram"}, "--layers: expected a draft with a model"),
        ({"layers": [1], "draft_kind": "feature"}, "--layers: expected --draft-kind layers with it, found feature"),
        ({"weights": "int8", "draft_kind": "ngram"}, "--weights: expected a draft with a model"),
        ({"head_rows": 9, "draft_kind": "ngram"}, "--head-rows: expected a draft with a model"),
        ({"head_text": "x"}, "--head-text: expected --head-rows"),
        ({"weights": "int3"}, "weights: expected one of .*'int3'"),
        ({"routes": {"a/b": "ngram"}}, "--route a/b: expected letters"),
        ({"routes": {"..": "ngram"}}, "--route ..: expected letters"),
        ({"routes": {"ngram": "ngram"}}, "--route ngram: expected another name"),
        ({"routes": {"sql": "/nothing/there"}}, "/nothing/there"),
        ({"learned_routing": True}, "--learned-routing: expected --route"),
    ],
)
def test_serve_refuses_options_that_do_not_fit(
    folder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LimbeckError, match=message):
        assemble(options(folder, tmp_path, **changes), None)


def test_routes_are_read_from_the_command_line() -> None:
    assert parse_routes(["sql=runs/sql", "a.b=c=d"]) == {"sql": "runs/sql", "a.b": "c=d"}
    for texts, message in ((["sql"], "NAME=FOLDER"), (["=x"], "NAME=FOLDER"), (["a=b", "a=c"], "'a' twice")):
        with pytest.raises(RecipeError, match=message):
            parse_routes(texts)


def test_serve_refuses_addresses_before_it_loads_anything(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(RecipeError, match="expected --api-key-file for an address that other machines reach"):
            serve(Options(nothing, host=host))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(RecipeError, match="expected an address to listen at"):
            serve(Options(nothing, port=taken.getsockname()[1]))
