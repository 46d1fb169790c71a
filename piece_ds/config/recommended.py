"""Say which settings to begin with on a pretrained model. docs/forgetting.md has the measurements behind them."""

RECOMMENDED = (
    "--method piece-ratio --mask_ratio 0.01 --general_text self --step_scale general --general_kl 4 "
    "--learning_rate 1e-3"
)

HELP = (
    f"On a pretrained model, begin with {RECOMMENDED}. Raise --mask_ratio to 0.1 if much is to be learned. Without a "
    "mask, --method seqft with the same text, scale and --general_kl at 1e-4 learns more and forgets a little more, "
    "and leaves no delta of megabytes that goes on and off. Leave --general_kl out if a step may cost nothing more. "
    "The default is the paper's own setting (PIECE-S, 0.1 %), which forgets more at equal learning. Measurements: "
    "docs/forgetting.md."
)

# For a run that names no method.
NOTE = (
    f"--method is not given: piece-s, the paper's. On a pretrained model {RECOMMENDED} keeps more of what the model "
    "knew (docs/forgetting.md)"
)
