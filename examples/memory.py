"""How many tokens of state fit into a memory budget: known from the manifest, before anything is loaded."""

import json
import sys
from pathlib import Path

import inferloom

model = Path(sys.argv[1] if len(sys.argv) > 1 else "models/demo")
artifact = model if (model / "manifest.json").exists() else inferloom.compile(model, progress=print)
manifest = json.loads((artifact / "manifest.json").read_text())
memory, block_tokens = manifest["memory"], manifest["state"]["block_tokens"]
weights = manifest["files"][manifest["weights"]["file"]]["bytes"]
fixed = weights + memory["workspace"] + memory["inputs"]
print(f"fixed: {fixed:,} bytes; a block of {block_tokens} tokens: {memory['bytes_per_block']:,} bytes")
for budget in (64 << 20, 256 << 20, 1 << 30):
    blocks = max(0, (budget - fixed) // memory["bytes_per_block"])
    print(f"{budget >> 20:5} MiB: {blocks:6} blocks = {blocks * block_tokens:8,} tokens")
