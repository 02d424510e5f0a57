"""How a server is set up: one frozen object, made from flags and environment variables."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from inferloom.runtime.errors import RequestError
from inferloom.runtime.llm import DEFAULT_DISK_BYTES
from inferloom.runtime.speculative import SpeculativeConfig


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """An artifact to serve. `names` are what clients may call it; None of the rest means: as `LLM` chooses.

    `ram_bytes`, `state_dir` and `disk_bytes` are the tiers below the pool: sessions are saved in a folder of the artifact's
    own inside `state_dir`. `tool_parser` and `reasoning_parser` are names of parsers, "auto" for what the chat template
    suggests. The first `trace_steps` steps are written to the file `trace`.
    """

    path: str
    names: tuple[str, ...]
    memory_bytes: int | None = None
    threads: int | None = None
    gpu: int = 0
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    seed: int | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    ram_bytes: int = 0
    state_dir: str | None = None
    disk_bytes: int = DEFAULT_DISK_BYTES
    speculative: SpeculativeConfig | None = None
    pin: bool = False
    trace: str | None = None
    trace_steps: int = 1000


@dataclass(frozen=True, slots=True)
class Settings:
    """A server. Times are seconds, sizes bytes.

    Without `api_keys` the server listens on loopback only, and answers only requests that name a loopback host.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    max_logprobs: int = 20
    max_connections: int = 8192
    keep_alive: float = 10.0
    send_timeout: float = 30.0
    stall_timeout: float = 300.0
    load_timeout: float = 600.0
    drain_timeout: float = 30.0
    vllm_metrics: bool = False
    log_level: str = "info"
    otel_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.api_keys and not self.local:
            raise RequestError(f"--host {self.host} can be reached from other machines: give --api-key, or listen on "
                               "127.0.0.1")
        for name, low in (("port", 0), ("max_queue", 0), ("max_body_bytes", 1024), ("max_logprobs", 0),
                          ("max_connections", 1)):
            if getattr(self, name) < low:
                raise RequestError(f"{name}={getattr(self, name)} must be at least {low}")
        for name in ("keep_alive", "send_timeout", "stall_timeout", "load_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) < 1e6:
                raise RequestError(f"{name}={getattr(self, name)} must be a positive number of seconds")
        if any(len(key) < 8 for key in self.api_keys):
            raise RequestError("an API key has at least 8 characters")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
