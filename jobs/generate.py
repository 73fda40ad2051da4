"""Writes the consolidated model's answers to a few prompts, as JSON and as an HTML page to read after a fine-tune."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.errors import DataError, Problem
from conf.files import write_json, write_text
from conf.schema import Config, Generate
from jobs.evaluation import answer_checks
from jobs.evaluation.load_model import describe, load
from jobs.report.pages import render_page
from jobs.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/generations.json (the answers, their faults, and a count of each fault) and RUN/generations.html.

    Faults cause a warning and never fail the job: a model may be meant to answer with one word, or not to end.
    """
    prompts = read_prompts(Path(config.generate.prompts))
    model, tokenizer = load(config), load_tokenizer(config)
    special = answer_checks.special_tokens(tokenizer, config.data.end_of_turn)
    answers: list[dict[str, Any]] = []
    for prompt in prompts:
        answer = generate_answer(prompt, model, tokenizer, config.generate, special, config.data.template_kwargs)
        answers.append({"prompt": prompt, **answer})
        log.info(f"> {prompt}\n{answers[-1]['answer']}\n")
    counts = {name: sum(name in item["faults"] for item in answers) for name in answer_checks.FAULTS}
    summary = {"model": describe(config), "prompts": len(answers), "faults": counts}
    write_json(Path(config.run_dir) / "generations.json", summary | {"answers": answers})
    page = Path(config.run_dir) / "generations.html"
    write_text(page, render_html(config.name, summary, answers))
    faults = [f"{count} {answer_checks.FAULTS[name]}" for name, count in counts.items() if count]
    if faults:
        log.warning(f"answers   {len(answers)} in {page}: {', '.join(faults)}")
    else:
        log.info(f"answers   {len(answers)} in {page}: no faults found")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file with `{"prompt": "..."}` on each line. Raises DataError naming a line without one."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                prompts.append(str(json.loads(line)["prompt"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    Problem("generate.prompts", f"{path}:{number}", 'is not of the form {"prompt": "..."}')
                ) from error
    return prompts


@torch.no_grad()
def generate_answer(
    prompt: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Generate,
    special: answer_checks.SpecialTokens,
    template_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Generate one answer, up to a token that ends a turn or `max_new_tokens`; `ended` tells which of the two.

    `answer` is the text without special tokens, `raw` the text with them.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **template_kwargs
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature}
    output = model.generate(  # type: ignore[operator]  # a class decorator hides it from mypy
        **inputs,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(special.end_ids),
        **sampling,
    )
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return {
        "answer": text,
        "raw": tokenizer.decode(ids, skip_special_tokens=False),
        "tokens": len(ids),
        "ended": answer_checks.has_ended(ids, special),
        "faults": answer_checks.find_faults(ids, text, special),
    }


def render_html(name: str, summary: dict[str, Any], answers: list[dict[str, Any]]) -> str:
    """The page of answers: one HTML file that needs no other file."""
    return render_page(
        "generations.html.j2", name=name, summary=summary, answers=answers, meanings=answer_checks.FAULTS
    )
