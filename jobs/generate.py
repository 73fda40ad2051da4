"""Writes the consolidated model's answers to a few prompts, as JSON and as an HTML page to read after a fine-tune."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.errors import DataError, Problem, as_typed
from conf.files import write_json, write_text
from conf.schema import Config, Generate
from jobs.evaluation import answer_checks, prompts
from jobs.evaluation.load_model import describe, load, load_base
from jobs.evaluation.prompts import Prompt
from jobs.tokenization.tokenizer import load_tokenizer
from pages import run_facts
from pages.render import render_page
from pages.run_facts import Fact

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/generations.json (the answers, their faults, and a count of each fault) and RUN/generations.html.

    Faults cause a warning: a model may be meant to answer with one word, or not to end. Raises DataError, after both files are
    written, for those that `generate.fail_on` names.
    """
    rows = prompts.read(Path(config.generate.prompts), config.generate.system)
    answers = _answers(config, rows, load(config))
    for row, item in zip(rows, answers, strict=True):
        log.info(f"> {row.question}\n{item['answer']}\n")
    if config.generate.compare_base:
        for item, of_base in zip(answers, _answers(config, rows, load_base(config)), strict=True):
            item["base"] = of_base["answer"]
    counts = {name: sum(name in item["faults"] for item in answers) for name in answer_checks.FAULTS}
    settings = {name: value for name, value in vars(config.generate).items() if name not in ("prompts", "fail_on")}
    summary = {"model": describe(config), "prompts": len(answers), "faults": counts, "settings": settings}
    write_json(Path(config.run_dir) / "generations.json", summary | {"answers": answers})
    page = Path(config.run_dir) / "generations.html"
    write_text(page, render_html(config.name, run_facts.model(config), summary, answers))
    faults = [f"{count} {answer_checks.FAULTS[name]}" for name, count in counts.items() if count]
    if faults:
        log.warning(f"answers   {len(answers)} in {page}: {', '.join(faults)}")
    else:
        log.info(f"answers   {len(answers)} in {page}: no faults found")
    refused = [name.name for name in config.generate.fail_on if counts[name.name]]
    if refused:
        found = ", ".join(f"{counts[name]} of {len(answers)} answers {answer_checks.FAULTS[name]}" for name in refused)
        raise DataError(Problem("generate.fail_on", as_typed(refused), f"{found}. They are in {page}"))


def _answers(config: Config, rows: list[Prompt], model: PreTrainedModel) -> list[dict[str, Any]]:
    """An answer of the model to each prompt, with what is known of it."""
    tokenizer = load_tokenizer(config)
    special = answer_checks.special_tokens(tokenizer, config.data.end_of_turn)
    torch.manual_seed(config.generate.seed)
    return [
        {
            "prompt": row.question,
            "messages": row.messages,
            "reference": row.reference,
            **generate_answer(row, model, tokenizer, config.generate, special, config.data.template_kwargs),
        }
        for row in rows
    ]


@torch.no_grad()
def generate_answer(
    prompt: Prompt,
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
        inputs: Any = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **template_kwargs
        )
    else:
        inputs = tokenizer("\n".join(str(turn["content"]) for turn in prompt.messages), return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
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
        "faults": answer_checks.find_faults(ids, text, special, prompt.question),
    }


def render_html(name: str, about: list[Fact], summary: dict[str, Any], answers: list[dict[str, Any]]) -> str:
    """The page of answers: one HTML file that needs no other file. about: the model, its tokenizer and chat template."""
    return render_page(
        "generations.html.j2",
        name=name,
        about=[("base" if title == "model" else title, value) for title, value in about],
        summary=summary,
        settings=[
            (key, value) for key, value in summary["settings"].items() if value is not None and key != "compare_base"
        ],
        answers=answers,
        meanings=answer_checks.FAULTS,
    )
