"""Conversations to token ids and loss masks: the tokenizer, chat templates, a reference encoder and a fast one."""
