"""Names families of models that differ from others in what both the launcher and the jobs check."""

FIXED_POSITIONS = frozenset({
    *("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gpt-sw3", "gptj", "mpt", "openai-gpt", "opt"),
})  # fmt: skip
"""Families that store something for each position, trained or in a table: a longer row has no position, and ends in an error."""
