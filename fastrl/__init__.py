"""fastrl: reinforcement learning with verifiable rewards on one GPU box."""

__version__ = "0.1.0"
