"""HTML from jobs."""
