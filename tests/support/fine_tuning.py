"""What training with a mask must give, in one process of plain PyTorch, on files alone."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

EMBEDDING = "model.embed_tokens.weight"

Row = tuple[Tensor, int]  # token ids, and how many of them are the prompt


@dataclass(frozen=True)
class Trained:
    """Weights after the last step, and the norm of each step's masked gradient before clipping."""

    weights: dict[str, Tensor]
    norms: list[float]


def read_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def read_rows(path: Path, model_folder: Path) -> list[Row]:
    """BOS, prompt, answer and EOS of every row of a JSON file; prompt and answer tokenized apart."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = []
    for row in json.loads(path.read_text()):
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((torch.tensor([prompt + answer]), len(prompt)))
    return rows


def mean_loss(model: nn.Module, rows: Iterable[Row]) -> Tensor:
    """Nats per answer token over rows, one row at a time, without padding."""
    losses = [
        cross_entropy(model(ids).logits[0, begin - 1 : -1], ids[0, begin:], reduction="none") for ids, begin in rows
    ]
    return torch.cat(losses).mean()


def select_piece_s(folder: Path, rows: list[Row], ratio: float, batch_size: int) -> set[tuple[str, int]]:
    """The k positions with the largest |G| / sqrt(F + 1); the embedding is not eligible."""
    model = read_model(folder)
    params = dict(model.named_parameters())
    grad_sum = {name: torch.zeros(param.shape, dtype=torch.float64) for name, param in params.items()}
    square_sum = {name: torch.zeros_like(zeros) for name, zeros in grad_sum.items()}
    for first in range(0, len(rows), batch_size):
        model.zero_grad()
        mean_loss(model, rows[first : first + batch_size]).backward()
        for name, param in params.items():
            grad_sum[name] += param.grad.double()
            square_sum[name] += param.grad.double() ** 2
    names = [name for name in params if name != EMBEDDING]
    score = torch.cat([(grad_sum[n].abs() / (square_sum[n] + 1).sqrt()).view(-1) for n in names])
    where = [(name, position) for name in names for position in range(params[name].numel())]
    k = max(1, int(ratio * sum(param.numel() for param in params.values())))
    return {where[i] for i in score.sort(descending=True, stable=True).indices[:k].tolist()}


def train_masked(
    folder: Path,
    rows: list[Row],
    index: dict[str, Tensor],
    rows_per_step: int,
    num_steps: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
) -> Trained:
    """AdamW on consecutive rows; what the mask leaves out has no gradient and is put back after every step."""
    model = read_model(folder)
    params = dict(model.named_parameters())
    start = {name: param.detach().clone() for name, param in params.items()}
    selected = {name: torch.zeros(param.numel(), dtype=torch.bool) for name, param in params.items()}
    for name, positions in index.items():
        selected[name][positions] = True
    matrices = [param for param in params.values() if param.dim() > 1]  # transformers does not decay norms and biases
    others = [param for param in params.values() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    norms = []
    for step in range(num_steps):
        optimizer.zero_grad()
        mean_loss(model, rows[step * rows_per_step : (step + 1) * rows_per_step]).backward()
        for name, param in params.items():
            param.grad.view(-1)[~selected[name]] = 0.0
        norms.append(float(nn.utils.clip_grad_norm_(params.values(), max_grad_norm)))
        optimizer.step()
        for name, param in params.items():
            param.data.view(-1)[~selected[name]] = start[name].view(-1)[~selected[name]]
    return Trained({name: param.detach() for name, param in params.items()}, norms)
