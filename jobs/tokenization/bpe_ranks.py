"""Computes the ranks with which tiktoken merges bytes into exactly the tokens that a tokenizer's list of merges gives.

Both merge the neighbors of the lowest rank first. But a tokenizer looks up the pair of neighbors, and tiktoken looks up their
joined bytes. The ranks computed here make both give the same tokens:

Take a token T, and merge its bytes alone. Inside any text, as long as no merge crosses the ends of T, its bytes go through
the same states. So T is only ever made from the last two parts of its own merging, with the rank of that pair; or, if its own
merging stops earlier, T is never made. Hence T gets the rank of that pair. A token that its own merging never makes is left
out, so that tiktoken cannot make it from parts that are not a listed pair.
"""

import re
from collections import Counter
from typing import Any

from tokenizers import models

from jobs.tokenization.offsets import Unsupported

PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = sorted({*range(256)} - PRINTABLE)
BYTE_OF_LETTER = {chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte)): byte for byte in range(256)}
"""GPT-2's letter for each byte, in the order of the bytes. Printable bytes stand for themselves, the others count up from 256."""
LATIN = {ord(letter): byte for letter, byte in BYTE_OF_LETTER.items()}
LETTERS_ONLY = re.compile(f"[{re.escape(''.join(BYTE_OF_LETTER))}]+")

Pair = tuple[str, str]


def mergeable_ranks(model: dict[str, Any]) -> tuple[list[int], dict[bytes, int]]:
    """For the `model` of a tokenizer.json: (token id of each rank, rank of each token's bytes).

    Raises Unsupported if tiktoken cannot reproduce the model.
    """
    if model["type"] != "BPE" or any(
        model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise Unsupported(f"its model is {model['type']}, not plain byte-level BPE")
    vocabulary = model["vocab"]
    if not BYTE_OF_LETTER.keys() <= vocabulary.keys():
        raise Unsupported("its BPE model works on characters, not on bytes")
    # A tokenizer.json lists a merge as "a b", or in newer files as ["a", "b"].
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    pairs: list[Pair] = [(left, right) for left, right in merges]
    made = list(map("".join, pairs))
    rank_of_token, parts_of_unreachable = _last_merges(vocabulary, pairs, made)
    # Rank r < 256 is a byte; rank 256 + n is the n-th merge. Several merges may give the same token.
    ids = [vocabulary[token] for token in (*BYTE_OF_LETTER, *made)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {_bytes(token): 256 + number for token, number in rank_of_token.items()}
    if model["ignore_merges"]:
        # Both libraries look up a whole word before they merge, so words that no merge makes need a rank too. One that ends
        # in two parts would also be made of these two by tiktoken, inside longer words, though they are not a listed pair.
        if 2 in parts_of_unreachable.values():
            raise Unsupported("its vocabulary has tokens that no listed merge makes")
        for token in parts_of_unreachable:
            ranks[_bytes(token)] = len(ids)
            ids.append(vocabulary[token])
    return ids, ranks


def _bytes(token: str) -> bytes:
    return token.translate(LATIN).encode("latin-1")


def _last_merges(
    vocabulary: dict[str, int], pairs: list[Pair], made: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Merge each token's own bytes. made: the token that each pair makes.

    Returns (number of the last merge, for tokens that become whole; number of parts left over, for the others).
    """
    number_of_pair = {pair: number for number, pair in enumerate(pairs)}
    number_of_token = {token: number for number, token in enumerate(made)}
    by_several: set[str] = set()
    if len(number_of_token) < len(made):
        by_several = {token for token, count in Counter(made).items() if count > 1}
    tokens = {token: number for token, number in vocabulary.items() if LETTERS_ONLY.fullmatch(token)}
    merge = models.BPE(vocab=tokens, merges=pairs).tokenize
    parts = {token: len(merge(token)) for token in tokens if len(token) > 1}
    last_merge = {
        token: _last_merge(token, number_of_pair) if token in by_several else number_of_token[token]
        for token, count in parts.items()
        if count == 1
    }
    return last_merge, {token: count for token, count in parts.items() if count > 1}


def _last_merge(token: str, number_of_pair: dict[Pair, int]) -> int:
    """Number of the last merge of a token that several listed pairs make.

    Llama 3 lists every pair that makes a token. Only one of them is ever the last merge, and not always the first listed.
    """
    parts, unlisted = list(token), len(number_of_pair)
    numbers = [number_of_pair.get(pair, unlisted) for pair in zip(parts, parts[1:], strict=False)]
    while len(numbers) > 1:
        first = numbers.index(min(numbers))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
        del numbers[first]
        for left in range(max(first - 1, 0), min(first + 1, len(numbers))):
            numbers[left] = number_of_pair.get((parts[left], parts[left + 1]), unlisted)
    return numbers[0]
