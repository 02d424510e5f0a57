"""LLVM IR for chips that multiply integers of 16 bits and add pairs of them."""

from __future__ import annotations

LANES = 16


def pair_products(width: int, wide: str, bytes_: str) -> str:
    """LLVM IR of the functions that integers.py calls, on parts of 8 or 16 lanes of 32 bits.

    `wide` multiplies pairs of 16-bit integers and adds them, `bytes_` unsigned by signed 8-bit ones. Additions are written
    as instructions: LLVM would add products to each other before it adds them to the sums, and run out of registers.
    """
    n = LANES // width
    add_ints = f'call <{width} x i32> asm "vpaddd $2, $1, $0", "=v,0,v"'
    add_shorts = f'call <{2 * width} x i16> asm "vpaddw $2, $1, $0", "=v,0,v"'
    part, short, byte = f"<{width} x i32>", f"<{2 * width} x i16>", f"<{4 * width} x i8>"
    text = [f"declare {part} @{wide}({short}, {short})", f"declare {short} @{bytes_}({byte}, {byte})"]

    def function(name: str, arguments: str, body: list[str]) -> None:
        taken = ", ".join(f"<16 x i32> %{a}" for a in arguments)
        text.append(f"define linkonce_odr hidden <16 x i32> @inferloom_{name}({taken}) alwaysinline nounwind {{")
        for i in range(n):
            lanes = ", ".join(f"i32 {i * width + j}" for j in range(width))
            for a in arguments:
                text.append(f"  %{a}{i} = shufflevector <16 x i32> %{a}, <16 x i32> poison, <{width} x i32> <{lanes}>")
            text.extend("  " + line.replace("#", str(i)) for line in body)
        if n == 1:
            text.append("  ret <16 x i32> %r0")
        else:
            lanes = ", ".join(f"i32 {j}" for j in range(16))
            text.append(f"  %r = shufflevector {part} %r0, {part} %r1, <16 x i32> <{lanes}>\n  ret <16 x i32> %r")
        text.append("}")

    ones = "splat (i16 1)"
    function("add_pairs", "cab", [f"%x# = bitcast {part} %a# to {short}", f"%y# = bitcast {part} %b# to {short}",
                                  f"%p# = call {part} @{wide}({short} %x#, {short} %y#)",
                                  f"%r# = {add_ints}({part} %c#, {part} %p#)"])
    function("add_bytes", "cab", [f"%x# = bitcast {part} %a# to {byte}", f"%y# = bitcast {part} %b# to {byte}",
                                  f"%p# = call {short} @{bytes_}({byte} %x#, {byte} %y#)", f"%d# = bitcast {part} %c# to {short}",
                                  f"%s# = {add_shorts}({short} %d#, {short} %p#)", f"%r# = bitcast {short} %s# to {part}"])
    function("add_shorts", "ca", [f"%x# = bitcast {part} %a# to {short}",
                                  f"%p# = call {part} @{wide}({short} %x#, {short} {ones})", f"%r# = add {part} %c#, %p#"])
    function("even_bytes", "a", [f"%x# = bitcast {part} %a# to {short}", f"%y# = shl {short} %x#, splat (i16 8)",
                                 f"%s# = ashr {short} %y#, splat (i16 8)", f"%r# = bitcast {short} %s# to {part}"])
    function("odd_bytes", "a", [f"%x# = bitcast {part} %a# to {short}", f"%s# = ashr {short} %x#, splat (i16 8)",
                                f"%r# = bitcast {short} %s# to {part}"])
    return "\n".join(text) + "\n"
