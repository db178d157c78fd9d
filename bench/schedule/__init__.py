"""What runs next: blocks, repeats, budgets, and the search for the largest batch."""
