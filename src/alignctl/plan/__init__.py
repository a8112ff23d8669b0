"""What a run will take, from its recipe and its model's config alone: memory line by line, time, and what to change."""
