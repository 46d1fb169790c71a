"""PIECE in a Trainer, and a stream of tasks."""
