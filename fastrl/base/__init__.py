"""What every package may import. Imports torch and nothing of ours."""
