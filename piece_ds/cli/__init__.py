"""The commands: launch/*.py and `piece_ds`."""
