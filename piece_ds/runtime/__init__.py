"""What every process of a run needs: ranks, files, signals, exit codes."""
