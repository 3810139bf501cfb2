"""Recommend from a state that each new event of a user advances, in place of a pass over their history."""
