"""Answers of the consolidated model to a few prompts: the first thing one wants to read after a fine-tune."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.errors import DataError, Problem
from conf.files import write_json
from conf.schema import Config
from jobs.evaluate import load
from jobs.model import tokenizer


def run(config: Config) -> None:
    """Write RUN/generate.json, a list of prompt, answer and tokens, and print it."""
    asked, whole, words = prompts(Path(config.generate.prompts)), load(config), tokenizer(config)
    found = []
    for prompt in asked:
        found.append({"prompt": prompt, **answer(prompt, whole, words, config)})
        print(f"> {prompt}\n{found[-1]['answer']}\n", flush=True)
    write_json(Path(config.run_dir) / "generate.json", found)


def prompts(path: Path) -> list[str]:
    """Raises DataError naming the line that has no prompt."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(str(json.loads(line)["prompt"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    Problem("generate.prompts", f"{path}:{number}", 'is not of the form {"prompt": "..."}')
                ) from error
    return found


@torch.no_grad()
def answer(prompt: str, whole: PreTrainedModel, words: PreTrainedTokenizerBase, config: Config) -> dict[str, Any]:
    """One answer, up to the end of turn or `max_new_tokens`. `ended` says which."""
    if words.chat_template:
        ids = words.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        ids = words(prompt, return_tensors="pt")
    ids = ids.to(whole.device)
    sampling = (
        {"do_sample": True, "temperature": config.generate.temperature}
        if config.generate.temperature
        else {"do_sample": False}
    )
    out = whole.generate(
        **ids,
        max_new_tokens=config.generate.max_new_tokens,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        **sampling,
    )
    new = out[0, ids["input_ids"].shape[1] :]
    return {
        "answer": words.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "ended": bool(new[-1] == words.eos_token_id),
    }
