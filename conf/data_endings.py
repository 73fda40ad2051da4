"""Lists the endings of files that preprocess can read."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ENDINGS = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv", ".parquet", ".arrow")
