"""`limbeck serve`: a target, a draft that learns beside it, and the server around both."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from torch import Tensor

from limbeck.decoding.adaptive import Adaptive
from limbeck.decoding.controller import Fixed
from limbeck.decoding.drafts import Draft
from limbeck.decoding.drafts.feature import FeatureDraft
from limbeck.decoding.drafts.feature_files import FEATURE, feature_net, is_feature
from limbeck.decoding.drafts.layers import every_other, layers_draft
from limbeck.decoding.drafts.model import ModelDraft
from limbeck.decoding.drafts.ngram import NgramDraft
from limbeck.decoding.speculative import Engine
from limbeck.errors import PreflightError, RecipeError
from limbeck.models import cast, eos_tokens, load_model, load_tokenizer, probe_autocast, set_vocabulary
from limbeck.online.buffer import Buffer, Positions
from limbeck.online.feature_learner import feature_learner
from limbeck.online.learner import model_learner
from limbeck.online.learning import Learning
from limbeck.online.server.app import Served, create_app
from limbeck.online.server.limits import Keys, Limits, loopback
from limbeck.online.service import Service
from limbeck.online.updater import Build
from limbeck.online.vocabulary import likely_tokens

NGRAM = "ngram"


@dataclass(frozen=True)
class Options:
    """Of `limbeck serve`. draft: a folder, of a model or of a feature draft. draft_kind: `model` or `feature` (the
    defaults for such folders; without one a feature draft is fresh), `layers` cut from a model or else from the target
    (the default), or `ngram` alone. layers: which; by default every other one of the first. weights: of the draft's
    model, `own` or `int8` (on a CPU). head_rows: tokens that it may draft beside a request's own (None: all),
    head_text: a file whose texts say which. gamma: drafted tokens a round; None: as many as pay. folder: where the
    draft's versions are kept."""

    target: str
    draft: str | None = None
    draft_kind: str | None = None
    layers: Sequence[int] | None = None
    weights: str = "own"
    head_rows: int | None = None
    head_text: str | None = None
    positions: Positions = "all"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    learning: bool = True
    folder: Path = Path("runs/serve")
    name: str | None = None
    max_batch: int = 16
    gamma: int | None = None
    stream_tokens: int = 1
    limits: Limits = Limits()


@dataclass(frozen=True)
class Made:
    """A draft, how its learner is made (None: it learns nothing), and what it is, in words."""

    draft: Draft
    build: Build | None
    described: str


def serve(options: Options, say: Any = print) -> None:
    """Serves until it is interrupted; `say` is given one line once it listens. RecipeError for options that do not fit
    together or a port that is taken, PreflightError for a draft of another vocabulary."""
    keys = Keys.read(options.api_key_file) if options.api_key_file is not None else None
    if keys is None and not loopback(options.host):
        raise RecipeError(
            f"--host {options.host}: expected --api-key-file for an address that other machines reach, found none: "
            "give a file with a key a line, or serve 127.0.0.1"
        )
    listener = _listen(options.host, options.port)
    with listener:
        served, described = assemble(options, keys)
        config = uvicorn.Config(
            create_app(served), log_level=logging.WARNING, timeout_graceful_shutdown=10, access_log=False
        )
        host, port = listener.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with served.service:
            say(f"limbeck serves {served.name} at {where} (API under /v1, dashboard at /); draft: {described}")
            with suppress(KeyboardInterrupt):  # uvicorn has ended in order by then
                uvicorn.Server(config).run(sockets=[listener])


def assemble(options: Options, keys: Keys | None) -> tuple[Served, str]:
    """What is served, not yet started, and the draft in words."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, tokenizer = load_model(options.target, device=device), load_tokenizer(options.target)
    dtype, _ = probe_autocast(device, target.config.get_text_config().hidden_size)
    if dtype is not None:
        target = cast(target, dtype)
    set_vocabulary(target, _vocabulary(tokenizer))
    name = options.name or Path(options.target).resolve().name
    kind = options.draft_kind or _kind(options.draft)
    made = make_draft(options, kind, target, tokenizer)
    drafts: dict[str, Draft] = {kind: made.draft}
    shared = made.draft if isinstance(made.draft, NgramDraft) else NgramDraft()
    drafts[NGRAM] = shared
    main = None if kind == NGRAM else kind
    adaptive = Adaptive(main, ngram=(NGRAM, shared))
    controller = adaptive if options.gamma is None else Fixed(kind, options.gamma)
    engine = Engine(target, tokenizer, drafts, controller, max_batch=options.max_batch)
    if controller is adaptive:
        engine.probe()
    learning: dict[str, Learning] = {}
    described = made.described
    if options.learning and made.build is not None:
        folder = options.folder / name / kind
        buffer = Buffer(positions=options.positions, taps=bool(made.draft.taps))
        learning[kind] = Learning(made.draft, made.build, folder, buffer)
        newest = learning[kind].versions.newest()
        described += f", version {newest} of {folder}" if newest else f", cold; learning, versions in {folder}"
    else:
        described += ", not learning"
    context = engine.reader.limit
    stops = eos_tokens(target, tokenizer)
    service = Service(engine, learning=learning)
    served = Served(service, tokenizer, name, context, stops, options.limits, keys, options.stream_tokens)
    return served, described


def make_draft(options: Options, kind: str, target: Any, tokenizer: Any) -> Made:
    """A draft of this kind for `target`."""
    if kind == NGRAM:
        if options.draft is not None:
            raise RecipeError(f"--draft {options.draft}: expected none with --draft-kind ngram, which has no model")
        given = {"--layers": options.layers is not None, "--weights": options.weights != "own"}
        for option in [
            name for name, found in {**given, "--head-rows": options.head_rows is not None}.items() if found
        ]:
            raise RecipeError(f"{option}: expected a draft with a model, found --draft-kind ngram: leave it out")
        return Made(NgramDraft(), None, "n-grams of the requests themselves")
    if options.layers is not None and kind in ("model", "feature"):
        raise RecipeError(f"--layers: expected --draft-kind layers with it, found {kind}: leave it out")
    rows, weights, ids_D = _vocabulary(tokenizer), options.weights, _drafted(options, tokenizer)
    if kind == "feature":
        path = options.draft or FEATURE
        net = feature_net(target, path)
        build = partial(feature_learner, options.target, draft=path, vocabulary=rows)
        words = f"a layer on the target's hidden states, {'fresh' if path == FEATURE else path}"
        return Made(FeatureDraft(net, target, weights=weights, ids_D=ids_D), build, words)
    if kind == "layers":
        source = target if options.draft is None else _draft_model(options.draft, target, tokenizer)
        count = source.config.get_text_config().num_hidden_layers
        layers = every_other(source) if options.layers is None else list(options.layers)
        path = options.draft or options.target
        whose = "the target's" if options.draft is None else f"{options.draft}'s"
        words = f"layers {', '.join(map(str, layers))} of {whose} {count}"
        build = partial(model_learner, path, layers=layers, vocabulary=rows)
        return Made(layers_draft(source, layers, weights=weights, ids_D=ids_D), build, words)
    if kind != "model":
        raise RecipeError(f"--draft-kind: expected layers, model, feature or ngram, found {kind!r}")
    if options.draft is None:
        raise RecipeError("--draft-kind model: expected --draft MODEL, found none: name the folder of a small model")
    model = _draft_model(options.draft, target, tokenizer)
    build = partial(model_learner, options.draft, vocabulary=rows)
    return Made(ModelDraft(model, weights=weights, ids_D=ids_D), build, f"the model {options.draft}")


def _kind(draft: str | None) -> str:
    if draft is None:
        return "layers"
    return "feature" if is_feature(draft) else "model"


def _drafted(options: Options, tokenizer: Any) -> Tensor | None:
    if options.head_rows is None:
        if options.head_text is not None:
            raise RecipeError("--head-text: expected --head-rows beside it, found none: say how many tokens")
        return None
    return likely_tokens(tokenizer, options.head_rows, [(options.head_text, None)] if options.head_text else [])


def _draft_model(path: str, target: Any, tokenizer: Any) -> Any:
    ours, theirs = load_tokenizer(path).get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        token = min(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
        raise PreflightError(
            f"--draft {path}: expected the target's vocabulary of {len(theirs)} tokens, found {len(ours)}, for example "
            f"{token!r} as {ours.get(token, 'none')} in place of {theirs.get(token, 'none')}: take a draft of the "
            "target's family"
        )
    model = load_model(path, device=target.device, dtype=target.dtype)
    set_vocabulary(model, _vocabulary(tokenizer))  # rows behind it are padding, of which each model has its own number
    return model


def _vocabulary(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RecipeError(
            f"--host {host} --port {port}: expected an address to listen at, found: {error}; choose another port"
        ) from None
