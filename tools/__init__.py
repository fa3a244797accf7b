"""Commands of their own: python -m tools.check, build, convert, depth, bench, findings."""
