"""Turns conversations into token ids and loss masks: tokenizer, chat templates, a reference encoder and a fast one.

May import `conf` and `jobs.distributed`.
"""
