"""Raw rows to token rows: reading, formats, quality gates, the tokenised cache, splits, packing, sampling, batches."""
