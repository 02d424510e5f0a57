"""What the passes did and why not: shown by `inferloom inspect --why`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of a pass. `loc` is the model's source line, `why` says why not when not `done`."""

    pass_name: str
    what: str
    done: bool
    why: str = ""
    loc: str = ""


@dataclass(slots=True)
class Report:
    """Collects decisions; the pipeline names the pass that runs."""

    pass_name: str = ""
    decisions: list[Decision] = field(default_factory=list)

    def fused(self, what: str, loc: str = "") -> None:
        self.decisions.append(Decision(self.pass_name, what, True, "", loc))

    def skipped(self, what: str, why: str, loc: str = "") -> None:
        self.decisions.append(Decision(self.pass_name, what, False, why, loc))

    def to_json(self) -> list[dict[str, object]]:
        return [{"pass": d.pass_name} | {k: v for k, v in asdict(d).items() if k != "pass_name"}
                for d in self.decisions]
