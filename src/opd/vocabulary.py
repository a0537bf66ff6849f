"""Do two tokenizers mean the same by every id? Compared by content, for names and sizes prove nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Tokenizer = Any  # a transformers tokenizer; typed loosely so that nothing here imports transformers

PROBES = (
    "Hello, world! It's 3.14159 and 1,234,567.",
    "  two  spaces\tand a tab\n\nand lines \r\n end ",
    "def f(x):\n    return {'a': [x**2, -x]}  # comment",
    "naïve café ÀÉÎ ß ø ﬁ Ａ é",
    "中文字符，日本語のテキスト。 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦 ∑∫√ αβγ \\frac{1}{2}",
    "ALLCAPS camelCase snake_case don't I'LL we've",
    "aaaaaaaaaaaaaaaa!!!!!!!!--------",
)


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> str | None:
    """None when the two give every id the same meaning, else one sentence with the evidence.

    Compared by content, not by name: the vocabularies of real tokens (rows that a model adds to pad its embedding
    do not count), then the ids of a set of probe texts.
    """
    return next(_differences(a, b), None)


def _differences(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    shared = sorted(t for t in vocab_a.keys() & vocab_b.keys() if vocab_a[t] != vocab_b[t])
    if shared:
        t = shared[0]
        yield f"{len(shared)} tokens have other ids, such as {t!r}: {vocab_a[t]} and {vocab_b[t]}"
    only_a, only_b = sorted(vocab_a.keys() - vocab_b.keys()), sorted(vocab_b.keys() - vocab_a.keys())
    if only_a or only_b:
        yield (
            f"the vocabularies have {len(vocab_a)} and {len(vocab_b)} tokens; only the first has {only_a[:3]} "
            f"({len(only_a)} in all), only the second {only_b[:3]} ({len(only_b)} in all)"
        )
    for text in PROBES:
        ids_a, ids_b = (list(t(text, add_special_tokens=False)["input_ids"]) for t in (a, b))
        if ids_a != ids_b:
            k = next((k for k, (x, y) in enumerate(zip(ids_a, ids_b, strict=False)) if x != y), 0)
            cut = slice(max(0, k - 2), k + 4)
            yield f"{text!r} is {ids_a[cut]} to one and {ids_b[cut]} to the other (from token {cut.start})"


def content(tokenizer: Tokenizer) -> Any:
    """What decides a tokenizer's ids, as JSON data; padding and truncation, which callers switch, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    content = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("padding", "truncation")}
