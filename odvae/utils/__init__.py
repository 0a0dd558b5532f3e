"""What every package needs: configs, files, errors, progress."""
