"""Flags of short runs that several tests take."""

# a few short steps, with an evaluation and checkpoints
SHORT_RUN = [
    "--problems-per-step",
    "4",
    "--group-size",
    "4",
    "--eval-limit",
    "4",
    "--eval-k",
    "2",
    "--sample-every",
    "0",
    "--threads",
    "1",
    "--reward-workers",
    "1",
    "--save-every",
    "2",
]


SMALL_STEPS = ["--problems-per-step", 6, "--group-size", 4, "--eval-limit", 4]


SMALL_PROFILE = """
    --allocation sgpo --limit 24 --problems-per-step 2 --eval-limit 4 --eval-k 2 --num-profile-completions 4
    --sample-every 0 --rollouts-every 0
""".split()
