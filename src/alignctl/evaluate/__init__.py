"""What came out: scores on held-out rows, and answers."""
