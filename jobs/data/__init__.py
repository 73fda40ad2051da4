"""From raw rows to training batches: file reading, formats, quality gates, the token cache, splits, packing, sampling.

It may import `conf`, `jobs.distributed` and `jobs.tokenization`.
"""
