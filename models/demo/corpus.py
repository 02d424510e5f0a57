"""The demo model's data: Python's own standard library, split by path, and a tokenizer trained on it."""

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
HELD_OUT_ONE_IN = 50

# Left out: tests, what is installed beside the library, generated tables, and grammar machinery.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "pydoc_data"})
_TABLES = ("encodings/cp", "encodings/iso", "encodings/mac_", "encodings/koi8", "_sysconfigdata")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module: its path relative to the library's root (with `/`) and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """True for about one file in fifty, decided by the path alone, so that it is the same everywhere."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """The two sides of the split, each sorted by path."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def load_corpus(root: Path | None = None) -> Corpus:
    """Read every `.py` file under `root` (default: the running interpreter's standard library).

    Raises FileNotFoundError when that leaves nothing to train on or nothing to hold out.
    """
    base = root if root is not None else Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        name = relative.as_posix()
        if _SKIPPED_FOLDERS.intersection(relative.parts) or name.startswith(_TABLES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules declare another encoding
            continue
        if text.strip():
            files.append(SourceFile(name, text))
    corpus = Corpus(tuple(file for file in files if not file.held_out), tuple(file for file in files if file.held_out))
    if not corpus.train or not corpus.held_out:
        raise FileNotFoundError(f"{base}: {len(files)} usable .py files, too few to train on and hold some out")
    return corpus


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text round-trips, and encoding puts `BOS` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer
