"""The processes that run the jobs, and their supervisor."""
