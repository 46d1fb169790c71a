"""What piece_ds knows of a transformers model: loading it, what may train, its layout."""
