"""How right an answer is: one small function for each way of comparing, (answer, target) -> 0 to 1."""
