"""Measures the packer against TRL's on the same sample lengths, and how long ranks wait for each other against a random sampler.

    python benchmarks/packing.py [samples] [rounds]

Sample lengths follow three lognormal distributions, clipped to the row length.

Packing: ours is `pack`, which returns index arrays. TRL's is what its users call, `pack_dataset(dataset, row, strategy="bfd")`
on a datasets.Dataset of int32 `input_ids`; it also copies the tokens, and packs each thousand samples on their own. The
two take turns. TRL's rounds need 10 GB of memory for a million samples. Without TRL they are left out.

Waiting: spread is (max - min) / mean of the cost that ranks process at the same time. The figure is its 95th percentile over an
epoch of steps of 64 rows, one row per micro batch, on 8 ranks and on 64 (`widest`: each rank has one row of the step).
Ours is `RowSampler` with `micro_batches`. Naive is a random permutation, given to ranks as by torch's DistributedSampler, which
is the Trainer's default. Both run with packed rows and with one sample per row (`unpacked`).

The last line is RESULT with the figures as JSON. packer_vs_trl is the median of the ratios of all rounds, for the first
distribution; every other figure is the worst of the three distributions.
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
from jobs.data.sampler import RowSampler

DISTRIBUTIONS = [("mean 643", 5.9964, 1.0, 4096), ("mean 1619", 7.1982, 0.7, 4096), ("mean 1274", 6.5957, 1.1, 8192)]
"""(name, mean and deviation of the logarithm, tokens of a row): like chats, like long documents, and with a longer tail."""
RANKS, WIDEST = 8, 64
GLOBAL_BATCH = 64
LLAMA_8B = 53_248


def draw_lengths(distribution: tuple[str, float, float, int], samples: int) -> NDArray[np.int64]:
    _, mean, deviation, row = distribution
    lengths = np.random.default_rng(0).lognormal(mean, deviation, samples)
    return np.clip(lengths.astype(np.int64), 1, row)


def seconds_to_pack(lengths: NDArray[np.int64], row: int) -> float:
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


def spread_p95(costs: NDArray[np.float64], ranks: int) -> tuple[float, float]:
    """(ours, a random sampler's)."""
    order = RowSampler(costs, GLOBAL_BATCH, seed=0, kind="balanced")
    steps = len(costs) // GLOBAL_BATCH
    ours = []
    for step in range(steps):
        chosen = order.rows_of(step)
        parts = [list(batches.micro_batches(chosen, 1, rank, ranks)) for rank in range(ranks)]
        ours.append(np.array(parts).transpose(1, 0, 2))
    # A DistributedSampler gives rank r the rows r, r + ranks, r + 2 * ranks, ...: at any time, ranks have neighboring rows.
    naive = np.random.default_rng(0).permutation(len(costs))[: steps * GLOBAL_BATCH].reshape(-1, ranks, 1)
    ours_p95, naive_p95 = (float(np.percentile(spread(costs, dealt), 95)) for dealt in (np.concatenate(ours), naive))
    return ours_p95, naive_p95


def spreads(lengths: NDArray[np.int64], packs: packing.Packs) -> dict[str, float]:
    sample_costs = packing.attention_cost(lengths, LLAMA_8B)
    row_costs = {"": packs.sums(sample_costs), "unpacked_": sample_costs}
    figures = {}
    for name, costs in row_costs.items():
        figures[f"{name}spread_p95"], figures[f"{name}naive_spread_p95"] = spread_p95(costs, RANKS)
        figures[f"{name}widest_spread_p95"], figures[f"{name}widest_naive_spread_p95"] = spread_p95(costs, WIDEST)
    return figures


def compare_with_trl(lengths: NDArray[np.int64], row: int, rounds: int) -> dict[str, float]:
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
        ours = seconds_to_pack(lengths, row)
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
    print(f"{samples} samples; distribution, row: fill, million samples/s; p95 of spread, ours / naive")
    results: list[dict[str, float]] = []
    for distribution in DISTRIBUTIONS:
        name, *_, row = distribution
        lengths = draw_lengths(distribution, samples)
        packs = packing.pack(lengths, row)
        speed = samples / statistics.median(seconds_to_pack(lengths, row) for _ in range(7))
        fill = float(lengths.sum() / (len(packs) * row))
        print(f"{name:<10} {row:>5}  {fill:.4%}  {speed / 1e6:5.1f}", flush=True)
        results.append(spreads(lengths, packs) | {"fill": fill, "samples_per_s": speed})
        for kind in ("", "widest_", "unpacked_", "unpacked_widest_"):
            ours, naive = (results[-1][f"{kind}{which}spread_p95"] for which in ("", "naive_"))
            print(f"  {kind.replace('_', ' ') or 'packed':<16} {ours:.5f} / {naive:.4f}", flush=True)
    figures: dict[str, Any] = {
        "samples": samples,
        "fill": round(min(one["fill"] for one in results), 5),
        "samples_per_s": round(min(one["samples_per_s"] for one in results)),
    }
    figures |= {key: round(max(one[key] for one in results), 6) for key in results[0] if "spread" in key}
    if importlib.util.find_spec("trl"):
        figures |= compare_with_trl(draw_lengths(DISTRIBUTIONS[0], samples), DISTRIBUTIONS[0][-1], rounds)
    else:
        print("TRL is not installed: its figures are left out (packer_vs_trl, trl_samples_per_s)")
    print("RESULT", json.dumps(figures))


if __name__ == "__main__":
    main()
