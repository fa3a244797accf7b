"""What a real run needs around a stage: settings, processes, caches, checkpoints, the log."""
