"""The code generator for a chip."""

from __future__ import annotations

from inferloom.targets.base import Target
from inferloom.targets.chips import Chip, GpuChip, SourceChip


def target_for(chip: Chip, batch_invariant: bool = False) -> Target:
    """The code generator for a chip. Only that one's libraries are imported."""
    if isinstance(chip, GpuChip):
        from inferloom.targets.triton.codegen import TritonTarget

        return TritonTarget(chip, batch_invariant)
    if isinstance(chip, SourceChip):
        from inferloom.targets.tvm.portable.codegen import SourceTarget

        return SourceTarget(chip)
    from inferloom.targets.tvm.codegen import CpuTarget

    return CpuTarget(chip)
