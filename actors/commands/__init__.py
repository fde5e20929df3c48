"""The commands of `paceline`, one module each: NAME, POSITIONAL, add_arguments, run."""
