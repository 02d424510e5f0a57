"""Three requests share the batch: one streams, one samples, one is given up halfway."""

import asyncio
import sys

from inferloom import AsyncLLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "models/demo"


async def stream(llm: AsyncLLM, name: str, prompt: str, params: SamplingParams, give_up_after: int = 10**9) -> None:
    tokens = 0
    async for output in llm.generate(prompt, params):
        tokens = len(output.outputs[0].token_ids)
        if tokens >= give_up_after:
            break  # leaving the loop aborts the request and frees its blocks
    print(f"{name}: {tokens} tokens")


async def main() -> None:
    llm = AsyncLLM(model, progress=print)
    await asyncio.gather(
        stream(llm, "greedy", "import sys\n", SamplingParams(temperature=0, max_tokens=32)),
        stream(llm, "sampled", "def main(", SamplingParams(temperature=0.9, seed=1, max_tokens=48)),
        stream(llm, "given up", "class Node:", SamplingParams(temperature=0, max_tokens=512), give_up_after=8),
    )
    llm.close()


asyncio.run(main())
