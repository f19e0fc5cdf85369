"""Subcommands of `loongforge data`, one in each module with `add_parser`."""
