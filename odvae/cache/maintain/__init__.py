"""Commands that inspect, verify, copy or change an existing cache."""
