"""Rewards by rule: is this answer right, and does it have the form that was asked for?

Knows nothing of models, arrays or training: text goes in, numbers between 0 and 1 come out.
"""
