"""What a request wishes for its state once it is done: a session's name, how long it is held, and where.

`session_id` and `session_hold` say so themselves. What OpenAI's and Anthropic's clients send for their caches are hints:
they never fail a request. Either way the answer says what became of it, under `inferloom`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inferloom.runtime.leases import Outcome
from inferloom.runtime.server.errors import bad_request
from inferloom.runtime.server.guard import KEYED
from inferloom.runtime.server.model import Model
from inferloom.runtime.server.wire import Session

MAX_ID = 256
#: OpenAI's words for how long, as seconds and place: what is to stay in memory goes to no disk.
_RETENTION = {"in_memory": (600.0, "memory"), "in-memory": (600.0, "memory"), "24h": (86400.0, "disk")}
_TTL = {"5m": 300.0, "1h": 3600.0}


@dataclass(frozen=True, slots=True)
class Hint:
    """How another server's words read here: a name if one was given, `seconds` (0: no hold) in `place`, or `why` not."""

    name: str | None = None
    seconds: float = 0.0
    place: str = "auto"
    why: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """A session by the name that the client knows, and as the engine takes it; without that, `why` it is left out."""

    id: str | None
    session: Session | None
    why: str = ""

    def answer(self, held: Outcome | None) -> dict[str, Any]:
        """What the answer says of it."""
        outcome = Outcome("rejected", self.why) if self.session is None else held or Outcome("accepted", self.why)
        return {"inferloom": {"session": {"id": self.id, **asdict(outcome)}}}


def owner(salt: bytes) -> str:
    """What the names of a caller's sessions start with in the engine, so that nobody can name another's.

    The part up to the first colon is whose they are when room is divided: all salts of an API key are one owner's.
    """
    whose = salt[:len(KEYED) + 32] if salt.startswith(KEYED) else salt
    return f"{_digest(whose, 8)}:{_digest(salt, 16)}:"


def _digest(salt: bytes, size: int) -> str:
    return hashlib.blake2b(salt, digest_size=size, person=b"sessions").hexdigest()


def openai_hint(key: str | None, retention: str | None) -> Hint:
    """`prompt_cache_key` and `prompt_cache_retention`."""
    if retention is None:
        return Hint(key)
    if retention not in _RETENTION:
        return Hint(key, why=f"prompt_cache_retention is in_memory or 24h, not {retention[:40]!r}")
    return Hint(key, *_RETENTION[retention])


def anthropic_hint(marks: Sequence[Any], user: Any) -> Hint:
    """All `cache_control` of a request (the longest counts), and its `metadata.user_id`."""
    marks = [mark for mark in marks if mark is not None]
    if not marks:
        return Hint()
    name = user if isinstance(user, str) else None
    times = [_TTL.get(str(mark.get("ttl") or "5m")) for mark in marks
             if isinstance(mark, Mapping) and mark.get("type") == "ephemeral"]
    known = [seconds for seconds in times if seconds is not None]
    if not known:
        return Hint(name, why="cache_control is of type ephemeral, with a ttl of 5m or 1h")
    return Hint(name, max(known))


def wish(model: Model, salt: bytes, session_id: str | None, session_hold: float | None, hint: Hint, start: Any,
         samples: int = 1, prompts: int = 1) -> Wish | None:
    """What is asked for, if anything is. `start` is what makes the prompt's session its own, if it has to be named by that.

    HttpError 400 for a `session_id` that makes no sense.
    """
    if session_id is None and session_hold is not None and not hint.name:
        raise bad_request("session_hold needs a session_id", "session_hold")
    hold, place = (hint.seconds, hint.place) if session_hold is None else (session_hold, "auto")
    if session_id is not None:
        name = session_id
    elif hint.name:
        name = hint.name if _usable(hint.name) else _named("key-", hint.name)
    elif hold:
        name = _named("auto-", start)
    else:
        return Wish(None, None, hint.why) if hint.why else None
    why = ""
    if prompts > 1:
        why = "a session is of one prompt"
    elif samples > 1 and session_id is not None:
        why = "a session goes on from one sample: leave n out"
    elif not model.engine.model.enable_prefix_caching:
        why = "sessions need the prefix cache, which is switched off"
    if why and session_id is not None:
        raise bad_request(why, "session_id")
    return Wish(name, None if why else Session(owner(salt) + name, hold, place), why or hint.why)


def _usable(name: str) -> bool:
    return 0 < len(name) <= MAX_ID and name.isprintable()


def _named(prefix: str, data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return prefix + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def opening(messages: Sequence[Mapping[str, Any]], tools: Any) -> Any:
    """What all turns of a conversation have in common: its tools, and its messages up to the user's first."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    return [tools, messages[:first + 1]]
