"""Jobs, files, uploads and folders on disk."""
