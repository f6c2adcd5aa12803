"""Which draft serves a request: the one that it names, the one of its tag, or the one that has been the fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from limbeck.online.coins import coin

_TAGS = 1000  # clients choose them: those that were not heard of for the longest are forgotten


@dataclass
class _Speed:
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("inf")


@dataclass
class Routing:
    """Several drafts of one target.

    `tags`: which draft a tag (`Request.route`) stands for; a draft's own name is a tag too. With `learned`, requests
    whose tag is of no draft, or that have none, go to the draft with the most measured tokens/s among requests of the
    same tag, and a share `explore` of them to any: epsilon-greedy (Sutton and Barto, section 2.2) over means whose past
    counts less by `decay` a request, as traffic and drafts change. Without it they keep what they ask for.

    `main`: the draft of requests for which nobody chose another, which they teach too (None: there is no such one, and
    they teach all).
    """

    drafts: Sequence[str]
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    main: str | None = None
    learned: bool = False
    explore: float = 0.05
    decay: float = 0.98
    seed: int = 0
    speeds: dict[str | None, dict[str, _Speed]] = field(default_factory=dict[str | None, dict[str, _Speed]])
    count: int = 0

    def choose(self, tag: str | None) -> str | None:
        """The draft of the next request with this tag. None, or a name that no draft has: not decided here."""
        if tag is not None and (tag in self.drafts or tag in self.tags):
            return self.tags.get(tag, tag)
        if not self.learned or not self.drafts:
            return self.main if tag is None else tag
        self.count += 1
        if coin(self.seed, "explore", self.count) < self.explore:
            return self.drafts[int(coin(self.seed, "which", self.count) * len(self.drafts))]
        speeds = self.speeds.get(tag, {})
        return max(self.drafts, key=lambda draft: speeds.get(draft, _Speed()).tokens_per_s)

    def record(self, tag: str | None, draft: str, tokens: int, seconds: float) -> None:
        """A request of this tag got `tokens` by this draft in `seconds` of decoding."""
        speeds = self.speeds[tag] = self.speeds.pop(tag, {})  # the newest is last
        if len(self.speeds) > _TAGS:
            del self.speeds[next(iter(self.speeds))]
        speed = speeds.setdefault(draft, _Speed())
        speed.tokens = speed.tokens * self.decay + tokens
        speed.seconds = speed.seconds * self.decay + seconds
