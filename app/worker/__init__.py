"""The process that runs the jobs, and its supervisor."""
