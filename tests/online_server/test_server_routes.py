"""Several drafts behind one server: each is asked for by name, drafts for its requests, and learns from them alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from online_server_helpers import NAME, client_of, listening, scraped, wait_for, written

from limbeck.models import cut_layers, load_model, load_tokenizer
from limbeck.online.server import create_app
from limbeck.online.server.serving import Options, assemble

PROMPT = "Once upon a time"


@pytest.fixture
def options(shared: Path, tmp_path: Path) -> Options:
    """Two layers of the target as the main draft; two others, from a folder of their own, for `sql`."""
    target, place = shared / "models" / NAME, tmp_path / "small"
    cut_layers(load_model(target), [0, 4]).save_pretrained(place)
    load_tokenizer(target).save_pretrained(place)
    routes = {"sql": str(place), "again": "ngram"}
    return Options(str(target), folder=tmp_path / "versions", gamma=3, weights="int8", head_rows=300, routes=routes)


def test_each_request_teaches_its_own_draft(options: Options, stories: tuple[Any, Any]) -> None:
    served, described = assemble(options, None)
    place = options.folder / NAME
    assert described.endswith(f"in {place / 'sql'}; route again: n-grams of its own requests, not learning")
    drafts: Any = served.service.engine.drafts
    for name in ("layers", "sql"):
        assert drafts[name].reader.weights == "int8" and len(drafts[name].ids_D) == 300
    names = ("layers", "sql", "again")
    with served.service, listening(create_app(served)) as address:
        client = client_of(address)

        def ask(prompt: str = PROMPT, **more: Any) -> list[list[float]]:
            """By draft: positions at which its tokens were judged, and positions to train on."""
            answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=40, temperature=0, **more)
            assert answer.choices[0].text == written(stories, prompt, 40).text
            found = scraped(address)
            keys = ("limbeck:verified_positions_total", "limbeck:buffer_positions")
            return [[found.get(f"{key}:draft={name}", -1.0) for name in names] for key in keys]

        verified, kept = ask(extra_body={"route": "sql"})
        assert verified[1] > 0 and verified[0] == 0 and kept[1] > 0 and kept == [0, kept[1], -1]
        before = kept[1]
        verified, kept = ask()
        assert verified[0] > 0 and kept[0] > 0 and kept[1] == before
        before = kept[0]
        verified, kept = ask(extra_headers={"X-Limbeck-Route": "again"})
        assert kept == [before, kept[1], -1]
        with pytest.raises(openai.BadRequestError, match="route of a draft .layers, sql, again, ngram."):
            ask(extra_body={"route": "nobody"})

        for name in ("Lily", "Tom", "Ben", "Sue", "Max", "Mia"):  # some are held out, some are trained on
            verified, kept = ask(f"One day, {name} saw", extra_body={"route": "sql"})
        assert kept[0] == before
        headers = {"X-Limbeck-Dashboard": "1"}
        assert httpx.post(f"{address}/dashboard/update?draft=sql", headers=headers).status_code == 200
        wait_for(lambda: scraped(address)["limbeck:draft_updates_total:draft=sql"] == 1, 60)
        assert scraped(address)["limbeck:draft_updates_total:draft=layers"] == 0
    assert (place / "sql" / "v000000").is_dir()


def test_requests_that_name_no_draft_get_the_fastest(options: Options) -> None:
    served, _ = assemble(replace(options, learned_routing=True, gamma=None), None)
    routing = served.service.routing
    assert list(routing.drafts) == ["layers", "sql", "again"] and routing.main == "layers"
    for draft, seconds in (("layers", 10.0), ("sql", 1e-6), ("again", 10.0)):
        routing.record(None, draft, 10, seconds)
    with served.service as service, listening(create_app(served)) as address:
        client_of(address).completions.create(model=NAME, prompt=PROMPT, max_tokens=40, temperature=0)
        buffers = {name: learning.buffer.numbers()["buffer_positions"] for name, learning in service.learning.items()}
        assert buffers["sql"] > 0 and buffers["layers"] == 0
        client_of(address).completions.create(model=NAME, prompt=PROMPT, max_tokens=40, extra_body={"route": "layers"})
        assert service.learning["layers"].buffer.numbers()["buffer_positions"] > 0
