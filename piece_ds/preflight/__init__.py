"""Read and refuse what can be refused before a weight is loaded."""
