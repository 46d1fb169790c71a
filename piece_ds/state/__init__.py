"""The data that everything shares: who owns which element, the gradient statistics, the mask."""
