"""The README's Python examples, run as they stand: only what they take from the reader's own code is supplied."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.launches import ROOT, environment

BEFORE = """
import json, sys
from piece_ds.runtime.process import one_process_environment, start_distributed
one_process_environment()
import deepspeed, torch
from torch.utils.data import DataLoader
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from piece_ds.state.selected_values import PARAMETER_NAME

start_distributed()
collator = lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
torch.manual_seed(1)
ids = torch.randint(0, 64, (16, 12)).tolist()
rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in ids]

def make_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2, initializer_range=0.2))

def values(model):
    return torch.cat([(p.ds_tensor[:p.ds_numel] if hasattr(p, "ds_id") else p).detach().flatten().clone()
                      for name, p in model.named_parameters() if name != PARAMETER_NAME])

zero = {"zero_optimization": {"stage": STAGE}, "zero_allow_untested_optimizer": True}
model = make_model()
num_params = sum(p.numel() for p in model.parameters())
"""

TRAINER = """
args = TrainingArguments(output_dir=sys.argv[1], use_cpu=True, max_steps=2, per_device_train_batch_size=4,
                         learning_rate=1e-2, report_to="none", save_strategy="no",
                         deepspeed={**zero, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"})
words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0")
start = values(make_model())
"""

LOADER = """
config = {**zero, "train_micro_batch_size_per_gpu": 4}
loader = DataLoader(rows, batch_size=4, collate_fn=collator)
start = values(make_model())
"""

LOOP = f"""{LOADER}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
"""

MASK = f"""{LOADER}
from piece_ds import layout_of, save_mask, select
save_mask("mask.safetensors", select(layout_of(model), "random", 0.001))
"""

AFTER = """
moved = int((values(model) != start).sum())
print("RESULT", json.dumps({"moved": moved, "k": max(1, int(RATIO * num_params))}))
"""


@pytest.mark.parametrize(
    ("markers", "before", "stage", "ratio"),
    [
        (["trainer.add_callback"], TRAINER, 3, 0.01),
        (["estimate_mask("], LOOP, 2, 0.001),
        (["prepare_compact(", "estimate_mask("], LOADER, 3, 0.001),
        (["SparseAdamW("], MASK, 0, 0.001),
    ],
    ids=["trainer", "loop", "compact-loop", "no-deepspeed"],
)
def test_example_trains_exactly_the_selected_weights(
    markers: list[str], before: str, stage: int, ratio: float, tmp_path: Path
) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    example = "".join(next(text for text in examples if marker in text) for marker in markers)
    script = tmp_path / "example.py"
    script.write_text(BEFORE.replace("STAGE", str(stage)) + before + example + AFTER.replace("RATIO", str(ratio)))
    run = subprocess.run(
        [sys.executable, script, tmp_path / "out"],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.split("RESULT", 1)[1].splitlines()[0])
    assert result["moved"] == result["k"]
