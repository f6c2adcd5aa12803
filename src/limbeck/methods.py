"""The methods: who writes the sequence x what the teacher says about it x what the student minimises."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One line of the registry. `source` and `objective` are keys of SOURCES and OBJECTIVES; `signal` says what the
    teacher gives at training time (`none` or `distribution`)."""

    label: str
    source: str
    signal: str
    objective: str
    paper: str
    when: str


METHODS: dict[str, Method] = {
    "sft": Method(
        label="SFT",
        source="dataset",
        signal="none",
        objective="cross_entropy",
        paper="-",
        when="a baseline, or a start for the others: good text, no teacher at hand",
    ),
    "seqkd": Method(
        label="SeqKD",
        source="teacher",
        signal="none",
        objective="cross_entropy",
        paper="Kim & Rush 2016, arXiv 1606.07947",
        when="prompts without answers, or a teacher that gives text alone",
    ),
    "kd": Method(
        label="KD",
        source="dataset",
        signal="distribution",
        objective="divergence",
        paper="Hinton et al. 2015, arXiv 1503.02531",
        when="good text and a teacher of the same vocabulary: the cheapest step with a full signal",
    ),
    "minillm": Method(
        label="MiniLLM",
        source="token_mix",
        signal="distribution",
        objective="policy",
        paper="Gu et al. 2024, arXiv 2306.08543",
        when="free text where the student should be right rather than broad: reverse KL of whole sequences",
    ),
    "gkd": Method(
        label="GKD",
        source="mixed",
        signal="distribution",
        objective="divergence",
        paper="Agarwal et al. 2024, arXiv 2306.13649",
        when="the student must recover from its own mistakes; start from one that is mostly right",
    ),
    "draft": Method(
        label="Draft",
        source="teacher",
        signal="distribution",
        objective="divergence",
        paper="Zhou et al. 2024, arXiv 2310.08461",
        when="before `limbeck serve`: a draft of the teacher that is quick from the first request on",
    ),
}
