"""Which files a path to a model means. Imports nothing of the compiler, so that the face may ask."""

from __future__ import annotations

from pathlib import Path

from inferloom.ir.errors import UnsupportedError

#: What a tokenizer, a chat template and sampling defaults are read from.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "generation_config.json")
CONFIG_FILES = ("config.json", "genai_config.json")


def is_onnx(path: Path) -> bool:
    """Whether a path is an ONNX file, or a folder that holds one and no safetensors."""
    if path.is_file():
        return path.suffix == ".onnx"
    return any(path.glob("*.onnx")) and not any(path.glob("*.safetensors"))


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder that holds one and no safetensors."""
    if path.is_file():
        return path.suffix == ".gguf"
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def gguf_file(path: Path) -> Path:
    """The GGUF file that a path means: itself, or the only one of a folder."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise UnsupportedError(f"{path} holds {len(found)} GGUF files: name one"
                               + (f" ({', '.join(p.name for p in found[:5])})" if found else ""))
    return found[0]


def onnx_file(path: Path) -> Path:
    """The ONNX file that a path means: itself, or the `model.onnx` or only `*.onnx` of a folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.onnx"))
    if path / "model.onnx" in found:
        return path / "model.onnx"
    if len(found) != 1:
        raise UnsupportedError(f"{path} holds {len(found)} ONNX files and none is called model.onnx: name one"
                               + (f" ({', '.join(p.name for p in found[:5])})" if found else ""))
    return found[0]


def onnx_facts(file: Path) -> dict[str, Path]:
    """Tokenizer and configuration files of an ONNX file by name: beside it, or above a folder called `onnx`."""
    folders = [file.parent, *([file.resolve().parent.parent] if file.resolve().parent.name == "onnx" else [])]
    names = (*TOKENIZER_FILES, *CONFIG_FILES)
    return {n: f / n for f in reversed(folders) for n in names if (f / n).is_file()}
