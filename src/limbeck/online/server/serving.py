"""`limbeck serve`: a target, drafts that learn beside it, and the server around them."""

from __future__ import annotations

import fcntl
import logging
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
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
from limbeck.errors import CheckpointError, PreflightError, RecipeError
from limbeck.models import cast, eos_tokens, fingerprint, load_model, load_tokenizer, probe_autocast, set_vocabulary
from limbeck.online.buffer import Buffer, Positions
from limbeck.online.feature_learner import feature_learner
from limbeck.online.learner import Training, model_learner
from limbeck.online.learning import Learning, Taught
from limbeck.online.routing import Routing
from limbeck.online.server.app import Served, create_app
from limbeck.online.server.limits import Keys, Limits, loopback
from limbeck.online.service import Service
from limbeck.online.updater import Build
from limbeck.online.versions import Versions
from limbeck.online.vocabulary import likely_tokens

LAYERS, MODEL, NGRAM = "layers", "model", "ngram"
_COLD_RATE, _TRAINED_RATE = 1e-3, 1e-4  # of learning, at first: see `Worker`
_KINDS = (LAYERS, MODEL, FEATURE, NGRAM)  # the names of main drafts


@dataclass(frozen=True)
class Options:
    """Of `limbeck serve`. draft: a folder, of a model or of a feature draft. draft_kind: `model` or `feature` (the
    defaults for such folders; without one a feature draft is fresh), `layers` cut from a model or else from the target
    (the default), or `ngram` alone. layers: which; by default every other one of the first. weights: of the draft's
    model, `own`, or on a CPU `int8` or `int4`. head_rows: tokens that it may draft beside a request's own (None: all),
    head_text: a file whose texts say which. gamma: drafted tokens a round; None: as many as pay. folder: where the
    drafts' versions are kept. context: tokens of prompt and completion together, at most (None: the model's own bound);
    memory is kept for as many.

    routes: other drafts by name, for the requests that name them: a folder, or in its place `layers`, `feature` or
    `ngram`. Weights, head and layers are chosen for all. learned_routing: a request that names none gets the draft that
    has been the fastest; without it, the main one."""

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
    context: int | None = None
    gamma: int | None = None
    stream_tokens: int = 1
    limits: Limits = Limits()
    routes: Mapping[str, str] = field(default_factory=dict[str, str])
    learned_routing: bool = False


@dataclass(frozen=True)
class Made:
    """A draft, how its learner is made (None: it learns nothing), and what it is, in words. trained: before, so that it
    is not to be taught in haste."""

    draft: Taught | NgramDraft
    build: Build | None
    described: str
    trained: bool = False


def serve(options: Options, say: Any = print) -> None:
    """Serves until it is interrupted or told to end (SIGTERM); `say` is given one line once it listens. RecipeError for
    options that do not fit together, a port that is taken, and a folder in which another server keeps its versions;
    PreflightError for a draft of another vocabulary."""
    keys = Keys.read(options.api_key_file) if options.api_key_file is not None else None
    if keys is None and not loopback(options.host):
        raise RecipeError(
            f"--host {options.host}: expected --api-key-file for an address that other machines reach, found none: "
            "give a file with a key a line, or serve 127.0.0.1"
        )
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(options.host, options.port))
        served, described = assemble(options, keys)
        for learning in served.service.learning.values():
            stack.enter_context(alone_in(Path(learning.folder)))
        config = uvicorn.Config(
            create_app(served),
            log_level=logging.WARNING,
            timeout_graceful_shutdown=10,
            access_log=False,
            proxy_headers=False,  # a client could give itself any address, and so a rate of its own
        )
        host, port = listener.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        # uvicorn ends in order and then raises its signal again: as an interruption it lets the service end, too.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        with suppress(KeyboardInterrupt), served.service:
            say(f"limbeck serves {served.name} at {where} (API under /v1, dashboard at /); draft: {described}")
            uvicorn.Server(config).run(sockets=[listener])


def assemble(options: Options, keys: Keys | None) -> tuple[Served, str]:
    """What is served, not yet started, and the drafts in words."""
    kind = options.draft_kind or _kind(options.draft)
    _check_routes(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, tokenizer = load_model(options.target, device=device), load_tokenizer(options.target)
    dtype, _ = probe_autocast(device, target.config.get_text_config().hidden_size)
    if dtype is not None:
        target = cast(target, dtype)
    set_vocabulary(target, _vocabulary(tokenizer))
    made = {kind: make_draft(options, kind, target, tokenizer)}
    made |= {name: _routed(options, path, target, tokenizer) for name, path in options.routes.items()}
    drafts: dict[str, Draft] = {name: one.draft for name, one in made.items()}
    shared = drafts.setdefault(NGRAM, NgramDraft())
    assert isinstance(shared, NgramDraft)
    adaptive = Adaptive(None if kind == NGRAM else kind, ngram=(NGRAM, shared))
    controller = adaptive if options.gamma is None else Fixed(kind, options.gamma)
    engine = Engine(target, tokenizer, drafts, controller, max_batch=options.max_batch, context=options.context)
    if controller is adaptive:
        engine.probe()
    name = options.name or _name(options.target)
    learning: dict[str, Learning] = {}
    described: list[str] = []
    for draft, one in made.items():
        folder, words = options.folder / name / draft, one.described
        if options.learning and one.build is not None and not isinstance(one.draft, NgramDraft):
            buffer = Buffer(positions=options.positions, taps=bool(one.draft.taps))
            training = Training(learning_rate=_TRAINED_RATE if one.trained else _COLD_RATE)
            learning[draft] = Learning(one.draft, one.build, folder, buffer, training, cold=not one.trained)
            newest = learning[draft].versions.newest()
            begins = "" if one.trained else ", cold"
            words += f", version {newest} of {folder}" if newest else f"{begins}; learning, versions in {folder}"
        else:
            newest = _take_up(one.draft, one.build, folder) if one.build is not None else None
            words += f", version {newest} of {folder}, not learning" if newest else ", not learning"
        described.append(words if draft == kind else f"route {draft}: {words}")
    routing = Routing(list(made), {NGRAM: NGRAM}, main=kind, learned=options.learned_routing)
    service = Service(engine, learning=learning, routing=routing)
    stops = eos_tokens(target, tokenizer)
    served = Served(service, tokenizer, name, engine.context, stops, options.limits, keys, options.stream_tokens)
    return served, "; ".join(described)


def parse_routes(texts: Sequence[str]) -> dict[str, str]:
    """Of `--route NAME=FOLDER`. RecipeError for anything else, and for a name that is there twice."""
    routes: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise RecipeError(f"--route: expected NAME=FOLDER, found {text!r}: name the route and its draft")
        if name in routes:
            raise RecipeError(f"--route {text}: expected one draft a name, found {name!r} twice: choose another name")
        routes[name] = path
    return routes


def _check_routes(options: Options) -> None:
    for name in options.routes:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise RecipeError(
                f"--route {name}: expected letters, digits, dots, dashes and underscores, found others: it is the name "
                "of a folder, too"
            )
        if name in _KINDS:
            raise RecipeError(f"--route {name}: expected another name, found one of {', '.join(_KINDS)}: choose one")
    if options.learned_routing and not options.routes:
        raise RecipeError("--learned-routing: expected --route with it, found one draft: there is nothing to choose")


def _routed(options: Options, path: str, target: Any, tokenizer: Any) -> Made:
    """The draft of a route."""
    kind = path if path in (LAYERS, NGRAM) else _kind(path)
    if kind == NGRAM:
        return Made(NgramDraft(), None, "n-grams of its own requests")
    layers = options.layers if kind == LAYERS else None
    return make_draft(replace(options, draft=None if path == kind else path, layers=layers), kind, target, tokenizer)


def _take_up(draft: Draft, build: Build, folder: Path) -> int | None:
    """Puts what was learnt before in place, and returns its version (None: nothing was). CheckpointError where it is
    another draft's."""
    versions = Versions(folder)
    newest = versions.newest()
    if not newest:
        return None
    if fingerprint(versions.weights(0)) != fingerprint(build().trained()):
        raise CheckpointError(
            f"{folder}: expected versions of the draft that serves, found another's: name another folder by --out"
        )
    draft.prepare(versions.weights(newest), newest)()
    return newest


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps every other server out of this folder for versions. RecipeError where one is there already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise RecipeError(f"--out: expected a folder that can be written, found {error}: name another") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                f"--out: expected {folder} to be free, found another server that keeps its versions there: name "
                "another folder, or serve with --no-learning"
            ) from None
        yield


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
    if options.layers is not None and kind in (MODEL, FEATURE):
        raise RecipeError(f"--layers: expected --draft-kind layers with it, found {kind}: leave it out")
    rows, weights, ids_D = _vocabulary(tokenizer), options.weights, _drafted(options, tokenizer)
    if kind == FEATURE:
        path = options.draft or FEATURE
        net = feature_net(target, path)
        build = partial(feature_learner, options.target, draft=path, vocabulary=rows)
        words = f"a layer on the target's hidden states, {'fresh' if path == FEATURE else path}"
        return Made(FeatureDraft(net, target, weights=weights, ids_D=ids_D), build, words, trained=path != FEATURE)
    if kind == LAYERS:
        source = target if options.draft is None else _draft_model(options.draft, target, tokenizer)
        count = source.config.get_text_config().num_hidden_layers
        layers = every_other(source) if options.layers is None else list(options.layers)
        path = options.draft or options.target
        whose = "the target's" if options.draft is None else f"{options.draft}'s"
        words = f"layers {', '.join(map(str, layers))} of {whose} {count}"
        build = partial(model_learner, path, layers=layers, vocabulary=rows)
        return Made(layers_draft(source, layers, weights=weights, ids_D=ids_D), build, words)
    if kind != MODEL:
        raise RecipeError(f"--draft-kind: expected layers, model, feature or ngram, found {kind!r}")
    if options.draft is None:
        raise RecipeError("--draft-kind model: expected --draft MODEL, found none: name the folder of a small model")
    model = _draft_model(options.draft, target, tokenizer)
    build = partial(model_learner, options.draft, vocabulary=rows)
    return Made(ModelDraft(model, weights=weights, ids_D=ids_D), build, f"the model {options.draft}", trained=True)


def _kind(draft: str | None) -> str:
    if draft is None:
        return LAYERS
    return FEATURE if is_feature(draft) else MODEL


def _name(target: str) -> str:
    """A folder's or a file's own, a hub id whole."""
    return Path(target).resolve().name if Path(target).exists() else target


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
