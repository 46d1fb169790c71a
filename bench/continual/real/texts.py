"""Texts that no method saw: the rise of their loss, and the KL divergence from the base model, say what was lost.

Three kinds: instructions as a chat with the loss on answers, the same answers as plain text, and Python's own
documentation. Rows that methods may use as 'real' general text are other rows of the first kind.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.continual.real.recipe import Recipe
from piece_ds.runtime.files import write_text

IGNORED = -100


@dataclass(frozen=True)
class Judged:
    """What was measured on one kind of text.

    Attributes:
        loss: nats per token.
        kl: KL(base || model), nats per token; 0 of the base model itself.
    """

    loss: float
    kl: float


@dataclass
class Judge:
    """The judged texts, and what the base model says about every token of them (about 0.7 GB).

    Attributes:
        rows: kind of text -> rows of (token ids, labels).
        base: kind of text -> log-probabilities of the base model, per row, fp16, on its device.
    """

    rows: dict[str, list[tuple[Tensor, Tensor]]]
    base: dict[str, list[Tensor]] = field(default_factory=dict)

    def measure(self, model: PreTrainedModel) -> dict[str, Judged]:
        """Return loss and KL of every kind of text. Cost: one forward pass of all rows.

        Args:
            model: the base model at the first call; later ones are judged against it, and are on the same device.
        """
        model.eval()
        first = not self.base
        found = {}
        for kind, rows in self.rows.items():
            sum_loss, sum_kl, num_tokens = 0.0, 0.0, 0
            for index, row in enumerate(rows):
                ids, labels = (tokens.to(model.device) for tokens in row)
                with torch.no_grad():
                    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                counted = labels[1:] != IGNORED
                said = torch.log_softmax(logits[counted], -1)
                target = labels[1:][counted]
                sum_loss -= said.gather(1, target[:, None]).double().sum().item()
                num_tokens += int(counted.sum())
                if first:
                    self.base.setdefault(kind, []).append(said.to(torch.float16))
                    continue
                before = self.base[kind][index].float()
                sum_kl += (before.exp() * (before - said)).double().sum().item()
            found[kind] = Judged(sum_loss / num_tokens, sum_kl / num_tokens)
        return found


def make_judge(tokenizer: PreTrainedTokenizerBase, lima: Path, recipe: Recipe) -> Judge:
    """Return the judge for a tokenizer. Without a chat template, an instruction is its bare prompt and answer.

    Args:
        lima: file of {"prompt", "answer"} instructions; its first rows are judged on.
    """
    pairs = _pairs(lima)[: recipe.judged_rows]
    length = recipe.judged_tokens
    documentation = [text for _, text in sorted(topics.items()) if len(text) > 1000][: recipe.judged_rows]
    return Judge(
        {
            "chat": [_chat_row(tokenizer, prompt, answer, length) for prompt, answer in pairs],
            "plain": [_plain_row(tokenizer, answer, length) for _, answer in pairs],
            "documentation": [_plain_row(tokenizer, text, length) for text in documentation],
        }
    )


def write_real_text(lima: Path, path: Path, recipe: Recipe) -> None:
    """Write the instructions that methods may use: the rows after those that are judged on."""
    pairs = _pairs(lima)[recipe.judged_rows :][: recipe.general_rows]
    write_text(path, "\n".join(json.dumps({"text": f"{p}\n\n{a}"[:600]}) for p, a in pairs) + "\n")


def _pairs(lima: Path) -> list[tuple[str, str]]:
    rows: list[dict[str, Any]] = json.loads(lima.read_text(encoding="utf-8"))
    return [(row["prompt"], row["answer"]) for row in rows if len(row["answer"]) > 300 and len(row["prompt"]) < 300]


def _plain_row(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(tokenizer(text)["input_ids"][:length])
    return ids, ids.clone()


def _chat_row(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, length: int) -> tuple[Tensor, Tensor]:
    turn = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        asked = tokenizer(f"{prompt}\n\n")["input_ids"]
    else:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(text)["input_ids"]
    said = tokenizer(answer, add_special_tokens=tokenizer.chat_template is not None)["input_ids"][:length]
    return torch.tensor(asked + said), torch.tensor([IGNORED] * len(asked) + said)
