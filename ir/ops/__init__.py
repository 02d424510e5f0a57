"""All op declarations; importing this package declares them."""

from inferloom.ir.ops import attention, data, kernel, nn, pointwise, recurrent, shape  # noqa: F401
