"""The packer beside TRL's on the same lengths in turn, and how long ranks wait for each other beside a random sampler.

    python benchmarks/packing.py [samples] [rounds]

Three laws of sample lengths: lognormal, clipped to the row. Ours is `pack`, index arrays and all. TRL's is what its user
calls, `pack_dataset(dataset, row, strategy="bfd")`, on a datasets.Dataset of int32 `input_ids`: it copies the tokens,
too, and packs each thousand samples on their own. Its rounds take 10 GB of memory for a million samples; without TRL
they are left out. Spread is (max - min) / mean of the cost of what ranks run at the same time, at the 95th percentile
over an epoch of steps of 64 rows, one row at a time: 8 ranks, and 64 (`widest`, where each holds one row of the step).
Ours is `Order` as `micro_batches` deals it; naive is a random permutation dealt as torch's DistributedSampler does, which
the Trainer's default comes to. Each for packed rows and for a sample a row (`unpacked`).
The last line is RESULT: the median of the ratios, pair by pair, of the first law; of the other figures that of the law
worst for it.
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
from jobs.data import batches, packing
from jobs.data.sampler import Order

LAWS = [("mean 643", 5.9964, 1.0, 4096), ("mean 1619", 7.1982, 0.7, 4096), ("mean 1274", 6.5957, 1.1, 8192)]
"""Name, mean and deviation of the logarithm, row: as long as chats, as long documents, and twice as long a tail."""
RANKS, WIDEST = 8, 64
GLOBAL_BATCH = 64
LLAMA_8B = 53_248


def lengths_of(law: tuple[str, float, float, int], samples: int) -> NDArray[np.int64]:
    _, mean, deviation, row = law
    drawn = np.random.default_rng(0).lognormal(mean, deviation, samples)
    return np.clip(drawn.astype(np.int64), 1, row)


def ours_s(lengths: NDArray[np.int64], row: int) -> float:
    began = time.perf_counter()
    packing.pack(lengths, row)
    return time.perf_counter() - began


def spread(costs: NDArray[np.float64], dealt: NDArray[np.int64]) -> NDArray[np.float64]:
    """(max - min) / mean over ranks of the cost that they process at the same time: the share that the fastest rank waits.

    `costs` has shape (rows,). `dealt` holds row numbers, shape (micro-steps, ranks, rows of a micro batch). Returns shape
    (micro-steps,); 0.02 is 2 %.
    """
    together = costs[dealt].sum(axis=2)
    waits: NDArray[np.float64] = (together.max(axis=1) - together.min(axis=1)) / together.mean(axis=1)
    return waits


def p95_of_spread(costs: NDArray[np.float64], ranks: int) -> tuple[float, float]:
    """Ours, and a random sampler's."""
    order = Order(costs, GLOBAL_BATCH, seed=0, kind="balanced")
    steps = len(costs) // GLOBAL_BATCH
    ours = []
    for step in range(steps):
        chosen = order.rows_of(step)
        parts = [list(batches.micro_batches(chosen, 1, rank, ranks)) for rank in range(ranks)]
        ours.append(np.array(parts).transpose(1, 0, 2))
    # A DistributedSampler gives rank r every ranks-th row, from the r-th on: at any time they hold neighbours.
    naive = np.random.default_rng(0).permutation(len(costs))[: steps * GLOBAL_BATCH].reshape(-1, ranks, 1)
    found = [float(np.percentile(spread(costs, dealt), 95)) for dealt in (np.concatenate(ours), naive)]
    return found[0], found[1]


def spreads(lengths: NDArray[np.int64], packs: packing.Packs) -> dict[str, float]:
    alone = packing.attention_cost(lengths, LLAMA_8B)
    rows = {"": packs.sums(alone), "unpacked_": alone}
    found = {}
    for name, costs in rows.items():
        found[f"{name}spread_p95"], found[f"{name}naive_spread_p95"] = p95_of_spread(costs, RANKS)
        found[f"{name}widest_spread_p95"], found[f"{name}widest_naive_spread_p95"] = p95_of_spread(costs, WIDEST)
    return found


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
    print(f"{samples} samples; law, row: fill, million samples/s; p95 of spread, ours / naive")
    found: list[dict[str, float]] = []
    for law in LAWS:
        name, *_, row = law
        lengths = lengths_of(law, samples)
        packs = packing.pack(lengths, row)
        speed = samples / statistics.median(ours_s(lengths, row) for _ in range(7))
        fill = float(lengths.sum() / (len(packs) * row))
        print(f"{name:<10} {row:>5}  {fill:.4%}  {speed / 1e6:5.1f}", flush=True)
        found.append(spreads(lengths, packs) | {"fill": fill, "samples_per_s": speed})
        for kind in ("", "widest_", "unpacked_", "unpacked_widest_"):
            ours, naive = (found[-1][f"{kind}{which}spread_p95"] for which in ("", "naive_"))
            print(f"  {kind.replace('_', ' ') or 'packed':<16} {ours:.5f} / {naive:.4f}", flush=True)
    figures: dict[str, Any] = {
        "samples": samples,
        "fill": round(min(one["fill"] for one in found), 5),
        "samples_per_s": round(min(one["samples_per_s"] for one in found)),
    }
    figures |= {key: round(max(one[key] for one in found), 6) for key in found[0] if "spread" in key}
    if importlib.util.find_spec("trl"):
        figures |= beside_trl(lengths_of(LAWS[0], samples), LAWS[0][-1], rounds)
    else:
        print("TRL is not installed here: its side is left out (packer_vs_trl, trl_samples_per_s)")
    print("RESULT", json.dumps(figures))


if __name__ == "__main__":
    main()
