"""The embedded pair: a tiny target, its drafter, their recipe and their measure."""
