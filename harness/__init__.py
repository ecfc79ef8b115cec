"""What makes a run safe and pleasant: none of it is needed to understand the method in the four
files above."""
