"""Ranks with which tiktoken merges bytes to the very tokens that a tokenizer's list of merges gives.

Both merge neighbours by rank, but tiktoken looks up the bytes of two neighbours where a tokenizer looks up the pair. The
ranks found here make that the same. Let T be a token, and see how its bytes alone are merged. Inside of any text, as long as
no merge crosses T's ends, its bytes go through the same states; so T is only ever made from the last two parts of its own
merging, and with that pair's rank, or, if its own merging stops earlier, never. Hence T gets that rank; and a token that its
own merging never makes is left out, so that tiktoken cannot make it from parts which are no listed pair.
"""

from collections import defaultdict
from typing import Any

from tokenizers import models

from jobs.tokenization.offsets import Unfit

PLAIN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = sorted({*range(256)} - PLAIN)
LETTERS = {chr(byte if byte in PLAIN else 256 + OTHERS.index(byte)): byte for byte in range(256)}
"""GPT-2's letter for each byte, in the order of the bytes: printable ones stand for themselves, the others count up from 256."""


def ranks(model: dict[str, Any]) -> tuple[list[int], dict[bytes, int]]:
    """(token id of each rank, rank of each token's bytes) for a tokenizer.json's model. Raises Unfit where there are none."""
    if model["type"] != "BPE" or any(
        model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise Unfit(f"its model is {model['type']}, not one of bytes that are merged")
    vocabulary = model["vocab"]
    if not LETTERS.keys() <= vocabulary.keys():
        raise Unfit("its model is one of letters, not of bytes")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    made, never = _made(vocabulary, pairs)
    ids = [vocabulary[token] for token in (*LETTERS, *map("".join, pairs))]
    found = {bytes([byte]): byte for byte in range(256)}
    found |= {_bytes(token): 256 + place for token, place in made.items()}
    if model["ignore_merges"]:  # a whole word is looked up first, as tiktoken does; so such tokens must be there
        if 2 in never.values():
            raise Unfit("its vocabulary has tokens that are made of no pair")
        for token in never:
            found[_bytes(token)] = len(ids)
            ids.append(vocabulary[token])
    return ids, found


def _bytes(token: str) -> bytes:
    return bytes(map(LETTERS.__getitem__, token))


def _made(vocabulary: dict[str, int], pairs: list[tuple[str, ...]]) -> tuple[dict[str, int], dict[str, int]]:
    """(for each token that its own merging makes, the last pair's place in the list; for the others, the parts it ends in)."""
    place = {pair: number for number, pair in enumerate(pairs)}
    ways = defaultdict(list)
    for pair, number in place.items():
        ways["".join(pair)].append(number)
    tokens = {token: number for token, number in vocabulary.items() if LETTERS.keys() >= set(token)}
    bpe = models.BPE(vocab=tokens, merges=pairs)
    parts = {token: len(bpe.tokenize(token)) for token in tokens if len(token) > 1}
    made = {
        token: ways[token][0] if len(ways[token]) == 1 else _last_merge(token, place)
        for token, count in parts.items()
        if count == 1
    }
    return made, {token: count for token, count in parts.items() if count > 1}


def _last_merge(token: str, place: dict[tuple[str, ...], int]) -> int:
    """Llama 3's list has every pair that makes a token; only one is ever the last, and not always the first listed."""
    parts, never = list(token), len(place)
    places = [place.get(pair, never) for pair in zip(parts, parts[1:], strict=False)]
    while len(places) > 1:
        at = places.index(min(places))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del places[at]
        for left in range(max(at - 1, 0), min(at + 1, len(places))):
            places[left] = place.get((parts[left], parts[left + 1]), never)
    return places[0]
