"""The profile: how often a model solves each problem."""
