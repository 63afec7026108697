"""The loop and what it reads and writes."""
