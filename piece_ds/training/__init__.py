"""Train with PIECE: in any transformers Trainer, or over a stream of tasks."""
