"""Names families of models that differ from others in what both the launcher and the jobs check."""

FIXED_POSITIONS = frozenset({
    *("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gpt-sw3", "gptj", "mpt", "openai-gpt", "opt"),
})  # fmt: skip
"""Families that store something for each position, trained or in a table: a longer row has no position, and ends in an error."""

TENSOR_STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")
"""Styles in transformers' tensor-parallel plans that work here: weight cut by rows, cut by columns, or whole but applied to some
heads only."""
EXPERTS_ONE_BY_ONE = {"dbrx": frozenset({"w1", "v1", "w2"})}
"""Families that call a module once for each expert that gets a token -> the weights in it that hold all experts."""
NOT_UNDER_ZERO_3 = (
    "experts that are called one by one cannot have adapters under ZeRO-3: use parallel=fsdp, or name other layers"
)
"""Said at launch of these families, and by the job of models with code of their own."""
NO_DROPOUT = (
    "experts cannot have dropout: set adapter.dropout=0, or name only layers without experts in adapter.targets"
)
NO_DORA = "DoRA cannot adapt experts: set adapter.dora=false, or name only layers without experts in adapter.targets"
"""What PEFT cannot do with the matrices of all experts in one weight."""
