"""What the runtime raises. Each message says what is wrong, where, and what to do about it."""

from inferloom.errors import InferloomError as InferloomError


class ArtifactError(InferloomError):
    """An artifact is damaged, foreign, unfit for this machine, or does not fit in memory."""


class RequestError(InferloomError):
    """A request or a step asks for something that the artifact or the device cannot do."""
