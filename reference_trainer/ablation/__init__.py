"""Arms side by side under one budget."""
