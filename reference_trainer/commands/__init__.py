"""The commands, each with its options and what it does, and what several share."""
