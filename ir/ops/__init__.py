"""All op declarations; importing this package declares them."""

from inferloom.ir.ops import (  # noqa: F401
    attention,
    data,
    experts,
    kernel,
    nn,
    pointwise,
    quant,
    recurrent,
    shape,
    sparse,
)
