"""Counters for Prometheus: vLLM's names where it has them, `limbeck:` before ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from limbeck.online.server.stream import Call

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)

# name, what it says, under which key the snapshot of a service (of a draft, from `_VLLM` on) has it
_STATE = (
    ("vllm:num_requests_running", "Requests that are written.", "running"),
    ("vllm:num_requests_waiting", "Requests that wait.", "waiting"),
    ("limbeck:net_speedup", "Against plain decoding while nothing trains; what is served pays for it.", "speedup"),
    ("limbeck:plain_tokens_per_second", "Of that plain decoding, which is sampled now and then.", "plain_tokens_per_s"),
)
_VLLM = (
    ("vllm:spec_decode_num_drafts", "Proposals of drafts.", "proposals"),
    ("vllm:spec_decode_num_draft_tokens", "Drafted tokens.", "drafted"),
    ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", "accepted"),
)
_COUNTERS = (
    ("limbeck:verified_positions", "Positions at which a drafted token was judged.", "verified"),
    ("limbeck:alpha_sum", "Sum over them of sum_v min(p, q): by verified_positions it is alpha.", "alpha_sum"),
    ("limbeck:draft_updates", "Trainings that ended.", "updates"),
    ("limbeck:draft_swaps", "New versions that the gate let pass.", "swaps"),
    ("limbeck:draft_refusals", "New versions that the gate refused.", "refusals"),
    ("limbeck:draft_undecided", "New versions of which the gate could not tell.", "undecided"),
    ("limbeck:draft_rollbacks", "Swaps that were taken back.", "rollbacks"),
    ("limbeck:draft_failures", "Updates, swaps and the like that ended with an error.", "failures"),
    ("limbeck:draft_reranks", "Changes of the tokens that it may draft.", "reranks"),
    ("limbeck:draft_restarts", "Processes of updates that were started in place of dead ones.", "restarts"),
)
_GAUGES = (
    ("limbeck:draft_version", "The version that serves.", "version"),
    ("limbeck:draft_benched", "1: it has given NaN, and plain decoding goes on.", "benched"),
    ("limbeck:draft_gamma", "Drafted tokens in a proposal, lately.", "gamma"),
    ("limbeck:draft_broken", "1: an error has ended its learning, and it serves on.", "broken"),
    ("limbeck:draft_known_mass", "The target's mass on the tokens that it may draft, at least.", "known_mass"),
    ("limbeck:buffer_held_out", "Requests to stop by and for the gate.", "buffer_held"),
    ("limbeck:buffer_error", "How far acceptance that is measured on the buffer may be off.", "buffer_error"),
    ("limbeck:buffer_positions", "Positions to train on.", "buffer_positions"),
    ("limbeck:buffer_bytes", "Their size.", "buffer_bytes"),
    ("limbeck:buffer_age_seconds", "Age of the oldest of them.", "buffer_age_s"),
)


class Metrics:
    """What the server counts itself, and what the service says when asked."""

    def __init__(self, model: str, snapshot: Callable[[], dict[str, Any]]) -> None:
        self.snapshot = snapshot
        self.labels = {"model_name": model, "engine": "0"}
        self.registry = CollectorRegistry()
        names = tuple(self.labels)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*names, *more), registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            made = Histogram(name, text, names, registry=self.registry, buckets=_LATENCIES)
            return made.labels(**self.labels)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "From request to first token.")
        self.latencies = histogram("vllm:e2e_request_latency_seconds", "From request to last token.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(**self.labels)
        self.generation_tokens = counter("vllm:generation_tokens", "Written tokens.").labels(**self.labels)
        self.ended = counter("vllm:request_success", "Completions that ended.", "finished_reason")
        self.unended = counter("limbeck:cancelled", "Completions whose client left or that failed.").labels(
            **self.labels
        )
        self.mean_latency = 1.0
        self.registry.register(self)  # pyright: ignore[reportArgumentType]

    def count_tokens(self, count: int) -> None:
        self.generation_tokens.inc(count)

    def count_call(self, call: Call) -> None:
        """A call is over."""
        seconds = time.perf_counter() - call.started
        if call.first_token_s is not None:
            self.first_token.observe(call.first_token_s)
        for choice in call.choices:
            if choice.finish_reason in ("stop", "length"):
                self.ended.labels(**self.labels, finished_reason=choice.finish_reason).inc()
            else:
                self.unended.inc()
        if not call.open:
            self.latencies.observe(seconds)
            self.mean_latency += 0.1 * (seconds - self.mean_latency)
        prompts = {choice.request.stream: len(choice.request.tokens) for choice in call.choices}
        self.prompt_tokens.inc(sum(prompts.values()))

    def latency(self) -> float:
        """Seconds that a request takes, about."""
        return self.mean_latency

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def describe(self) -> list[Any]:  # asked of a collector that cannot be asked before the service runs
        return []

    def collect(self) -> Iterator[Any]:
        """What the service says, for the registry."""
        seen = self.snapshot()
        drafts: Mapping[str, Any] = seen["drafts"]
        for name, text, key in _STATE:
            if seen[key] is not None:
                yield self._family(GaugeMetricFamily, name, text, [([], seen[key])])
        for name, text, key in _VLLM:
            total = sum(draft[key] for draft in drafts.values())
            yield self._family(CounterMetricFamily, name, text, [([], total)])
        kept = [sum(column) for column in zip_longest(*(draft["kept"] for draft in drafts.values()), fillvalue=0)]
        yield self._family(
            CounterMetricFamily,
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by their place in the proposal.",
            [([str(place)], count) for place, count in enumerate(kept)],
            "position",
        )
        for families, made in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, text, key in families:
                samples = [([draft], found[key]) for draft, found in drafts.items() if found.get(key) is not None]
                yield self._family(made, name, text, samples, "draft")
        for name, text, key in (
            ("limbeck:ledger_seconds", "Where the time went; all but training adds up to the wall clock.", "ledger"),
            ("limbeck:ledger_seconds_per_token", "The same for each served token, now.", "per_token"),
        ):
            made = CounterMetricFamily if key == "ledger" else GaugeMetricFamily
            yield self._family(made, name, text, [([spent], found) for spent, found in seen[key].items()], "spent_on")
        learning = seen["learning"] == "on"
        yield self._family(
            GaugeMetricFamily, "limbeck:learning", "1: updates run; 0: paused, or off.", [([], learning)]
        )

    def _family(self, kind: Any, name: str, text: str, samples: list[tuple[list[str], float]], *label: str) -> Any:
        family = kind(name, text, labels=[*self.labels, *label])
        for values, number in samples:
            family.add_metric([*self.labels.values(), *values], float(number))
        return family
