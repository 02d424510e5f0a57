"""What the HTTP process and an engine process say to each other.

Messages are MessagePack, each behind its length as four bytes. They travel over a pair of connected Unix sockets that
has no name: nobody else can connect, and either side sees at once when the other is gone.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from inferloom.runtime.leases import Outcome
from inferloom.runtime.params import SamplingParams
from inferloom.runtime.sessions import SessionInfo

#: A frame is at most this long: a prompt of millions of tokens fits.
MAX_FRAME = 64 << 20
HEADER = struct.Struct("<I")
#: Token id, log-probability, rank.
Scored = tuple[int, float, int]


class Grammar(msgspec.Struct, frozen=True):
    """What the text must be: `kind` is "json_schema", "regex" or "lark", `text` says which."""

    kind: str
    text: str


class Load(msgspec.Struct, tag="load", frozen=True, array_like=True):
    """First message: load the artifact at `path` with these options of `LLM`; `beat` seconds between signs of life. The
    first `trace_steps` steps are written to the file `trace`."""

    path: str
    options: dict[str, Any]
    beat: float
    trace: str | None = None
    trace_steps: int = 0


class Session(msgspec.Struct, frozen=True, array_like=True):
    """What a request computes is remembered as `name`, and waits for `hold` seconds in `place`."""

    name: str
    hold: float = 0.0
    place: str = "auto"


class Add(msgspec.Struct, tag="add", frozen=True, array_like=True):
    """A request; with a `pooling`, to embed."""

    id: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    salt: bytes = b""
    grammar: Grammar | None = None
    session: Session | None = None
    pooling: str | None = None


class Ask(msgspec.Struct, tag="ask", frozen=True, array_like=True):
    """About sessions whose names start with `owner`: `what` is "list" (`most` of them), "info", "pause", "resume" or "close"
    of the one called `name` behind that."""

    id: int
    what: str
    owner: str
    name: str = ""
    most: int = 0
    seconds: float = 0.0
    place: str = "auto"
    returns_in: float | None = None


class Abort(msgspec.Struct, tag="abort", frozen=True, array_like=True):
    """Nobody waits for this request any more."""

    id: int


class Stop(msgspec.Struct, tag="stop", frozen=True, array_like=True):
    """End the process."""


class Ready(msgspec.Struct, tag="ready", frozen=True, array_like=True):
    """The artifact is loaded; at most `longest` tokens fit in a sequence."""

    blocks: int
    seqs: int
    longest: int
    seconds: float


class Failed(msgspec.Struct, tag="failed", frozen=True, array_like=True):
    """The process ends for this reason."""

    message: str


class Refused(msgspec.Struct, tag="refused", frozen=True, array_like=True):
    """The request asks for what cannot be done; nothing of it ran."""

    id: int
    message: str


class Told(msgspec.Struct, tag="told", frozen=True, array_like=True):
    """The answer to an Ask. `there`: whether the session is. `more`: whether the list goes on. Names have no owner."""

    id: int
    there: bool = True
    sessions: list[SessionInfo] = []
    more: bool = False
    outcome: Outcome | None = None
    error: str | None = None


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """What is new of one sample. `logprobs` has a list for each new token, if they were asked for."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[list[Scored]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Update(msgspec.Struct, frozen=True, array_like=True):
    """What is new of a request. `own_fault`: the `error` comes from what the request asked for. `queued`: seconds until
    it had its first place in a step. `embedding` is f32 [hidden], little-endian."""

    id: int
    samples: list[Sample]
    cached: int = 0
    finished: bool = False
    error: str | None = None
    own_fault: bool = False
    queued: float = 0.0
    prompt_logprobs: list[list[Scored] | None] | None = None
    held: Outcome | None = None
    embedding: bytes | None = None


class Updates(msgspec.Struct, tag="updates", frozen=True, array_like=True):
    """All news of a step."""

    items: list[Update]


class Tier(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of state in a place below the pool, and how many fit; 0 when there is none."""

    bytes: int = 0
    capacity: int = 0


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """Of sessions and drafts. `sessions`, `leases` and `leased_blocks` there are now. Since the start: keys fetched from memory
    and from disk, saves that failed, tokens drafted, and of these accepted."""

    sessions: int = 0
    leases: int = 0
    leased_blocks: int = 0
    fetched_ram: int = 0
    fetched_disk: int = 0
    failed_saves: int = 0
    drafted: int = 0
    accepted: int = 0


class Beat(msgspec.Struct, tag="beat", frozen=True, array_like=True):
    """A sign of life. `stuck`: seconds since work was last done while there is some. Then counts since the start.

    `blocks_available` may be handed out: of these, `blocks_cached` hold what can be found again, and of these,
    `blocks_leased` are under lease. `tiers`: memory, disk."""

    stuck: float
    running: int
    waiting: int
    blocks: int
    blocks_available: int
    steps: int
    tokens_computed: int
    tokens_generated: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    tokens_prompt: int = 0
    blocks_cached: int = 0
    blocks_leased: int = 0
    batch_sequences: int = 0
    batch_tokens: int = 0
    tiers: tuple[Tier, Tier] = (Tier(), Tier())
    counts: Counts = Counts()

    def owners(self) -> dict[str, int]:
        """All blocks: `in_use` by sequences; free with content that is `leased`, or just `cached`; and `free` without."""
        # The counts were read one after the other while the engine ran: no difference of them may look negative.
        cached = min(self.blocks_cached, self.blocks_available)
        leased = min(self.blocks_leased, cached)
        return {"in_use": self.blocks - self.blocks_available, "leased": leased, "cached": cached - leased,
                "free": self.blocks_available - cached}


ToEngine = Load | Add | Ask | Abort | Stop
FromEngine = Ready | Failed | Refused | Told | Updates | Beat

_encoder = msgspec.msgpack.Encoder()
read_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
read_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message with its length in front. ValueError when it is too long."""
    data = _encoder.encode(message)
    if len(data) > MAX_FRAME:
        raise ValueError(f"a message of {len(data):,} bytes is longer than {MAX_FRAME:,}")
    return HEADER.pack(len(data)) + data
