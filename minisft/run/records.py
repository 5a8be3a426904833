"""The shape of each JSON file in a run folder or a folder of results.

Such a folder may come from somebody else, so `files.read_json(file, shape)` validates every file.
Shapes with `extra="allow"` keep unlisted keys, because a later version may add some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class RunRecord:
    """`run.json`: the settings, the initial model, and the choices made for this machine."""

    config: dict[str, Any]
    model_folder: Annotated[str, Field(pattern=r"^[^\x00]*$")]
    model_source: str = ""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    on_gpu: bool = False
    model_files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@with_config(ConfigDict(extra="allow"))
class Metric(TypedDict):
    """A line of `metrics.jsonl`: one optimizer step."""

    step: int
    loss: float
    tokens: Count
    trained_tokens: Count
    seconds: float
    warm_up: bool
    epoch: NotRequired[float]
    lr: NotRequired[float]
    grad_norm: NotRequired[float | None]
    bytes: NotRequired[Annotated[list[int], Field(min_length=1)]]


# One rank's entry in `memory.json`. Class syntax does not allow its keys with spaces.
RankMemory = TypedDict(
    "RankMemory",
    {
        "rank": int,
        "at rest": NotRequired[dict[str, Bytes]],
        "after backward": NotRequired[dict[str, Bytes]],
        "peak": NotRequired[Bytes | None],
        "communication": NotRequired[dict[str, Bytes]],
        "in main memory": NotRequired[dict[str, dict[str, Bytes]]],
        "step": NotRequired[dict[str, Any]],
    },
)
with_config(ConfigDict(extra="allow"))(RankMemory)  # sets the configuration on the class itself


class FileSum(TypedDict):
    """A file of a checkpoint: its size and SHA-256."""

    bytes: int
    sha256: str


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict):
    """`manifest.json` of a checkpoint."""

    step: NotRequired[int]
    run: NotRequired[str]
    strategy: NotRequired[str]
    ranks: NotRequired[int]
    test_loss: NotRequired[float | None]
    resumable: NotRequired[bool]
    files: NotRequired[dict[str, FileSum]]


@with_config(ConfigDict(extra="allow"))
class DoneRecord(TypedDict):
    """`DONE`: written last, once every rank has finished."""

    steps: int
    run: NotRequired[str]


class FailureRecord(TypedDict):
    """`FAILED`: which rank failed, at which step (None if unknown), and why."""

    rank: int | None
    step: int | None
    reason: str


class HostsRecord(TypedDict):
    """`hosts.json`: the launcher, and the number of ranks on each host."""

    launcher: str
    hosts: dict[str, int]


class Example(TypedDict):
    """One scored answer: id and last user turn of the question, reference, model's answer."""

    id: str
    prompt: str
    reference: str
    output: str
    stopped: bool


Interval = Annotated[list[float], Field(max_length=2)]  # low and high; empty if no interval was computed


class CheckpointScores(TypedDict):
    """The scores of one checkpoint in `summary.json`."""

    step: int
    bleu: float
    bleu_interval: Interval
    chrf: float
    chrf_interval: Interval
    length_ratio: float
    stopped: float
    loss: float
    perplexity: float
    examples: list[Example]
    more: NotRequired[dict[str, float]]  # further metrics by name; results of earlier versions have none


@with_config(ConfigDict(extra="allow"))
class CheckpointResult(CheckpointScores):
    """`evaluation/<run>/checkpoint-N.json`: the scores of one checkpoint, with every answer."""

    run: str
    model: str
    key: str
    rows: int
    bleu_signature: str
    chrf_signature: str
    answers: list[Example]
    bleu_note: NotRequired[str]
    bleu_tokenizer: NotRequired[str]


class ResultsOwner(TypedDict):
    """`run.json` in a folder of results: the run folder that was evaluated, and its identity."""

    run_folder: str
    run: NotRequired[str]


@with_config(ConfigDict(extra="allow"))
class Summary(TypedDict):
    """`evaluation/<run>/summary.json`."""

    run: str
    rows: int
    checkpoints: Annotated[list[CheckpointScores], Field(min_length=1)]


@dataclass(frozen=True)
class RankHeartbeat:
    """`ranks/rankN.json`: a rank's heartbeat, and when each phase began (seconds since 1970)."""

    rank: Annotated[int, Field(ge=0)]
    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    phase: str
    step: int
    micro_batch: int
    began: dict[str, float] = field(default_factory=dict)
