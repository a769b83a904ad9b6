"""Files that ship with the package: the embedded model and what makes it."""
