"""Methods against each other: the list that names them, their runs, what each run cost, and what follows from it."""
