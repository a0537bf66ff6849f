"""Real tokenizers of several families, trained in a moment on a few lines: their tokens end in different places."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from opd.chat import Renderer, renderer

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the other dogs, the quickest of them all",
    "she said that there were 1234 hens in the garden; there were 12 or 34, no more than that",
    "naïve café, ÀÉÎ; 中文字符，日本語のテキスト。 한국어 🙂👩‍👩‍👧 🙂🙂 e\u0301e\u0301",
    "def f(x):\n    return {'a': [x**2, -x]}\n\n\tend of the file\n",
]


def _wrapped(core: Backend, stop: str) -> Any:
    core.add_special_tokens([AddedToken(stop, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=stop, clean_up_tokenization_spaces=False)


@cache
def byte_level(size: int = 400, stop: str = "<|end|>") -> Any:
    """Byte-level BPE: every text has tokens, and a token may be a part of a character."""
    core = Backend(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrapped(core, stop)


@cache
def sentencepiece(stop: str = "</s>") -> Any:
    """Llama's way: a mark for the space, one before every text, and bytes for what has no token."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz,.;'"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("▁", "a"), ("n", "d"), ("▁a", "nd"), ("▁", "▁")]
    merges += [("o", "g"), ("i", "n"), ("▁", "d"), ("▁d", "og"), ("th", "e"), ("t", "h"), ("th", "at")][:6]
    words = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, "th", *(a + b for a, b in merges)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>")])
    return _wrapped(core, stop)


@cache
def unigram(stop: str = "<eos>") -> Any:
    """A unigram model over pieces with the mark for the space, and bytes for what has none."""
    core = Backend(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator([CORPUS[0], CORPUS[1]], trainer)
    pieces = [(piece, score) for piece, score in _unigram_pieces(core)]
    pieces += [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    core.model = models.Unigram(pieces, 0, byte_fallback=True)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _wrapped(core, stop)


def _unigram_pieces(core: Backend) -> list[tuple[str, float]]:
    import json

    return [(piece, score) for piece, score in json.loads(core.to_str())["model"]["vocab"]]


@cache
def characters(alphabet: str = "abcdefghijklmnopqrstuvwxyz 0123456789\n.,;'é中🙂", stop: str = "<stop>") -> Any:
    """One token a character; what is not in the alphabet is unknown."""
    core = Backend(models.WordLevel({c: i for i, c in enumerate(["<unk>", *alphabet])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    tokenizer = _wrapped(core, stop)
    tokenizer.unk_token = "<unk>"
    return tokenizer


FAMILIES = {"byte_level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram, "characters": characters}


def voice(tokenizer: Any, **choices: Any) -> Renderer:
    """The renderer of a model that stops with its tokenizer's end of text."""
    return renderer(tokenizer, stop_ids=[tokenizer.eos_token_id], **choices)
