"""What several tests share: tiny models, oracles in plain PyTorch and numpy, and jobs of several ranks."""
