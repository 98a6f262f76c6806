"""The `bigain` command."""
