"""What looks at a run from outside: collapse, hangs, steps that were refused."""
