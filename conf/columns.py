"""Names columns of data formats, speakers of chats, and the notation for ranges of rows. Launcher and jobs both use them."""

import re

MESSAGES = ("messages", "conversations", "conversation")
INSTRUCTION = ("instruction", "INSTRUCTION", "question", "query", "prompt")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "RESPONSE", "answer", "generation")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
DOCUMENTS = ("documents", "document")
TEMPLATE_KWARGS = ("chat_template_kwargs",)
TRAINED_TOKENS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
"""Columns beside `input_ids` with 1 for each trained token."""

CHAT = (SYSTEM, TOOLS, DOCUMENTS, TEMPLATE_KWARGS)
FORMAT_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tokenised": (
        *(("input_ids",), ("labels",), ("attention_mask",), ("position_ids",), ("seq_lengths",), ("segment_ids",)),
        *((name,) for name in TRAINED_TOKENS),
    ),
    "sharegpt": (MESSAGES, *CHAT),
    "messages": (MESSAGES, *CHAT),
    "prompt_completion": (("prompt",), ("completion", *OUTPUT), *CHAT),
    "segments": (("segments",),),
    "alpaca": (INSTRUCTION, INPUT, OUTPUT, ("history",), *CHAT),
    "text": (("text",),),
}
"""The columns that each format reads. A group holds other names of the same column; the first that has a value is read."""
COLUMNS = frozenset(name for groups in FORMAT_COLUMNS.values() for group in groups for name in group)

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
TRAIN_KEYS = ("train", "training", "weight", "loss", "loss_scale")
"""Keys that say whether to train on a turn: two of Axolotl, one of OpenAI, two of ms-swift."""
TRAIN_DETAIL_KEYS = ("train_detail", "training_detail")
CALL_KEYS = ("tool_calls", "function_call")
MESSAGE_KEYS = (
    *(ROLE_KEYS, CONTENT_KEYS, THOUGHT_KEYS, TRAIN_KEYS, TRAIN_DETAIL_KEYS, CALL_KEYS),
    *(("name",), ("tool_call_id",), ("refusal",)),
)
"""The keys of a message, in groups as above."""
KEYS = frozenset(name for group in MESSAGE_KEYS for name in group)

ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""Known speaker names and their roles."""

SPLIT = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")
"""A range of rows: `[:1000]`, `[10%:20%]`, `[-100:]`."""
