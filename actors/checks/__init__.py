"""What can be wrong with a machine, a config or a server: one small function each, for `paceline doctor`."""
