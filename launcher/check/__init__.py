"""Everything that refuses a run before it is queued."""
