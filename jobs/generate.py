"""Answers of the consolidated model to a few prompts, as JSON and as a page: what one wants to read first after a fine-tune."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.errors import DataError, Problem
from conf.files import write_json, write_text
from conf.schema import Config
from jobs.evaluation import answer_checks
from jobs.evaluation.load_model import load, told
from jobs.report.pages import filled
from jobs.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/generations.json, the answers with what is wrong with each and how many have it, and RUN/generations.html.

    Faults are warned of, and fail nothing: a model may be meant to answer in one word, or not to end.
    """
    asked, whole, words = prompts(Path(config.generate.prompts)), load(config), load_tokenizer(config)
    known, found = answer_checks.special(words), list[dict[str, Any]]()
    for prompt in asked:
        found.append({"prompt": prompt, **answer(prompt, whole, words, config, known)})
        log.info(f"> {prompt}\n{found[-1]['answer']}\n")
    counts = {name: sum(name in one["faults"] for one in found) for name in answer_checks.FAULTS}
    about = {"model": told(config), "prompts": len(found), "faults": counts}
    write_json(Path(config.run_dir) / "generations.json", about | {"answers": found})
    page = Path(config.run_dir) / "generations.html"
    write_text(page, html(config.name, about, found))
    wrong = [f"{count} {answer_checks.FAULTS[name]}" for name, count in counts.items() if count]
    log.info(
        f"{'warning' if wrong else 'answers':<9} of {len(found)} answers {', '.join(wrong) or 'none is broken'}: {page}"
    )


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
def answer(
    prompt: str, whole: PreTrainedModel, words: PreTrainedTokenizerBase, config: Config, known: answer_checks.Special
) -> dict[str, Any]:
    """One answer, up to a token that ends a turn or `max_new_tokens`: `ended` says which. `raw` has its special tokens too."""
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
        eos_token_id=sorted(known.ends),
        **sampling,
    )
    new = out[0, ids["input_ids"].shape[1] :].tolist()
    text = words.decode(new, skip_special_tokens=True)
    return {
        "answer": text,
        "raw": words.decode(new, skip_special_tokens=False),
        "tokens": len(new),
        "ended": answer_checks.ended_by(new, known),
        "faults": answer_checks.faults(new, text, known),
    }


def html(name: str, about: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The answers as one file that needs no other."""
    return filled("generations.html.j2", name=name, about=about, found=found, meanings=answer_checks.FAULTS)
