"""Prefixes: what the frozen backbone makes of an input before any query."""
