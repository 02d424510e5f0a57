"""Grammars that hold sequences, through llguidance: JSON schemas, regular expressions, Lark grammars.

Everything is bounded: the size of a grammar, the work to build it and the work of each step. What goes beyond ends its
own request.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from inferloom.runtime.errors import RequestError
from inferloom.runtime.structured_limits import MAX_DEPTH, MAX_GRAMMAR_BYTES

#: Between the tokens of JSON: enough to indent, not enough to go on for ever, which small models like.
_WHITESPACE = r"( |\n {0,32})?"
#: Bytes of grammars' source whose compiled form is kept.
CACHE_BYTES = 4 << 20


def _limits() -> LLParserLimits:
    return LLParserLimits(max_items_in_row=2_000, initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000,
                          step_max_items=50_000, max_lexer_states=20_000, max_grammar_size=100_000, verbose_errors=False)


class Grammars:
    """Makes guides for one tokenizer. Thread-safe; building takes up to a second for the largest grammars."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise RequestError("structured output needs a token that ends a sequence, and the model has none")
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        self._vocab, self._eos = vocab_size, frozenset(eos_token_ids)
        self._made: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def guide(self, kind: str, text: str) -> Callable[[], MatcherGuide]:
        """What makes guides for a grammar; `kind` is "json_schema", "regex" or "lark".

        RequestError when the grammar is malformed or too large.
        """
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"grammar: {len(text.encode()):,} bytes are more than {MAX_GRAMMAR_BYTES:,}")
        with self._lock:
            matcher = self._made.get((kind, text))
            if matcher is not None:
                self._made.move_to_end((kind, text))
        if matcher is None:
            matcher = LLMatcher(self._tokenizer, _compiled(kind, text), log_level=0, limits=_limits())
            if matcher.is_error():
                raise RequestError(f"grammar: {matcher.get_error()[:1000]}")
            self._keep((kind, text), matcher)
        return lambda: MatcherGuide(matcher.deep_copy(), self._vocab, self._eos)

    def _keep(self, key: tuple[str, str], matcher: LLMatcher) -> None:
        with self._lock:
            if key not in self._made:
                self._made[key] = matcher
                self._bytes += len(key[1])
            while self._bytes > CACHE_BYTES:
                (_, text), _ = self._made.popitem(last=False)
                self._bytes -= len(text)


class MatcherGuide:
    """A `Guide` over llguidance's matcher."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
        self._matcher, self._vocab, self._eos = matcher, vocab_size, eos

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> None:
        if token not in self._eos:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"grammar: {self._matcher.get_error()[:1000]}")


def _compiled(kind: str, text: str) -> str:
    if kind == "json_schema":
        _check_depth(text)
        try:
            return str(LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE}))
        except ValueError as error:
            raise RequestError(f"grammar: {str(error)[:1000]}") from None
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(text))
    if kind == "lark":
        return str(LLMatcher.grammar_from_lark(text))
    raise RequestError(f"grammar: kind {kind!r} is not known; use json_schema, regex or lark")


def _check_depth(text: str) -> None:
    depth = most = 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        most = max(most, depth)
    if most > 2 * MAX_DEPTH:
        raise RequestError(f"grammar: a schema nests at most {MAX_DEPTH} deep")
