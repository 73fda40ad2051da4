"""Names the chat templates that come with Muster, and the tokens that a tokenizer must have for each."""

BUNDLED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
