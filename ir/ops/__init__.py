"""All op declarations; importing this package declares them."""

from inferloom.ir.ops import attention, data, experts, kernel, nn, pointwise, recurrent, shape, sparse  # noqa: F401
