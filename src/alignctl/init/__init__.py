"""New recipes: from what a model, its data and the machine are, or from a recipe of another tool."""
