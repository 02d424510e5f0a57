"""Generate from a batch of prompts, each with sampling parameters of its own."""

import sys

from inferloom import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "models/demo"
prompts = ["import os\nimport ", "def factorial(n):\n", "class Stack:\n    "]
params = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24),
    SamplingParams(temperature=0.8, top_k=20, seed=7, max_tokens=48, stop=["\n\n"]),
]

with LLM(model, progress=print) as llm:
    for result in llm.generate(prompts, params):
        done = result.outputs[0]
        print(f"--- {len(result.prompt_token_ids)} + {len(done.token_ids)} tokens, {done.finish_reason}")
        print(result.prompt + done.text)
