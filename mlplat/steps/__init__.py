"""The code of a step: how it is found, how it is called, and how its failures read."""
