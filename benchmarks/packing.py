"""The packer beside TRL's on the same lengths in turn, and how long ranks wait for each other with and without balance.

    python benchmarks/packing.py [samples] [rounds]

Three laws of sample lengths: lognormal, clipped to the row. Ours is `pack`, index arrays and all. TRL's is what its user
calls, `pack_dataset(dataset, row, strategy="bfd")`, on a datasets.Dataset of int32 `input_ids`: it copies the tokens,
too, and packs each thousand samples on their own. Its rounds take 10 GB of memory for a million samples; without TRL
they are left out. The last line is RESULT: the median of the ratios, pair by pair, of the first law; of the other
figures that of the worst law. Spread is (max - min) / mean of the cost of the rows that 8 ranks run at the same time.
"""

import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from jobs import packing

LAWS = [("mean 643", 5.9964, 1.0, 4096), ("mean 1619", 7.1982, 0.7, 4096), ("mean 1274", 6.5957, 1.1, 8192)]
"""Name, mean and deviation of the logarithm, row: as long as chats, as long documents, and twice as long a tail."""
RANKS = 8
LLAMA_8B = 53_248


def lengths_of(law: tuple[str, float, float, int], samples: int) -> NDArray[np.int64]:
    _, mean, deviation, row = law
    drawn = np.random.default_rng(0).lognormal(mean, deviation, samples)
    return np.clip(drawn.astype(np.int64), 1, row)


def ours_s(lengths: NDArray[np.int64], row: int) -> float:
    began = time.perf_counter()
    packing.pack(lengths, row)
    return time.perf_counter() - began


def p95_of_spread(costs: NDArray[np.float64]) -> tuple[float, float]:
    """Dealt by `balance`, and shuffled as a sampler would."""
    dealt = packing.balance(costs, RANKS, 4, seed=0)
    naive = np.random.default_rng(0).permutation(len(costs))[: dealt.size].reshape(dealt.shape)
    return tuple(float(np.percentile(packing.spread(costs, one), 95)) for one in (dealt, naive))


def beside_trl(lengths: NDArray[np.int64], row: int, rounds: int) -> dict[str, float]:
    import datasets
    import pyarrow
    from trl import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    tokens = pyarrow.array(np.zeros(lengths.sum(), dtype=np.int32))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, tokens)}))
    pairs = []
    for _ in range(rounds):
        ours = ours_s(lengths, row)
        began = time.perf_counter()
        packed = pack_dataset(dataset, row, strategy="bfd")
        pairs.append((ours, time.perf_counter() - began))
        fill = lengths.sum() / (len(packed) * row)
        print(f"  TRL {pairs[-1][1]:.2f} s, fill {fill:.4%}; ours {ours:.4f} s", flush=True)
        del packed
    return {
        "packer_vs_trl": round(statistics.median(trl / ours for ours, trl in pairs), 1),
        "trl_samples_per_s": round(len(lengths) / statistics.median(trl for _, trl in pairs)),
        "trl_fill": round(float(fill), 5),
    }


def main() -> None:
    samples, rounds = ([int(word) for word in sys.argv[1:]] + [1_000_000, 3][len(sys.argv) - 1 :])[:2]
    print(f"{samples} samples; law, row: fill, million samples/s, p95 of spread over {RANKS} ranks, the same shuffled")
    found: list[dict[str, Any]] = []
    for law in LAWS:
        name, *_, row = law
        lengths = lengths_of(law, samples)
        packs = packing.pack(lengths, row)
        speed = samples / statistics.median(ours_s(lengths, row) for _ in range(7))
        even, naive = p95_of_spread(packs.sums(packing.attention_cost(lengths, LLAMA_8B)))
        fill = float(lengths.sum() / (len(packs) * row))
        print(f"{name:<10} {row:>5}  {fill:.4%}  {speed / 1e6:5.1f}  {even:.5f}  {naive:.5f}", flush=True)
        found.append({"fill": fill, "samples_per_s": speed, "even": even, "naive": naive})
    figures: dict[str, Any] = {
        "samples": samples,
        "fill": round(min(one["fill"] for one in found), 5),
        "samples_per_s": round(min(one["samples_per_s"] for one in found)),
        "spread_p95": round(max(one["even"] for one in found), 6),
        "naive_spread_p95": round(max(one["naive"] for one in found), 4),
    }
    if importlib.util.find_spec("trl"):
        figures |= beside_trl(lengths_of(LAWS[0], samples), LAWS[0][-1], rounds)
    else:
        print("TRL is not installed here: its side is left out (packer_vs_trl, trl_samples_per_s)")
    print("RESULT", json.dumps(figures))


if __name__ == "__main__":
    main()
