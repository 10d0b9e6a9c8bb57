"""Measures what generated videos show, and how close they are to the truth, on Moving Shapes."""
