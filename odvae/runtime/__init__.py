"""What all three packages share: errors, files, config, seeds, progress, checkpoints, figures."""
