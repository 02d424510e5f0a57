"""A prompt's next tokens and their log-probabilities are the same bits alone and in a batch."""

import sys

from inferloom import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else "models/demo"
params = SamplingParams(temperature=0, max_tokens=16, logprobs=3)
prompts = ["import os\n", "def read(self, size=-1):\n    ", "x = [", "while True:\n    try:\n        "]

with LLM(model, progress=print) as llm:
    together = [result.outputs[0] for result in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], params)[0].outputs[0] for prompt in prompts]

for prompt, one, other in zip(prompts, together, alone, strict=True):
    same = list(one.token_ids) == list(other.token_ids) and one.logprobs == other.logprobs
    print(f"{prompt!r}: {'the same bits' if same else 'DIFFERENT'}")
    if not same:
        sys.exit(1)
