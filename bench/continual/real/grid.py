"""The grid of the study, written down before its first run: every setting, and what the study asks.

Questions, each answered by the table at matched learning (results/summary.md), whichever way it turns out:

1. Without general text during training: does a mask of 1 % by task over general importance with scaled steps raise the
   general loss at least 3 times less than full fine-tuning, and 5 times less than LoRA?
2. Full fine-tuning with scaled steps: how much of that gain needs no mask at all?
3. With replay of the same general text: is anything left for a mask to keep? Judged by KL to the base model beside the
   loss, because full fine-tuning with replay lowers the loss by learning the replayed text.
4. The paper's setting (PIECE-S, 0.1 %): where does it stand?
5. Text that the model wrote itself against real text, for general importance and for replay.
6. Divergence from the base model instead of replay (--general_kl 4, on as many rows of the same text): does it leave
   less of the rise? These sweeps were added after 24 runs had shown that replay at 0.25 leaves most of it; the two of
   them that combine it with scaled steps of all weights and of 10 % after 6 more.

7. Twice the weight of divergence, on as many rows as the task has (--general_share 1): does it leave less still? These
   two sweeps were added after 115 runs, when the office stream of `make train` had gained by it.
8. A budget of 0.02 for the rise on self-written text, kept by scaling the finished delta: does the rise on text that
   the search did not see stay below 0.03, and what is left of what was learned? Added after 129 runs.
9. How many rows of the task are enough to choose the mask by? 8, 32 and all 256 beside the 96 of every other sweep.
   Added after 141 runs.

10. A second family, Gemma-3-270M: is a rate a rate? Its matrices have a root mean square of 0.034, those of SmolLM2
    0.193, and AdamW steps by the rate whatever a weight's size. Two runs at the rates below raised the general loss by
    1.8 and 5.9. So its rates are these times 0.18 for methods that step the model's own weights (see rescaled()), as
    written here before any run at them; an adapter's rates stay.

11. On Gemma all weights with scaled steps lost a quarter of what the mask of 1 % lost on FOMC, and a third on
    NumGLUE-ds, at equal learning and an equal squared length of a step. Is it how few the weights are (10 %, at a
    rate that keeps that length), where they lie (the same share of every tensor), or which they are (random ones)?
    Added after 14 runs on Gemma. And are the mask's rates too high there? A third of its lowest (the two sweeps at the
    end) was added after 17, when random weights had learned as much as any and risen by a third of what the mask did.

12. What is the choice worth? On NumGLUE-ds random weights with scaled steps did as well as chosen ones or better on
    both models (10 % at 3e-4: 1.314 and +0.005 on SmolLM2, where the mask of 1 % reaches 1.370 at the same rise).
    Their whole curves, with and without divergence; added after 157 runs on SmolLM2 and 18 on Gemma. 1 % with
    divergence was added after 168, when random ones of 1 % at 3e-3 had learned 1.301 at a rise of 0.006.

13. Where much is to be learned (ScienceQA, Py150, 20Minuten): sweeps that were there, not run on these tasks until
    now. Does the order of methods stay, and how far does each get? And the baselines that were still missing: the
    paper's other score, the ratio at the paper's 0.1 %, its rows in place of single weights, the largest weights, and
    OFT, each at rates around those of its nearest neighbour above. Added after 189 runs.

14. Can the mask be chosen after training? All weights train, and only the largest changes, or those that lower the
    loss on the task most, stay. pruned.py has the settings. Added after 216 runs.

Rates span, for each method, from little learning to the point where it stops learning more. A run that is not made
for want of time is missing in results/runs.csv, and summary.py counts it.
"""

from dataclasses import dataclass, replace
from typing import Any

TASKS = ("NumGLUE-ds", "FOMC", "ScienceQA", "Py150", "20Minuten", "C-STANCE")
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Sweep:
    """A method over learning rates: one curve.

    Attributes:
        name: what tables call it.
        method: a value of --method.
        rates: AdamW's peak rates, smallest first.
        ratio: of --mask_ratio; None for methods without a mask.
        scaled: --step_scale general.
        replay: of --general_replay.
        divergence: of --general_kl.
        share: of --general_share; 0 leaves it out.
        budget: of --forgetting_budget; 0 leaves it out.
        general_text: 'self', 'real' (instructions that are not judged on), or '' if no general text is used.
        importance_rows: of --importance_rows, for methods with a mask; 0 takes the recipe's.
        spread: of --budget: 'tensor' selects the same share of every tensor; '' takes the default, the whole model.
        unit: of --unit; '' takes the default, single weights.
        adapter: its adapter_config.json's content, for --method peft.
        ewc_lambda: of --ewc_lambda, for --method ewc, which on one task is full fine-tuning; 0 leaves it out.
    """

    name: str
    method: str
    rates: tuple[float, ...]
    ratio: float | None = None
    scaled: bool = False
    replay: float = 0.0
    general_text: str = ""
    divergence: float = 0.0
    share: float = 0.0
    budget: float = 0.0
    importance_rows: int = 0
    spread: str = ""
    unit: str = ""
    adapter: tuple[tuple[str, Any], ...] = ()
    ewc_lambda: float = 0.0


@dataclass(frozen=True)
class Setting:
    """One run: a sweep at one rate, on one task, with one seed."""

    sweep: Sweep
    task: str
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from other runs, as runs.csv has it."""
        return self.sweep.name, self.task, f"{self.rate:g}", str(self.seed)


def rescaled(setting: Setting, factor: float) -> Setting:
    """Return a setting for weights that are factor times as large as SmolLM2's: its rate times factor, to two digits.

    An adapter begins at zero whatever the model, so its rate stays.
    """
    if setting.sweep.method in ("lora", "peft"):
        return setting
    return replace(setting, rate=float(f"{setting.rate * factor:.1e}"))


FULL = (3e-5, 1e-4, 3e-4)
SCALED_FULL = (1e-4, 3e-4, 1e-3)
ADAPTER = (3e-4, 1e-3, 3e-3)
MORE_ROWS = (1e-3, 2e-3, 3e-3)
OFT = (("peft_type", "OFT"), ("oft_block_size", 32), ("target_modules", "all-linear"))

# In the order in which they are made for a task: what decides first.
SWEEPS = (
    Sweep("full", "seqft", FULL),
    Sweep("LoRA", "lora", ADAPTER),
    Sweep("full, scaled steps", "seqft", SCALED_FULL, scaled=True, general_text="self"),
    Sweep("ratio 1 %, scaled steps", "piece-ratio", (1e-3, 3e-3, 1e-2), 0.01, scaled=True, general_text="self"),
    Sweep("PIECE-S 0.1 %", "piece-s", (1e-4, 3e-4, 1e-3), 0.001),
    Sweep("full + replay", "seqft", FULL, replay=0.25, general_text="self"),
    Sweep("LoRA + replay", "lora", ADAPTER, replay=0.25, general_text="self"),
    Sweep("ratio 1 %, scaled steps + replay", "piece-ratio", (1e-3, 3e-3, 1e-2), 0.01, True, 0.25, "self"),
    Sweep("ratio 1 %, scaled steps + KL", "piece-ratio", (1e-3, 3e-3, 1e-2), 0.01, True, 0.0, "self", 4.0),
    Sweep("full + KL", "seqft", FULL, general_text="self", divergence=4.0),
    Sweep("LoRA + KL", "lora", ADAPTER, general_text="self", divergence=4.0),
    Sweep("full, scaled steps + KL", "seqft", SCALED_FULL, scaled=True, general_text="self", divergence=4.0),
    Sweep("ratio 10 %, scaled steps + KL", "piece-ratio", (3e-4, 1e-3, 3e-3), 0.1, True, 0.0, "self", 4.0),
    Sweep("ratio 10 %, scaled steps", "piece-ratio", (3e-4, 1e-3, 3e-3), 0.1, scaled=True, general_text="self"),
    Sweep("ratio 1 %, scaled steps + KL, as many rows", "piece-ratio", MORE_ROWS, 0.01, True, 0.0, "self", 8.0, 1.0),
    Sweep("full, scaled steps + KL, as many rows", "seqft", (1e-4, 3e-4), None, True, 0.0, "self", 8.0, 1.0),
    Sweep("full, budget 0.02", "seqft", (1e-4, 3e-4), general_text="self", budget=0.02),
    Sweep("LoRA, budget 0.02", "lora", (1e-3, 3e-3), general_text="self", budget=0.02),
    Sweep("ratio 1 %, scaled steps, budget 0.02", "piece-ratio", (3e-3,), 0.01, True, 0.0, "self", budget=0.02),
    Sweep("ratio 1 %", "piece-ratio", (3e-4, 1e-3, 3e-3), 0.01, general_text="self"),
    Sweep("random 1 %", "random", (1e-3, 3e-3, 1e-2), 0.01),
    Sweep("ratio 1 %, scaled steps, real text", "piece-ratio", (1e-3, 3e-3, 1e-2), 0.01, True, 0.0, "real"),
    Sweep("full + replay, real text", "seqft", FULL, replay=0.25, general_text="real"),
)
SWEEPS += tuple(
    replace(SWEEPS[3], name=f"{SWEEPS[3].name}, chosen by {n} rows", rates=(1e-3,), importance_rows=n)
    for n in (8, 32, 256)
)
SWEEPS += (
    replace(SWEEPS[3], name="ratio 1 %, scaled steps, spread over tensors", rates=(1e-3,), spread="tensor"),
    Sweep("random 10 %, scaled steps", "random", (3e-4, 1e-3, 3e-3), 0.1, scaled=True, general_text="self"),
    Sweep("random 1 %, scaled steps", "random", (1e-3, 3e-3, 1e-2), 0.01, scaled=True, general_text="self"),
    Sweep("random 10 %, scaled steps + KL", "random", (3e-4, 1e-3), 0.1, True, 0.0, "self", 4.0),
    Sweep("random 1 %, scaled steps + KL", "random", (3e-3,), 0.01, True, 0.0, "self", 4.0),
    replace(SWEEPS[3], name="ratio 1 %, scaled steps, low rate", rates=(3e-4,)),
    Sweep("ratio 10 %, scaled steps, low rate", "piece-ratio", (1e-4,), 0.1, scaled=True, general_text="self"),
    Sweep("PIECE-F 0.1 %", "piece-f", (1e-4, 3e-4, 1e-3), 0.001),
    Sweep("ratio 0.1 %, scaled steps", "piece-ratio", (3e-3, 1e-2, 3e-2), 0.001, scaled=True, general_text="self"),
    Sweep(
        "ratio 1 % by rows, scaled steps",
        "piece-ratio",
        (1e-3, 3e-3),
        0.01,
        scaled=True,
        general_text="self",
        unit="row",
    ),
    Sweep("magnitude 1 %, scaled steps", "magnitude", (1e-3, 3e-3), 0.01, scaled=True, general_text="self"),
    Sweep("OFT", "peft", (3e-4, 1e-3, 3e-3), adapter=OFT),
)


def settings_in_order(
    tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = SEEDS, names: tuple[str, ...] | None = None
) -> list[Setting]:
    """Return all runs so that any stop leaves whole curves: by seed, then task, then sweep, then rate."""
    sweeps = [sweep for sweep in SWEEPS if names is None or sweep.name in names]
    return [
        Setting(sweep, task, rate, seed) for seed in seeds for task in tasks for sweep in sweeps for rate in sweep.rates
    ]
