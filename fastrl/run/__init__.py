"""From settings to a running trainer."""
