"""What sweep.py is made of: grids, the runs they ask for, how these are run, and what they give."""
